"""The folder that task=export writes: plain transformers reads it, its card says what the run knows."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import soundfile
import torch
import transformers
import yaml
from families import TOKENIZER, tiny_decoder, tiny_encoder
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from sedtrain.errors import UserError
from sedtrain.export.card_facts import CardFacts, card_facts_of, metadata
from sedtrain.export.folder import ExportOptions, made_whole, refuse_taken, write_folder
from sedtrain.models.lora import adapt
from sedtrain.models.saved import join, load

ROOT = Path(__file__).parents[2]
SHORT = "decoding.max_new_tokens=12"


@pytest.fixture(scope="module")
def exported(sedtrain, trained, tmp_path_factory):
    """A run of hubert + bert as others get it, with what the command printed."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    known = "data.language=en", "export.license=mit", "hub=somebody/digits"
    ended = sedtrain("task=export", f"checkpoint={trained}", f"out={folder}", SHORT, *known)
    assert ended.status == 0, ended.err
    return folder, ended.out


def test_plain_transformers_writes_the_text_of_task_transcribe(sedtrain, trained, exported, wav):
    folder, _ = exported
    model = transformers.SpeechEncoderDecoderModel.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    samples, rate = soundfile.read(wav, dtype="float32")
    ids = model.generate(**processor(samples, sampling_rate=rate, return_tensors="pt"))
    text = processor.decode(ids[0], skip_special_tokens=True).strip()
    asked = transformers.pipeline("automatic-speech-recognition", str(folder), device="cpu")
    assert text and asked({"raw": samples, "sampling_rate": rate})["text"].strip() == text
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={wav}", SHORT)
    assert ended.out == f"{wav}\t{text}\n"


def test_the_card_has_what_the_hub_reads(trained, exported):
    folder, printed = exported
    card, stored = ModelCard.load(folder / "README.md"), json.loads((trained / "results.json").read_text())
    stated = card.data.to_dict()
    assert [stated[name] for name in ("language", "license", "library_name")] == [["en"], "mit", "transformers"]
    assert [each.metric_type for each in card.data.eval_results] == list(stored["metrics"]) == ["wer", "cer"]
    for each in card.data.eval_results:
        value = stored["metrics"][each.metric_type]
        assert each.metric_value == pytest.approx(100 * value["value"], abs=0.005)
        assert each.metric_args["interval_95_percent"] == pytest.approx(
            [100 * value["low"], 100 * value["high"]], abs=0.005
        )
        assert (each.dataset_name, each.dataset_split) == ("digits, test", "test")
    assert "trained with sedtrain on `digits`" in card.text and "3 steps on" in card.text and "lr: 0.001" in card.text
    assert str(trained.parent) not in card.content
    assert "nothing was uploaded: dry_run=false would write these 9 files to somebody/digits" in printed
    assert "model.safetensors" in printed


def test_a_folder_in_bfloat16_has_half_the_size_and_its_card_s_code_runs(exported, tmp_path, wav):
    saved, small = load(exported[0]), tmp_path / "small"
    write_folder(
        small,
        saved,
        ExportOptions(dtype="bfloat16"),
        {"max_new_tokens": 12},
        None,
        CardFacts("digits"),
        "transcription",
    )
    whole, half = (load_file(folder / "model.safetensors") for folder in (exported[0], small))
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items())
    [code] = re.findall(r"```python\n(.*?)```", (small / "README.md").read_text(), re.DOTALL)
    samples, _ = soundfile.read(wav, dtype="float32")
    with contextlib.chdir(small), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {"audio": samples})
    assert printed.getvalue().strip()


def adapted():
    saved = join(tiny_encoder("wav2vec2"), tiny_decoder("bert"), lambda *widths: None, TOKENIZER)
    adapt(saved.model, ["decoder_self_attention"], rank=2, alpha=4.0, dropout=0.0)
    for name, weight in saved.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    saved.model.eval()
    return saved


