import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Speech2TextFeatureExtractor,
    SpeechT5FeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from sedtrain.data.features import features_of, through_extractor

RATE = 16_000
EXTRACTORS = {
    "wav2vec2": Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True),
    "wav2vec2_base": Wav2Vec2FeatureExtractor(do_normalize=True),
    "moonshine": Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True),
    "speecht5": SpeechT5FeatureExtractor(do_normalize=False),
    "speecht5_normalized": SpeechT5FeatureExtractor(do_normalize=True),
    "whisper": WhisperFeatureExtractor(feature_size=80),
    "whisper_large_v3": WhisperFeatureExtractor(feature_size=128),
    "whisper_other_frames": WhisperFeatureExtractor(feature_size=40, n_fft=512, hop_length=128),
    "seamless_m4t": SeamlessM4TFeatureExtractor(),
    "seamless_m4t_8k": SeamlessM4TFeatureExtractor(feature_size=40, num_mel_bins=40, sampling_rate=8000),
    "speech_to_text": Speech2TextFeatureExtractor(),
    "speech_to_text_means": Speech2TextFeatureExtractor(normalize_vars=False),
    "speech_to_text_plain": Speech2TextFeatureExtractor(do_ceptral_normalize=False),
    "parakeet": ParakeetFeatureExtractor(),
    "parakeet_ctc": ParakeetFeatureExtractor(feature_size=128, preemphasis=None),
}
SHAPES = {
    "noise": lambda noise, time: noise,
    "16 bits": lambda noise, time: np.round(noise * 2**15) / 2**15,
    "speech and silence": lambda noise, time: np.where(time % 1 < 0.3, noise, 0),
    "an offset": lambda noise, time: noise + 5 * np.abs(noise).max(),
    "a chirp in noise": lambda noise, time: np.sin(2000 * time**2) + 0.1 * noise,
    "a click": lambda noise, time: np.where(time == time[len(time) // 3], 0.9, 0),
    "an end that hums": lambda noise, time: np.where(time > 0.2, np.abs(noise).max() * np.sin(600 * time), noise),
}


@st.composite
def recordings(draw):
    """(S,) of a tenth of a second or more, from 120 dB below full scale to full scale."""
    num_samples = draw(st.integers(1600, 30_000))
    noise = np.random.default_rng(draw(st.integers(0, 99))).normal(size=num_samples)
    shape = SHAPES[draw(st.sampled_from(sorted(SHAPES)))]
    samples = shape(noise * 10 ** draw(st.floats(-6, -0.5)), np.arange(num_samples) / RATE)
    return torch.from_numpy(samples.clip(-1, 1).astype(np.float32))


def upstream(extractor, audio):
    """By the documented call for one utterance, and what of it is real; where that is no number, zero."""
    options = {"truncation": False} if isinstance(extractor, WhisperFeatureExtractor) else {}
    with np.errstate(invalid="ignore", divide="ignore"):
        made = extractor(
            audio.numpy(), sampling_rate=extractor.sampling_rate, padding="longest", return_tensors="pt", **options
        )
    features = made[extractor.model_input_names[0]][0]
    features = features.T if options else features
    real = made["attention_mask"].sum() if "attention_mask" in made else len(features)
    return features[:real].nan_to_num(nan=0, posinf=0, neginf=0)


@pytest.mark.parametrize("family", EXTRACTORS)
@given(audio=recordings())
def test_features_are_upstreams_within_1e_5(family, audio):
    before = audio.clone()
    made = features_of(EXTRACTORS[family], audio)
    torch.testing.assert_close(made, upstream(EXTRACTORS[family], audio), atol=1e-5, rtol=1e-5)
    assert torch.equal(audio, before)


@pytest.mark.parametrize("family", EXTRACTORS)
@pytest.mark.parametrize("num_samples", [1600, 1601, 1759, 1760, 31 * RATE])
def test_silence_and_the_shortest_and_long_audio_have_upstreams_features(family, num_samples):
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32))
    for audio in (torch.zeros(num_samples), noise):
        made = features_of(EXTRACTORS[family], audio)
        torch.testing.assert_close(made, upstream(EXTRACTORS[family], audio), atol=1e-5, rtol=1e-5)
        assert made.isfinite().all()


@pytest.mark.parametrize("family", ["seamless_m4t", "speech_to_text", "parakeet"])
def test_bands_that_change_by_little_more_than_rounding_come_out_alike(family):
    """Divided by their deviation they are far from zero: a spectrum rounded otherwise moves those of the tone by 8."""
    tone = np.sin(0.3 * np.arange(RATE))
    rustle = np.random.default_rng(0).normal(0, 1e-5, RATE)
    for samples in (tone, rustle):
        audio = torch.from_numpy(samples.astype(np.float32))
        made = features_of(EXTRACTORS[family], audio)
        torch.testing.assert_close(made, upstream(EXTRACTORS[family], audio), atol=1e-4, rtol=1e-5)


# --- what is left to the extractor itself


class Halved(WhisperFeatureExtractor):
    def __call__(self, *args, **options):
        made = super().__call__(*args, **options)
        return {name: values / 2 for name, values in made.items()}


def test_a_subclass_is_asked_itself():
    audio = torch.randn(8000, generator=torch.manual_seed(0))
    whole = features_of(WhisperFeatureExtractor(), audio)
    torch.testing.assert_close(features_of(Halved(), audio), whole / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [WhisperFeatureExtractor, Speech2TextFeatureExtractor])
def test_an_extractor_that_dithers_still_does(kind):
    audio = torch.zeros(8000)
    made = [features_of(kind(dither=dither), audio) for dither in (0.0, 0.5, 0.5)]
    assert made[0].std() == 0
    assert made[1].std() > 0
    assert not torch.equal(made[1], made[2])


def test_frames_in_threes_are_stacked_upstream():
    extractor = SeamlessM4TFeatureExtractor(stride=3)
    audio = torch.randn(8000, generator=torch.manual_seed(0))
    assert features_of(extractor, audio).shape == (16, 240)
    assert torch.equal(features_of(extractor, audio), through_extractor(extractor, audio))


def test_an_extractor_with_torchaudio_instead_of_filters_is_asked_itself(monkeypatch):
    extractor = Speech2TextFeatureExtractor(do_ceptral_normalize=False)
    del extractor.mel_filters
    monkeypatch.setattr(extractor, "_extract_fbank_features", lambda audio: np.full((5, 80), 2.0, np.float32))
    assert torch.equal(features_of(extractor, torch.zeros(1600)), torch.full((5, 80), 2.0))
