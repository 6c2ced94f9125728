"""Whole speech models: what `transformers` computes before training, its folders after it, and its prompts."""

import json

import numpy as np
import pytest
import torch
from corpora import refused
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperForConditionalGeneration, pipeline
from whispers import LANGUAGES, SECONDS, whisper_folder

import sedtrain
from sedtrain.batch import Utterance
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import collator_of
from sedtrain.models.saved import to_finetune

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
    saved, stock = sedtrain.load(folder), WhisperForConditionalGeneration.from_pretrained(folder)
    batch, _ = asked(saved)
    features = saved.feature_extractor(AUDIO, sampling_rate=RATE, return_tensors="pt").input_features
    torch.testing.assert_close(batch.inputs, features, atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = saved.model(features, attention_mask=batch.attention_mask, labels=batch.labels).logits
        torch.testing.assert_close(logits, stock(features, labels=batch.labels.clone()).logits, atol=1e-5, rtol=0)


def test_texts_are_those_of_transformers(folder):
    saved, stock = sedtrain.load(folder), WhisperForConditionalGeneration.from_pretrained(folder)
    batch, options = asked(saved)
    found = decode_batch(saved.model, saved.tokenizer, batch, DecodingOptions(max_new_tokens=12))
    written = stock.generate(batch.inputs, max_new_tokens=12, **options)
    assert [list(each.texts) for each in found] == [
        [text.strip()] for text in saved.tokenizer.batch_decode(written, skip_special_tokens=True)
    ]
    assert any(each.ids[0] for each in found)


def test_labels_begin_with_the_prompt_of_language_and_task_and_a_space(folder):
    saved = sedtrain.load(folder)
    batch, options = asked(saved)
    tags = "<|de|><|translate|>" if options else ""
    assert saved.tokenizer.decode(batch.labels[0]) == f"{tags}<|notimestamps|> eins zwei<|endoftext|>"
    assert saved.tokenizer.decode(batch.prompts[0]) == f"<|startoftranscript|>{tags}<|notimestamps|>"
    assert batch.text_labels[0].tolist() == [*saved.tokenizer(" eins zwei", add_special_tokens=False).input_ids, 256]
    japanese = collator_of(saved)(utterances("en", "transcribe", "一"))
    assert saved.tokenizer.decode(japanese.text_labels[0], skip_special_tokens=True) == "一"


def test_languages_that_the_checkpoint_lacks_are_refused(folder):
    saved = sedtrain.load(folder)
    known, lack = ("de, en", "it") if saved.tags.languages else ("en", "de")
    assert refused(saved.transcription, AUDIO[0], sampling_rate=RATE, language=lack) == (
        f"1 problem:\n\n  data.language = '{lack}'\n    the checkpoint has no language '{lack}'\n"
        f"    write data.language=ONE_OF {known}"
    )
    if saved.tags.languages:
        message = refused(saved.transcription, AUDIO[0], sampling_rate=RATE)
        assert "the checkpoint has several languages, and nothing names that of the text" in message


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
    again = sedtrain.load(tmp_path)
    assert again.training_normalizer == {"name": "lowercase", "version": "1"}
    assert torch.equal(
        again.model.decoder.get_input_embeddings().weight, saved.model.decoder.get_input_embeddings().weight
    )
    recognize = pipeline("automatic-speech-recognition", str(tmp_path), device="cpu")
    text = recognize(AUDIO[0], generate_kwargs={"max_new_tokens": 12})["text"]
    assert text.strip() == again.transcribe(AUDIO[0], sampling_rate=RATE, max_new_tokens=12)


def test_a_recording_is_cut_into_windows_of_what_the_encoder_hears(folder):
    saved = sedtrain.load(folder)
    audio = np.tile(AUDIO[1], 5)
    language = "de" if saved.tags.languages else None
    found = saved.transcription(audio, sampling_rate=RATE, language=language, max_new_tokens=3, window=20)
    assert len(found.segments) > 1 and max(each.end - each.start for each in found.segments) <= SECONDS


def test_a_ctc_head_lies_beside_the_stock_model(folder, tmp_path):
    saved = to_finetune(str(folder), {}, None)
    saved.model.add_ctc_head(len(saved.tokenizer))
    saved.save(tmp_path, {})
    assert torch.equal(sedtrain.load(tmp_path).model.ctc_head.weight, saved.model.ctc_head.weight)
    assert not any(AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)[1].values())


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
    theirs = whisper.generate(features, batch.prompts.tolist(), beam_size=1, max_length=batch.prompts.shape[1] + 9)
    assert [each.ids[0] for each in ours] == [each.sequences_ids[0] for each in theirs]