@pytest.mark.parametrize("lora", ["merged", "apart"])
def test_plain_transformers_reads_lora_merged_and_apart(tmp_path, monkeypatch, lora):
    monkeypatch.chdir(tmp_path)
    saved, inputs = adapted(), {"input_values": torch.randn(1, 4000), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    with torch.no_grad():
        expected = saved.model(**inputs).logits
        folder = Path("RUN/model")
        write_folder(folder, saved, ExportOptions(lora=lora), {}, None, CardFacts("digits"), "transcription")
        stock = transformers.SpeechEncoderDecoderModel.from_pretrained(folder)
        if lora == "apart":
            assert (stock(**inputs).logits - expected).abs().max() > 0.1
            [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/finetune.md").read_text(), re.DOTALL)
            exec(code, names := {"SpeechEncoderDecoderModel": transformers.SpeechEncoderDecoderModel})
            stock = names["model"]
        torch.testing.assert_close(stock(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert ("load_adapter" in (folder / "README.md").read_text()) is (lora == "apart")


def test_a_model_that_transformers_has_no_class_for_says_so_and_its_card_s_code_runs(tmp_path, wav):
    saved = join(tiny_encoder("whisper"), tiny_decoder("bert"), lambda *widths: None, TOKENIZER)
    write_folder(
        tmp_path / "out", saved, ExportOptions(), {"max_new_tokens": 4}, None, CardFacts("digits"), "transcription"
    )
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.get("library_name") == "sedtrain" and "from sedtrain import SpeechEncoderDecoder as" in card.text
    [code] = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    samples, _ = soundfile.read(wav, dtype="float32")
    with contextlib.chdir(tmp_path / "out"), contextlib.redirect_stdout(io.StringIO()):
        exec(code, {"audio": samples})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["export.lora=apart"], "this model has no matrices apart from its weights"),
        (["export.dtype=float8"], "export.dtype = 'float8'"),
        (["export.license=Apache 2.0"], "the Hub names licenses in lower case without spaces"),
        (["hub=digits"], "this names no user or organization"),
        (["hub=a/b/c"], "write hub=USER/NAME"),
        (["hub=a/b", "dry_run=false"], "an upload needs a token of the Hub that may write"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    sedtrain, exported, tmp_path, monkeypatch, overrides, words
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ended = sedtrain("task=export", f"checkpoint={exported[0]}", f"out={tmp_path / 'out'}", *overrides)
    assert ended.status == 2 and "1 problem:" in ended.err
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["checkpoint=RUN"], ["out=FOLDER"]])
def test_export_needs_a_model_and_a_folder(sedtrain, arguments):
    ended = sedtrain("task=export", *arguments)
    assert ended.status == 2
    assert ("task=export needs a trained model" in ended.err) is ("checkpoint=RUN" not in arguments)
    assert ("task=export needs a folder to write" in ended.err) is ("out=FOLDER" not in arguments)


def test_nothing_is_overwritten(exported, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_folder(tmp_path, load(exported[0]), ExportOptions(), {}, None, CardFacts("digits"), "transcription")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_appears_whole_or_not_at_all_and_what_cannot_be_written_is_named(tmp_path):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    with contextlib.chdir(empty), pytest.raises(UserError, match="you are in it"):
        refuse_taken(Path().resolve())
    for folder, error in ((tmp_path / ("a" * 300), UserError), (other, UserError), (other, KeyboardInterrupt)):
        with pytest.raises(error), made_whole(folder) as unfinished:
            (unfinished / "part").write_text("part")
            raise OSError("no room") if error is UserError else KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [empty]
    with made_whole(empty) as unfinished:
        (unfinished / "file").write_text("all")
    assert (empty / "file").read_text() == "all" and list(tmp_path.iterdir()) == [empty]


def test_scores_of_a_stranger_are_taken_as_texts_and_numbers(sedtrain, trained, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(trained / "model")
    stored = json.loads((trained / "results.json").read_text())
    odd = {
        "metrics": {"wer": {"value": 0.5, "low": 0.1, "high": None}, "own\x1b|<b>": {"value": 2}},
        "num_utterances": "many",
        "data": "digits`<img src=x>, test",
        "signatures": {"bleu\n---\n# x`<b>": "a\n`"},
    }
    (run / "results.json").write_text(json.dumps({**stored, **odd, "train": [1], "not_scored": "x"}))
    ended = sedtrain("task=export", f"checkpoint={run}", f"out={tmp_path / 'out'}")
    assert ended.status == 0, ended.err
    card = (tmp_path / "out/README.md").read_text()
    assert "| WER | 50.00 % | unknown |" in card and "\x1b" not in card
    _, metadata, text = card.split("---\n", 2)
    assert ".nan" not in metadata and "interval" not in metadata
    told = re.sub(r"```.*?```|`[^`\n]*`", "", text.partition("## Training")[0], flags=re.DOTALL)
    assert "Scored on digits  img src=x , test" in told and not re.search(r"[`<>]|^---$|^# x", told, re.MULTILINE)
    (run / "results.json").write_text("[]")
    ended = sedtrain("task=export", f"checkpoint={run}", f"out={tmp_path / 'other'}")
    assert ended.status == 2 and "holds no results" in ended.err


def test_languages_of_a_region_are_not_among_those_of_iso_639():
    found = yaml.safe_load(metadata("a", "translation", None, CardFacts("", languages=("zh-CN", "de")), "transformers"))
    assert (found["language"], found["language_bcp47"]) == (["zh", "de"], ["zh-CN"])
    assert (found["pipeline_tag"], found["tags"][-1]) == ("automatic-speech-recognition", "speech-translation")


def test_a_card_names_what_the_hub_has_and_no_place_on_this_machine(tmp_path):
    settings = {
        "size": "base",
        "pretrained": True,
        "encoder": {"checkpoint": None, "base": "facebook/hubert-base-ls960"},
        "decoder": {"checkpoint": str(tmp_path), "base": "google-bert/bert-base-uncased"},
        "augment": {"noise": {"path": "/home/somebody/noises", "probability": 0.5}},
        "data": {
            "path": None,
            "mix": {
                "a": {"path": "openslr/librispeech_asr@main"},
                "b": {"path": str(tmp_path)},
                "c": {"path": "hf://datasets/google/fleurs/{split}/*.parquet"},
            },
        },
    }
    found = card_facts_of(settings, "en", None, None)
    assert found.datasets == ("openslr/librispeech_asr", "google/fleurs")
    assert found.base_models == ("facebook/hubert-base-ls960",)
    assert found.data == (
        f"openslr/librispeech_asr@main + {tmp_path.name} + hf://datasets/google/fleurs/{{split}}/*.parquet"
    )
    assert found.settings == {"size": "base", "augment": {"noise": {"path": "noises", "probability": 0.5}}}
    assert card_facts_of({"data": [], "encoder": 3}, None, None, None) == CardFacts("")
