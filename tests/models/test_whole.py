"""Whole speech models: what `transformers` computes before training, its folders after it, and its prompts."""

import json
import shutil
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
import torch
from corpora import refused
from families import option_file
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from test_flax_weights import FILE, flax_tree
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperForConditionalGeneration,
    pipeline,
)
from whispers import LANGUAGES, OTHERS, SECONDS, other_whole, whisper_folder

from sedtrain import load
from sedtrain.batch import Utterance
from sedtrain.build_model import warn_of_single_utterances, whole_checkpoint
from sedtrain.build_saved import connect
from sedtrain.config.schema import conf_dir, register
from sedtrain.data.buckets import Bounds
from sedtrain.data.sampler import DurationBatches
from sedtrain.decoding.collator import collator_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import Recording, RecordingDecoder
from sedtrain.decoding.windows import Window
from sedtrain.models.saved import refuse_misdescribed, to_finetune
from sedtrain.models.whole import WholeSpeechModel
from sedtrain.training.finetune import LoRA

RATE = 16_000
AUDIO = [
    (np.sin(np.arange(length) ** 1.3 / 90) * (np.arange(length) // 4_000 % 2)).astype(np.float32)
    for length in (14_000, 30_000)
]


@pytest.fixture(scope="module", params=[LANGUAGES, ()], ids=["multilingual", "english"])
def folder(request, tmp_path_factory):
    return whisper_folder(tmp_path_factory.mktemp("whisper"), request.param)


def utterances(language="de", task="translate", text="eins zwei"):
    return [Utterance("", torch.from_numpy(each), RATE, text, language, None, len(each) / RATE, task) for each in AUDIO]


def asked(saved):
    """A batch, and how stock `generate` is asked for the same texts."""
    if not saved.tags.languages:
        return collator_of(saved)(utterances(None)), {}
    return collator_of(saved)(utterances()), {"language": "de", "task": "translate"}


def test_inputs_and_logits_are_those_of_transformers(folder):
    saved, stock = load(folder), WhisperForConditionalGeneration.from_pretrained(folder)
    batch, _ = asked(saved)
    features = saved.feature_extractor(AUDIO, sampling_rate=RATE, return_tensors="pt").input_features
    torch.testing.assert_close(batch.inputs, features, atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = saved.model(features, attention_mask=batch.attention_mask, labels=batch.labels).logits
        torch.testing.assert_close(logits, stock(features, labels=batch.labels.clone()).logits, atol=1e-5, rtol=0)


def test_texts_are_those_of_transformers(folder):
    saved, stock = load(folder), WhisperForConditionalGeneration.from_pretrained(folder)
    batch, options = asked(saved)
    found = decode_batch(saved.model, saved.tokenizer, batch, DecodingOptions(max_new_tokens=12))
    written = stock.generate(batch.inputs, max_new_tokens=12, **options)
    assert [list(each.texts) for each in found] == [
        [text.strip()] for text in saved.tokenizer.batch_decode(written, skip_special_tokens=True)
    ]
    assert any(each.ids[0] for each in found)


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A folder of a Whisper that hears another language in one of the two utterances than in the other."""
    folder = whisper_folder(tmp_path_factory.mktemp("whisper"), ("en", "de", "fr", "it", "es"))
    stock, saved = WhisperForConditionalGeneration.from_pretrained(folder), load(folder)
    inputs, start = collator_of(saved)(utterances()).inputs, torch.full((2, 1), stock.config.decoder_start_token_id)
    with torch.no_grad():
        one, two = stock.model(inputs, decoder_input_ids=start).last_hidden_state[:, -1]
        mean, apart = one + two, one - two
        apart = apart - mean * (apart @ mean) / (mean @ mean)
        for language, embedding in (("fr", apart), ("it", -apart)):
            token = stock.generation_config.lang_to_id[f"<|{language}|>"]
            stock.get_output_embeddings().weight[token] = 1e6 * embedding
            stock.generation_config.suppress_tokens += [token]
    stock.save_pretrained(folder)
    assert saved.tokenizer.decode(stock.detect_language(inputs)) == "<|fr|><|it|>"
    return folder


def test_a_language_that_nothing_names_is_heard_as_by_transformers(multilingual):
    saved, stock = load(multilingual), WhisperForConditionalGeneration.from_pretrained(multilingual)
    batch = collator_of(saved, detects=True)(utterances(None, "transcribe"))
    found = decode_batch(saved.model, saved.tokenizer, batch, DecodingOptions(max_new_tokens=12))
    written = stock.generate(batch.inputs, task="transcribe", max_new_tokens=12)
    expected = [text.strip() for text in saved.tokenizer.batch_decode(written, skip_special_tokens=True)]
    assert [each.texts[0] for each in found] == expected and all(expected)
    assert [saved.transcribe(each, sampling_rate=RATE, max_new_tokens=12) for each in AUDIO] == expected


def test_all_windows_of_a_recording_have_the_language_of_the_first(multilingual, monkeypatch):
    saved, asked = load(multilingual), []
    decoder, found = RecordingDecoder(saved, DecodingOptions()), Hypotheses([[5]], texts=("five",))

    def decode(self, windows):
        asked.extend(recording.language for recording, _ in windows)
        return [found] * len(windows)

    monkeypatch.setattr(RecordingDecoder, "decode", decode)
    for pair in (AUDIO, AUDIO[::-1]):
        windows = [Window(0, each) for each in pair]
        monkeypatch.setattr("sedtrain.decoding.recordings.windows_of", lambda *_, windows=windows: iter(windows))
        decoder.transcription("a", [])
    assert asked == ["fr", "fr", "it", "it"]


def test_labels_begin_with_the_prompt_of_language_and_task_and_a_space(folder):
    saved = load(folder)
    batch, options = asked(saved)
    tags = "<|de|><|translate|>" if options else ""
    assert saved.tokenizer.decode(batch.labels[0]) == f"{tags}<|notimestamps|> eins zwei<|endoftext|>"
    assert saved.tokenizer.decode(batch.prompts[0]) == f"<|startoftranscript|>{tags}<|notimestamps|>"
    assert batch.text_labels[0].tolist() == [*saved.tokenizer(" eins zwei", add_special_tokens=False).input_ids, 256]
    japanese = collator_of(saved)(utterances("en", "transcribe", "一"))
    assert saved.tokenizer.decode(japanese.text_labels[0], skip_special_tokens=True) == "一"


@pytest.mark.parametrize("name", ["german", "German", "de", "<|de|>"])
def test_the_language_of_a_generation_config_is_named_as_transformers_takes_it(tmp_path, name):
    folder = whisper_folder(tmp_path)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "language": name}))
    saved, stock = load(folder), WhisperForConditionalGeneration.from_pretrained(folder)
    features = saved.feature_extractor(AUDIO, sampling_rate=RATE, return_tensors="pt").input_features
    begun = stock.generate(features, max_new_tokens=1, return_dict_in_generate=True, force_unique_generate_call=True)
    assert saved.tags.of(None, "transcribe") == begun.sequences[0, 1:4].tolist()


def test_languages_that_the_checkpoint_lacks_are_refused(folder):
    saved = load(folder)
    known, lack = ("de, en", "it") if saved.tags.languages else ("en", "de")
    assert refused(saved.transcription, AUDIO[0], sampling_rate=RATE, language=lack) == (
        f"1 problem:\n\n  data.language = '{lack}'\n    the checkpoint has no language '{lack}'\n"
        f"    write data.language=ONE_OF {known}"
    )
    if saved.tags.languages:
        message = refused(collator_of(saved), utterances(None))
        assert "the checkpoint has several languages, and none is chosen for the text" in message


def test_a_saved_model_is_a_stock_folder_with_its_generation_config_and_its_learnt_language(folder, tmp_path):
    saved = to_finetune(str(folder), {"dropout": 0.1}, None)
    assert saved.model.training and saved.model.encoder.config.dropout == saved.model.decoder.config.dropout == 0.1
    if saved.tags.languages:
        saved.learn_tags({("de", "translate")})
    with torch.no_grad():
        saved.model.decoder.get_input_embeddings().weight[5] += 1.0
    saved.model.config.training_normalizer = {"name": "lowercase", "version": "1"}
    saved.save(tmp_path, {"num_beams": 1})
    stock, report = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert type(stock) is WhisperForConditionalGeneration and not any(report.values())
    before, after = (json.loads((each / "generation_config.json").read_text()) for each in (folder, tmp_path))
    added = {"language": "de", "task": "translate"} if saved.tags.languages else {}
    assert {key: value for key, value in after.items() if key in before | added} == before | added
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "WhisperProcessor"
    again = load(tmp_path)
    assert again.training_normalizer == {"name": "lowercase", "version": "1"}
    assert torch.equal(
        again.model.decoder.get_input_embeddings().weight, saved.model.decoder.get_input_embeddings().weight
    )
    recognize = pipeline("automatic-speech-recognition", str(tmp_path), device="cpu")
    text = recognize(AUDIO[0], generate_kwargs={"max_new_tokens": 12})["text"]
    assert text.strip() == again.transcribe(AUDIO[0], sampling_rate=RATE, max_new_tokens=12)


def test_a_recording_is_cut_into_windows_of_what_the_encoder_hears(folder):
    saved = load(folder)
    audio = np.tile(AUDIO[1], 5)
    language = "de" if saved.tags.languages else None
    found = saved.transcription(audio, sampling_rate=RATE, language=language, max_new_tokens=3, window=20)
    assert len(found.segments) > 1 and max(each.end - each.start for each in found.segments) <= SECONDS


def test_an_utterance_takes_the_seconds_in_a_batch_that_the_encoder_hears(folder, monkeypatch, caplog):
    saved, data = load(folder), SimpleNamespace(bounds=Bounds(3 * SECONDS), corpus=None)
    connect(data, saved, [])
    assert len(DurationBatches([0.5] * 7, data.bounds, shuffle=False)) == 3
    assert f"a batch holds only one; write data.batch_seconds={8 * SECONDS} for 8" in said(
        caplog, Bounds(7, shortest_seconds=SECONDS)
    )
    assert not said(caplog, data.bounds)
    sizes = []
    decoder = RecordingDecoder(saved, DecodingOptions(), bounds=Bounds(3 * SECONDS))
    found = Hypotheses([[5]], texts=("five",))
    monkeypatch.setattr(
        RecordingDecoder, "decode", lambda self, windows: sizes.append(len(windows)) or [found] * len(windows)
    )
    decoder.add_texts([(Recording(decoder, "a", []), Window(0, AUDIO[0]))] * 7)
    assert sorted(sizes) == [1, 3, 3]


def said(caplog, bounds):
    caplog.clear()
    warn_of_single_utterances(bounds)
    return caplog.text


def test_a_ctc_head_lies_beside_the_stock_model(folder, tmp_path):
    saved = to_finetune(str(folder), {}, None)
    saved.model.add_ctc_head(len(saved.tokenizer))
    saved.save(tmp_path, {})
    assert torch.equal(load(tmp_path).model.ctc_head.weight, saved.model.ctc_head.weight)
    assert not any(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)[1].values())


@pytest.mark.parametrize("name", ["whisper", "speech_to_text", "moonshine", "seamless_m4t", "seamless_m4t_v2"])
def test_every_family_has_the_logits_of_transformers_and_gives_back_its_weights(name, tmp_path):
    encoder, decoder = (option_file(group, name) for group in ("encoder", "decoder"))
    assert [encoder[size] for size in ("base", "large")] == [decoder[size] for size in ("base", "large")]
    special = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = CONFIG_MAPPING[encoder["model_type"]](**{**encoder["tiny"], **decoder["tiny"], **special})
    stock = MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING[type(config)](config).eval()
    stock.save_pretrained(tmp_path / "stock")
    model, report = WholeSpeechModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    width = getattr(config, "input_feat_per_channel", getattr(config, "feature_projection_input_dim", 0))
    shape = {"whisper": (1, 80, 3000), "moonshine": (1, 8000)}.get(name, (1, 64, width))
    given = {stock.main_input_name: torch.randn(shape), "decoder_input_ids": torch.tensor([[1, 5, 6, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, stock(**given).logits, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    again, report = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(again) is type(stock) and not any(report.values())
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in stock.state_dict().items())


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_the_model_of_transformers_alone_padded_cached_and_trained(name, tmp_path):
    stock = other_whole(name)
    stock.save_pretrained(tmp_path / "stock")
    model, report = WholeSpeechModel.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values())
    inputs = torch.randn(2, 120, 16) if stock.main_input_name == "input_features" else torch.randn(2, 8_000)
    mask, ids = torch.ones(inputs.shape[:2], dtype=torch.long), torch.tensor([[2, 5, 6, 7, 9, 9]] * 2)
    length = inputs.shape[1] * 5 // 8
    cut, noisy = mask.clone(), inputs.clone()
    cut[1, length:], noisy[1, length:] = 0, 1_000.0
    with torch.no_grad():
        logits = model(inputs, attention_mask=mask, decoder_input_ids=ids).logits
        expected = stock(inputs.clone(), attention_mask=mask, decoder_input_ids=ids).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        alone = model(inputs[1:, :length], decoder_input_ids=ids[1:]).logits[0]
        padded = model(noisy, attention_mask=cut, decoder_input_ids=ids).logits[1]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)
    options = {"attention_mask": mask, "max_new_tokens": 8}
    written = model.generate(inputs, **options)
    assert torch.equal(written, stock.generate(inputs.clone(), **options))
    assert torch.equal(written, model.generate(inputs, use_cache=False, **options))
    assert torch.equal(
        model.generate(inputs, num_beams=3, **options), stock.generate(inputs.clone(), num_beams=3, **options)
    )
    model.save_pretrained(tmp_path / "saved")
    again, report = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(again) is type(stock) and not any(report.values())
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in stock.state_dict().items())
    model.train()(inputs, attention_mask=cut, labels=ids).loss.backward()
    assert [key for key, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []


def test_weights_that_a_file_lacks_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.decoder.layers.0.encoder_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    message = refused(load, tmp_path)
    assert "its weights are incomplete: it lacks 1 of " in message
    assert "such as decoder.decoder.layers.0.encoder_attn.q_proj.weight" in message


def test_a_folder_of_flax_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    stock = WhisperForConditionalGeneration.from_pretrained(folder)
    (tmp_path / FILE).write_bytes(msgpack.packb(flax_tree(stock)))
    saved = load(tmp_path)
    batch, _ = asked(saved)
    with torch.no_grad():
        logits = saved.model(batch.inputs, attention_mask=batch.attention_mask, labels=batch.labels).logits
        torch.testing.assert_close(logits, stock(batch.inputs, labels=batch.labels.clone()).logits, atol=1e-5, rtol=0)
    assert saved.model.generation_config.to_dict() == stock.generation_config.to_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [("lang_to_id", ["<|en|>"]), ("lang_to_id", {"<|en|>": "258"}), ("task_to_id", {"transcribe": 261}),
     ("task_to_id", None), ("no_timestamps_token_id", 9_999), ("no_timestamps_token_id", {"a": 1}),
     ("text_decoder_lang_to_code_id", ["deu"]), ("text_decoder_lang_to_code_id", {"deu": 9_999}), ("language", ["de"])],
)  # fmt: skip
def test_a_generation_config_that_describes_no_prompt_is_refused(name, value, tmp_path):
    whisper_folder(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    message = refused(load, tmp_path)
    wrong = f"{name}={value}, which {'is no text' if name == 'language' else 'names no tokens of the model'}"
    wrong = wrong if value else "lang_to_id without task_to_id"
    assert f"    its generation_config.json has {wrong}\n" in message
    assert message.endswith("write checkpoint=FOLDER with the generation_config.json of the published model")


@pytest.mark.parametrize(
    ("name", "value"), [("suppress_tokens", "x"), ("begin_suppress_tokens", 5), ("bad_words_ids", 1)]
)
def test_saved_settings_that_are_none_are_refused_when_a_text_is_searched(folder, name, value):
    saved = load(folder)
    setattr(saved.model.generation_config, name, value)
    message = refused(decode_batch, saved.model, saved.tokenizer, asked(saved)[0], DecodingOptions(max_new_tokens=2))
    assert "    the settings of its generation_config.json gave: " in message


def test_a_start_of_texts_that_is_no_token_is_refused(folder):
    saved = load(folder)
    for start in ([[1]], {"a": 1}, "x"):
        saved.model.generation_config.decoder_start_token_id = start
        message = refused(refuse_misdescribed, "FOLDER", saved.model)
        assert f"    its files name {str(start)!r} as the token that starts a text\n" in message


def test_matrices_of_lora_lie_beside_the_old_weights(folder, tmp_path):
    saved = to_finetune(str(folder), {}, None)
    LoRA(targets=["encoder", "decoder"], merge=False).prepare(saved.model)
    for name, weight in saved.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    saved.save(tmp_path, {})
    batch, again = asked(saved)[0], load(tmp_path)
    logits = [
        each.model.eval()(batch.inputs, batch.attention_mask, labels=batch.labels).logits for each in (saved, again)
    ]
    torch.testing.assert_close(*logits)
    stock = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    old = WhisperForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(weight, old[key]) for key, weight in stock.state_dict().items())


# --- commands


@pytest.mark.parametrize(
    ("overrides", "checkpoint"),
    [
        ("checkpoint=X", "X"),
        ("encoder=whisper decoder=whisper size=base", "openai/whisper-base"),
        ("encoder=whisper encoder.checkpoint=X decoder=whisper decoder.checkpoint=X", "X"),
        ("encoder=whisper encoder.checkpoint=X decoder=whisper decoder.checkpoint=Y", None),
        ("encoder=whisper decoder=whisper size=base adapter=conv", None),
        ("encoder=whisper decoder=whisper size=base pretrained=false", None),
        ("encoder=whisper decoder=whisper", None),
        ("encoder=whisper decoder=bert size=base", None),
    ],
)
def test_both_parts_of_one_checkpoint_are_one_model(overrides, checkpoint):
    assert whole_checkpoint(composed(overrides)) == checkpoint


def composed(overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides.split())


@pytest.mark.parametrize("option", ["adapter=conv", "pretrained=false"])
def test_what_a_whole_checkpoint_cannot_have_is_refused(option):
    message = refused(whole_checkpoint, composed(f"checkpoint=X {option}"))
    remedy = {"adapter=conv": "adapter=linear", "pretrained=false": "pretrained=true"}[option]
    apart = "encoder=OPTION decoder=OPTION encoder.checkpoint=X decoder.checkpoint=X to join its parts"
    assert message.endswith(f"\n    write {remedy}, or {apart}")


@pytest.mark.parametrize("option", ["encoder.checkpoint=Y", "decoder.checkpoint=Y", "decoder.prompt=Y"])
def test_what_a_whole_checkpoint_would_not_read_is_refused(option):
    name = option.partition("=")[0]
    message = refused(whole_checkpoint, composed(f"checkpoint=X {option}"))
    apart = (
        "encoder=OPTION decoder=OPTION encoder.checkpoint=X decoder.checkpoint=X to join its parts, without checkpoint"
    )
    assert message.endswith(
        f"{name} = 'Y'\n    checkpoint=X is one model of encoder, decoder and prompt\n    write {name}=null, or {apart}"
    )


def test_a_run_with_averaged_weights_is_scored_alike_from_its_folder(train, sedtrain, tmp_path):
    folder = whisper_folder(tmp_path / "stock")
    run = train(tmp_path / "run", f"checkpoint={folder}", "data.language=en", "callbacks=[default,ema]", steps=2)
    stock = WhisperForConditionalGeneration.from_pretrained(run / "model")
    assert (stock.generation_config.language, stock.generation_config.task) == ("en", "transcribe")
    assert "AutoModelForSpeechSeq2Seq.from_pretrained(folder)" in (run / "model/README.md").read_text()
    ended = sedtrain(
        "task=evaluate", f"checkpoint={run}", f"run_dir={tmp_path / 'again'}", "decoding.max_new_tokens=12"
    )
    assert ended.status == 0, ended.err
    first, again = (json.loads((each / "results.json").read_text()) for each in (run, tmp_path / "again"))
    assert first["metrics"] == again["metrics"]
    assert json.loads((run / "model/config.json").read_text())["training_normalizer"]["name"] == "none"


def test_ctranslate2_converts_the_folder_and_writes_the_same_text(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    saved = to_finetune(str(whisper_folder(tmp_path / "stock", num_mel_bins=80)), {}, None)
    saved.save(tmp_path / "model", {})
    ctranslate2.converters.TransformersConverter(str(tmp_path / "model")).convert(str(tmp_path / "converted"))
    saved.model.eval()
    batch = collator_of(saved)(utterances())
    ours = decode_batch(saved.model, saved.tokenizer, batch, DecodingOptions(max_new_tokens=9))
    whisper = ctranslate2.models.Whisper(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    features = ctranslate2.StorageView.from_array(np.ascontiguousarray(batch.inputs))
    theirs = whisper.generate(features, batch.prompts.tolist(), beam_size=1, max_length=40)
    assert [each.ids[0] for each in ours] == [each.sequences_ids[0][:9] for each in theirs]
