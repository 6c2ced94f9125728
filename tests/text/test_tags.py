"""Tags say which language and task a text is of: in the labels, in the prompt, in what is saved."""

import contextlib
import io
import json
import re
from dataclasses import replace

import pytest
import soundfile
import torch
import transformers
import yaml
from corpora import STREAMED, mix_module, refused, syllables
from hydra import compose, initialize_config_dir
from test_collate import EXTRACTORS, utterances

from sedtrain import build
from sedtrain.batch import IGNORE_INDEX
from sedtrain.config.schema import conf_dir, register
from sedtrain.data.collate import Collator
from sedtrain.data.corpus import learnt_pairs, pairs_of, refuse_unlearnt
from sedtrain.decoding.generate import decode_batch
from sedtrain.errors import UserError
from sedtrain.models.losses import shift_right
from sedtrain.models.saved import load
from sedtrain.text.tags import Tags, add_tags
from sedtrain.text.tokenizers import train_tokenizer

TEXTS = ["one two three", "nine", "four four", "<|de|>"]
PAIRS = {("en", "transcribe"), ("fr", "transcribe"), ("de", "translate")}
SMALL = ["encoder.tiny.num_hidden_layers=1", "decoding.max_new_tokens=8"]
KNOWN = "the model writes <|en|><|transcribe|> and <|de|><|translate|>, and is asked to "
INSTEAD = "\n    write target=transcription data.language=en, or target=translation data.language=de"


def tagged(kind="char"):
    tokenizer = train_tokenizer(TEXTS, kind, 100)
    return tokenizer, add_tags(tokenizer, PAIRS)


# --- tokens


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_tags_are_tokens_that_no_text_becomes_and_no_scored_text_has(kind, tmp_path):
    tokenizer, tags = tagged(kind)
    assert [tokenizer.decode(tags.of(*pair)) for pair in sorted(PAIRS)] == [
        "<|de|><|translate|>", "<|en|><|transcribe|>", "<|fr|><|transcribe|>",
    ]  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    ids = [id for pair in PAIRS for id in tags.of(*pair)]
    for each in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        written = each("<|de|>")["input_ids"]
        assert not set(written) & set(ids)
        assert each.decode(ids + written, skip_special_tokens=True).strip() == "<|de|>"


def test_special_tokens_that_a_tokenizer_has_stay_special():
    tokenizer = train_tokenizer(TEXTS, "char", 100)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<mine>"]})
    add_tags(tokenizer, PAIRS)
    assert {"<mine>", "<|de|>", "<|translate|>"} <= set(tokenizer.all_special_tokens)


def test_the_only_language_of_a_task_need_not_be_named():
    _, tags = tagged()
    assert tags.of(None, "translate") == tags.of("de", "translate")


@pytest.mark.parametrize(
    ("language", "task", "asked"),
    [
        ("it", "transcribe", "transcribe in 'it'"),
        ("en", "translate", "translate in 'en'"),
        ("de", "transcribe", "transcribe in 'de'"),
        (None, "summarise", "summarise without a language"),
    ],
)
def test_what_was_never_learnt_is_refused_with_what_was(language, task, asked):
    tokenizer = train_tokenizer(TEXTS, "char", 100)
    tags = add_tags(tokenizer, [("de", "translate"), ("en", "transcribe")])
    message = refused(tags.of, language, task)
    assert sorted(re.findall(r"(?:<\|\w+\|>)+", message)) == ["<|de|><|translate|>", "<|en|><|transcribe|>"]
    assert f"and is asked to {asked}\n" in message
    assert message.endswith("    write target=transcription data.language=en, or target=translation data.language=de")


def test_a_language_of_several_has_to_be_named():
    assert "asked to transcribe without a language" in refused(tagged()[1].of, None, "transcribe")


# --- batches


def spoken():
    pairs = [("de", "translate"), ("en", "transcribe"), ("fr", "transcribe")]
    return [
        replace(each, language=language, task=task)
        for each, (language, task) in zip(utterances(5000, 6000, 7000), pairs, strict=True)
    ]


