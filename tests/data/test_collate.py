from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from sedtrain.batch import IGNORE_INDEX, Skipped, Utterance
from sedtrain.data.collate import Collator
from sedtrain.text.tags import Tags
from sedtrain.text.tokenizers import train_tokenizer

RATE = 16_000
TEXTS = ["one two three", "nine", "four four"]
EXTRACTORS = {
    "hubert": Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True),
    "as_it_is": Wav2Vec2FeatureExtractor(do_normalize=False),
    "w2v_bert": SeamlessM4TFeatureExtractor(feature_size=80),
    "speech_to_text": Speech2TextFeatureExtractor(feature_size=80, num_mel_bins=80),
    "whisper": WhisperFeatureExtractor(feature_size=80),
}
TOKENIZER = train_tokenizer(TEXTS, "char", 100)
START, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def utterances(*num_samples, texts=TEXTS, loudness=0.1):
    generator = np.random.default_rng(0)
    audios = [generator.normal(0.02, loudness, length).astype(np.float32) for length in num_samples]
    return [
        Utterance(f"u{i}", torch.from_numpy(audio), RATE, text, None, None, len(audio) / RATE)
        for i, (audio, text) in enumerate(zip(audios, texts, strict=False))
    ]


def upstream(extractor, audio, **options):
    """What the feature extractor itself makes of one utterance: (T,) or (T, F), and how much of it is real."""
    made = extractor(audio.numpy(), sampling_rate=RATE, padding="longest", return_tensors="pt", **options)
    features = made[extractor.model_input_names[0]][0]
    if isinstance(extractor, WhisperFeatureExtractor):
        features = features.T
    length = int(made["attention_mask"].sum()) if "attention_mask" in made else len(features)
    return features[:length], length


# 5000 samples are 29 mel frames, an odd number: w2v-BERT's extractor stacks pairs and masks the half-filled last one.
@pytest.mark.parametrize("family", EXTRACTORS)
def test_features_in_a_batch_are_those_of_the_feature_extractor_for_each_alone(family):
    extractor = EXTRACTORS[family]
    together = utterances(5000, 16_000, 8123)
    batch = Collator(extractor, TOKENIZER, START)(together)
    inputs = batch.inputs.transpose(1, 2) if family == "whisper" else batch.inputs
    for utterance, row, mask in zip(together, inputs, batch.attention_mask, strict=True):
        expected, length = upstream(extractor, utterance.audio)
        torch.testing.assert_close(row[:length], expected, atol=1e-5, rtol=1e-5)
        assert mask.tolist() == [1] * length + [0] * (inputs.shape[1] - length)
        assert not row[length:].any()


@pytest.mark.parametrize("loudness", [1e-6, 0.9])
def test_audio_is_normalized_as_upstream_does_at_any_loudness(loudness):
    together = utterances(5000, 16_000, loudness=loudness)
    batch = Collator(EXTRACTORS["hubert"], TOKENIZER, START)(together)
    for utterance, row in zip(together, batch.inputs, strict=True):
        expected, length = upstream(EXTRACTORS["hubert"], utterance.audio)
        torch.testing.assert_close(row[:length], expected, atol=1e-5, rtol=1e-5)


def test_labels_are_of_the_rewritten_text_and_the_batch_keeps_the_text():
    spoken = utterances(8000, 8000, texts=["ONE", "Nine"])
    rewritten = Collator(EXTRACTORS["hubert"], TOKENIZER, START, str.lower)
    plain = Collator(EXTRACTORS["hubert"], TOKENIZER, START)
    batch = rewritten(spoken)
    assert batch.texts == ["ONE", "Nine"]
    assert batch.labels.tolist() == plain(utterances(8000, 8000, texts=["one", "nine"])).labels.tolist()
    assert rewritten.target("ONE") == plain.target("one") != plain.target("ONE")


def test_silence_stays_finite():
    silence = Utterance("u", torch.zeros(8000), RATE, "nine", None, None, 0.5)
    for extractor in EXTRACTORS.values():
        assert Collator(extractor, TOKENIZER, START)([silence]).inputs.isfinite().all()


def test_whisper_features_have_time_last_and_are_not_cut_or_padded_to_half_a_minute():
    collator = Collator(EXTRACTORS["whisper"], TOKENIZER, START)
    assert collator(utterances(16_000, 8000)).inputs.shape == (2, 80, 100)
    long = utterances(31 * RATE)
    batch = collator(long)
    assert batch.inputs.shape == (1, 80, 3100)
    expected, _ = upstream(EXTRACTORS["whisper"], long[0].audio, truncation=False)
    torch.testing.assert_close(batch.inputs[0].T, expected, atol=1e-5, rtol=1e-5)