def test_labels_begin_with_tags_and_prompts_are_what_the_decoder_reads_before_the_text():
    tokenizer, tags = tagged()
    with_tags = Collator(EXTRACTORS["hubert"], tokenizer, tokenizer.bos_token_id, tags=tags)
    batch, plain = with_tags(spoken()), Collator(EXTRACTORS["hubert"], tokenizer, tokenizer.bos_token_id)(spoken())
    assert plain.prompts is None and plain.text_labels is plain.labels
    assert torch.equal(batch.text_labels, plain.labels)
    read = shift_right(batch.labels, tokenizer.bos_token_id, tokenizer.pad_token_id)
    assert torch.equal(read[:, :3], batch.prompts)
    assert batch.prompts.tolist() == [
        [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(each)]
        for each in (["<|de|>", "<|translate|>"], ["<|en|>", "<|transcribe|>"], ["<|fr|>", "<|transcribe|>"])
    ]
    lengths = [with_tags.num_tokens(utterance.text) for utterance in spoken()]
    assert lengths == (batch.labels != IGNORE_INDEX).sum(1).tolist()
    assert batch.to(torch.device("cpu")).prompts is not None
    assert with_tags([]).prompts is None


# --- corpora

OF_TRAINING = {
    ("de", "translate"),
    ("en", "transcribe"),
    ("fr", "transcribe"),
    ("es", "transcribe"),
    ("it", "transcribe"),
}


@pytest.mark.parametrize("options", [{}, STREAMED], ids=["whole", "streamed"])
def test_languages_and_tasks_come_from_columns_and_datasets(datasets_of, tmp_path, options):
    corpus = mix_module(tmp_path, datasets_of, **options).corpus
    assert learnt_pairs(corpus) == OF_TRAINING
    assert pairs_of(corpus, "validation") == OF_TRAINING - {("it", "transcribe")}


def test_a_text_of_no_language_is_refused_before_training(datasets_of, tmp_path):
    datasets_of["hub"] |= {"language": None}
    assert refused(learnt_pairs, mix_module(tmp_path, datasets_of).corpus) == (
        "1 problem:\n\n  data.tags = true\n    nothing says the language of the texts to transcribe\n    write "
        "data.language=LANGUAGE, data.mix.NAME.language=LANGUAGE or data.columns.language=COLUMN"
    )


def test_a_split_in_a_language_that_was_never_learnt_is_refused(datasets_of, tmp_path):
    ids = {
        task: {each: [1, 2] for each, of in OF_TRAINING - {("fr", "transcribe")} if of == task}
        for _, task in OF_TRAINING
    }
    corpus = mix_module(tmp_path, datasets_of).corpus
    assert "is asked to transcribe in 'fr'" in refused(refuse_unlearnt, corpus, ["validation"], Tags(ids))


# --- models


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """A function of overrides: the connected objects of a run on both datasets of the small corpus."""

    def run(*overrides):
        register()
        paths = [f"data.mix.{name}.path={corpus}" for name in ("english", "german")]
        choices = [
            "data=mix",
            *paths,
            f"run_dir={tmp_path_factory.mktemp('run')}",
            "logger=none",
            "trainer.max_steps=2",
        ]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            connected = build.training_run(compose("train", [*choices, *SMALL, *overrides]))
        connected.module.trainer = connected.trainer
        return connected

    return run


@pytest.fixture(scope="module")
def run(built):
    return built()


def test_the_vocabulary_of_the_model_is_that_of_the_tokenizer_with_tags(run):
    model, tokenizer = run.saved.model, run.saved.tokenizer
    sizes = {
        model.decoder.config.vocab_size,
        model.ctc_head.out_features,
        model.decoder.get_output_embeddings().out_features,
    }
    assert sizes == {len(tokenizer)}
    assert model.config.tags == {
        task: {language: tokenizer.convert_tokens_to_ids([f"<|{language}|>", f"<|{task}|>"])}
        for language, task in (("en", "transcribe"), ("de", "translate"))
    }


def test_ctc_aligns_the_text_alone(run):
    module, batch = run.module.eval(), next(run.data.batches("validation"))
    collator = run.data.collator
    ids = [collator.target(text) for text in batch.texts]
    labels = torch.full((len(ids), max(map(len, ids))), IGNORE_INDEX)
    for row, each in zip(labels, ids, strict=True):
        row[: len(each)] = torch.tensor(each)
    encoded = module.model.encode(batch.inputs, batch.attention_mask)
    ours, (loss, aligned) = module.losses(batch), module.ctc(encoded, labels)
    torch.testing.assert_close(ours.ctc, loss)
    assert ours.num_aligned == aligned == sum(len(each) - 1 for each in ids)
    assert ours.num_tokens == sum(len(each) + 2 for each in ids)  # as Whisper's, tags are targets too


def test_generation_begins_with_the_tags_of_each_utterance(built):
    run = built()
    model, tokenizer = run.saved.model.eval(), run.saved.tokenizer
    for batch in run.data.batches("validation"):
        begun = ["<|en|><|transcribe|>" if id.startswith("english/") else "<|de|><|translate|>" for id in batch.ids]
        assert [tokenizer.decode(row[1:]) for row in batch.prompts] == begun
        assert (batch.prompts[:, 0] == model.config.decoder_start_token_id).all()
        encoded = model.encode(batch.inputs, batch.attention_mask)
        behind = model(encoder_outputs=encoded, decoder_input_ids=batch.prompts).logits[:, -1].argmax(-1).tolist()
        found = decode_batch(model, tokenizer, batch, run.module.decoding)
        assert [[*each.ids[0], model.config.eos_token_id][0] for each in found] == behind
        assert not [each for each in found if "<|" in each.texts[0]]


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "bart", "marian"])
def test_a_decoder_with_weights_grows_by_the_tags_and_keeps_its_rows(built, tmp_path, decoder):
    plain = built(f"decoder={decoder}", "data.tags=false")
    plain.saved.model.decoder.save_pretrained(tmp_path)
    plain.saved.tokenizer.save_pretrained(tmp_path)
    run = built(f"decoder={decoder}", f"decoder.checkpoint={tmp_path}")
    before, after = (each.saved.model.decoder.get_input_embeddings().weight for each in (plain, run))
    assert len(after) == len(before) + 4 == len(run.saved.tokenizer)
    torch.testing.assert_close(after[: len(before)], before)
    batch = next(run.data.batches("validation"))
    run.module.losses(batch).cross_entropy.backward()
    decode_batch(run.saved.model, run.saved.tokenizer, batch, run.module.decoding)
    run.saved.save(tmp_path / "saved", run.module.decoding.generation_kwargs())
    assert load(tmp_path / "saved").tags == run.saved.tags


# --- commands