def test_labels_are_the_tokens_and_one_end_token_padded_to_be_ignored():
    batch = Collator(EXTRACTORS["hubert"], TOKENIZER, START)(utterances(5000, 6000, 7000))
    for row, text in zip(batch.labels.tolist(), TEXTS, strict=True):
        tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert row == [*tokens, END] + [IGNORE_INDEX] * (len(row) - len(tokens) - 1)
    assert batch.labels.dtype == torch.long


def test_the_end_token_counts_even_where_it_pads():
    vocabulary = {"<|endoftext|>": 0, "one": 1, "two": 2, "three": 3, "nine": 4, "four": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<|endoftext|>"
    gpt2 = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=end, eos_token=end, unk_token=end, pad_token=end)
    batch = Collator(EXTRACTORS["hubert"], gpt2, decoder_start_token_id=0)(utterances(5000, 6000))
    assert batch.labels.tolist() == [[1, 2, 3, 0], [4, 0, IGNORE_INDEX, IGNORE_INDEX]]


def test_a_batch_says_what_is_in_it_and_what_is_not():
    skipped = [Skipped("bad", "undecodable audio", "why")]
    batch = Collator(EXTRACTORS["hubert"], TOKENIZER, START)(utterances(8000, 16_000), skipped)
    assert (len(batch), batch.ids, batch.texts, batch.seconds) == (2, ["u0", "u1"], TEXTS[:2], 1.5)
    assert batch.skipped == skipped
    said = [replace(each, speaker=name) for each, name in zip(utterances(8000, 16_000), ["Ann", None], strict=True)]
    assert Collator(EXTRACTORS["hubert"], TOKENIZER, START)(said).speakers == ["Ann", None]


def test_a_batch_of_nothing_has_length_zero_and_keeps_what_was_skipped():
    skipped = [Skipped("bad", "undecodable audio")]
    batch = Collator(EXTRACTORS["hubert"], TOKENIZER, START)([], skipped)
    assert (len(batch), batch.seconds, batch.skipped) == (0, 0.0, skipped)
    assert len(batch.inputs) == len(batch.attention_mask) == len(batch.labels) == 0
    assert len(batch.to(torch.device("cpu"))) == 0


def test_the_sampling_rate_is_the_feature_extractors():
    assert Collator(Wav2Vec2FeatureExtractor(sampling_rate=8000), TOKENIZER, START).sampling_rate == 8000


@pytest.mark.parametrize("family", sorted(EXTRACTORS))
def test_audio_of_less_than_a_tenth_of_a_second_gets_silence_behind_it(family):
    collator = Collator(EXTRACTORS[family], TOKENIZER, START)
    click = torch.ones(10) / 2
    padded = torch.cat([click, torch.zeros(1590)])
    torch.testing.assert_close(collator.features(click), collator.features(padded))


# --- texts that the decoder cannot hold


def byte_level():
    """A tokenizer of bytes, which writes ligatures out, like those of GPT-2 and RoBERTa."""
    tokenizer = Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template = {
        "single": "<s> $A </s>",
        "special_tokens": [(each, tokenizer.token_to_id(each)) for each in ("<s>", "</s>")],
    }
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES = byte_level()
TAGS = Tags({"transcribe": {"en": [5, 6]}})


@given(
    st.text(max_size=12) | st.text("ab \ufdfa\u00e4", max_size=12), st.integers(1, 450), st.booleans(), st.booleans()
)
@example("\ufdfa" * 12, 12 * 33 + 2, True, False)
@example("\ufdfa" * 12, 12 * 33 + 3, True, False)
def test_a_text_is_too_long_where_it_has_more_labels_than_positions(text, most, in_bytes, tagged):
    tokenizer = BYTES if in_bytes else TOKENIZER
    tags = {"tags": TAGS} if tagged else {}
    collator = Collator(EXTRACTORS["hubert"], tokenizer, tokenizer.bos_token_id, str.lower, **tags)
    number = collator.num_tokens(text)
    reason = (f"text too long for the decoder's {most} positions", f"{number} tokens")
    assert collator.too_long(text, 1.0, most) == (reason if number > most else None)


def test_audio_in_front_of_a_text_takes_positions():
    collator = Collator(EXTRACTORS["hubert"], TOKENIZER, START)
    number, in_front = collator.num_tokens("one two"), lambda seconds: round(50 * seconds)
    assert collator.too_long("one two", 0.5, number + 25, in_front) is None
    reason = f"audio and text too long for the decoder's {number + 24} positions"
    detail = f"{number} tokens behind 25 of 0.50 s"
    assert collator.too_long("one two", 0.5, number + 24, in_front) == (reason, detail)


def test_a_short_text_is_not_tokenized(monkeypatch):
    collator = Collator(EXTRACTORS["hubert"], TOKENIZER, START)
    monkeypatch.setattr(collator, "num_tokens", None)
    assert collator.too_long("one two", 1.0, 15) is None