@pytest.fixture(scope="module")
def trained_mix(sedtrain, corpus, tmp_path_factory):
    """The folder of a run on both datasets, of weights 2 and 0.5, named by relative paths."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "digits").symlink_to(corpus)
    with contextlib.chdir(folder):
        ended = sedtrain(
            "data=mix", "data.mix.english.path=digits", "data.mix.german.path=digits", "data.mix.english.weight=2",
            "data.mix.german.weight=0.5", "run_dir=run", "trainer.max_steps=3", "trainer.log_every_n_steps=1", *SMALL,
        )  # fmt: skip
    assert ended.status == 0, ended.err
    return folder / "run"


def test_a_mix_trains_by_command_and_is_found_again_from_any_folder(trained_mix, sedtrain, tmp_path):
    kept = yaml.safe_load((trained_mix / "config.yaml").read_text())
    digits = str(trained_mix.parent / "digits")
    assert kept["data"]["path"] is None
    assert {name: each["path"] for name, each in kept["data"]["mix"].items()} == {"english": digits, "german": digits}
    stored = json.loads((trained_mix / "results.json").read_text())
    assert stored["num_utterances"] == 12
    assert "on digits\n" in (trained_mix / "model/README.md").read_text()


def evaluated(sedtrain, trained_mix, corpus, folder, *overrides):
    data = ["data=parquet", f"data.path={corpus}", "data.columns.id=id"]
    return sedtrain(
        "task=evaluate",
        f"checkpoint={trained_mix}",
        *data,
        f"run_dir={folder}",
        "decoding.max_new_tokens=8",
        *overrides,
    )


@pytest.mark.parametrize(
    ("asked", "metric"),
    [([], "wer"), (["data.language=en"], "wer"), (["target=translation", "data.language=de"], "bleu")],
    ids=["by default", "English", "German"],
)
def test_a_saved_model_is_asked_for_a_language_and_a_task(
    trained_mix, sedtrain, corpus, tmp_path, monkeypatch, asked, metric
):
    prompts = []

    def noted(model, tokenizer, batch, options):
        prompts.extend(tokenizer.decode(row[1:]) for row in batch.prompts)
        return decode_batch(model, tokenizer, batch, options)

    monkeypatch.setattr("sedtrain.evaluation.evaluate.decode_batch", noted)
    ended = evaluated(sedtrain, trained_mix, corpus, tmp_path, *asked)
    assert ended.status == 0, ended.err
    assert next(iter(json.loads((tmp_path / "results.json").read_text())["metrics"])) == metric
    assert prompts == ["<|en|><|transcribe|>" if metric == "wer" else "<|de|><|translate|>"] * 6


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (["data.language=fr"], "transcribe in 'fr'"),
        (["data.language=de"], "transcribe in 'de'"),
        (["target=translation", "data.language=en"], "translate in 'en'"),
    ],
)
def test_a_language_that_the_model_never_saw_is_refused(trained_mix, sedtrain, corpus, tmp_path, wav, asked, wanted):
    assert KNOWN + wanted + INSTEAD in str(evaluated(sedtrain, trained_mix, corpus, tmp_path, *asked).err)
    ended = sedtrain("task=transcribe", f"checkpoint={trained_mix}", f"audio={wav}", f"run_dir={tmp_path}", *asked)
    assert ended.status != 0
    assert KNOWN + wanted + INSTEAD in ended.err


def test_a_model_without_tags_cannot_be_asked_for_a_language(trained, sedtrain, wav, tmp_path):
    ended = sedtrain(
        "task=transcribe", f"checkpoint={trained}", f"audio={wav}", f"run_dir={tmp_path}", "data.language=de"
    )
    assert ended.status != 0
    assert (
        "  data.language = 'de'\n"
        "    this model was trained without language tags, so it cannot be asked for a language\n"
        "    write no data.language, or a checkpoint that was trained with data.tags=true\n"
    ) in ended.err


def test_transcription_asks_as_the_card_does(trained_mix, sedtrain, wav):
    code, *_ = re.findall(r"```python\n(.*?)```", (trained_mix / "model/README.md").read_text(), re.DOTALL)
    audio, _ = soundfile.read(wav, dtype="float32")
    with contextlib.chdir(trained_mix / "model"), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"audio": audio})
    command = [
        "task=transcribe",
        f"checkpoint={trained_mix}",
        f"audio={wav}",
        f"run_dir={trained_mix}",
        "decoding.max_new_tokens=8",
    ]
    assert "<|" not in printed.getvalue()
    assert sedtrain(*command).out == f"{wav}\t{printed.getvalue().strip()}\n"


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, syllables(1), 16_000)
    return path


def test_one_file_for_all_splits_is_refused_at_its_dataset_unless_it_is_for_one(built, corpus):
    file = corpus / "train.parquet"
    with pytest.raises(UserError) as raised:
        built(f"data.mix.german.path={file}")
    [problem] = raised.value.errors
    assert (problem.option, problem.value) == ("data.mix.german.path", str(file))
    assert problem.write.startswith("write data.mix.german.path=FOLDER")
    only_training = ["+data.mix.german.validation_split=null", "+data.mix.german.test_split=null"]
    assert len(built(f"data.mix.german.path={file}", *only_training).data.corpus.kept("validation")) == 6
