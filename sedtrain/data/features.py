"""Computes the features of the extractors of `transformers` for one utterance, at a fraction of their cost.

S samples, T frames, F features. Windows, mel filters, floors and the precision of each step equal the extractor's.
So the features agree even for an almost silent recording, where normalisation magnifies rounding errors.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ParakeetFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Speech2TextFeatureExtractor,
    SpeechT5FeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)
from transformers.models.parakeet.feature_extraction_parakeet import EPSILON, LOG_ZERO_GUARD_VALUE

Extractor = Any  # upstream's are untyped

KALDI_FRAME, KALDI_HOP, KALDI_FFT = 400, 160, 512  # samples
KALDI_PREEMPHASIS = 0.97
KALDI_FLOOR = 1.192092955078125e-07
NUM_GROUPS = 4  # of mel filters; lower filters use only few bins of the spectrum
FRAMES_IN_CACHE = 200  # of 4 kB each, several copies at once


def features_of(extractor: Extractor, audio: Tensor) -> Tensor:
    """(S,) audio -> (S,) or (T, F) features, time first, without padding or truncation; NaN and infinity become 0."""
    fast = FAST.get(type(extractor))
    return fast(extractor, audio) if fast and is_plain(extractor) else through_extractor(extractor, audio)


def is_plain(extractor: Extractor) -> bool:
    """True for an extractor without dither and without torchaudio that stacks frames in pairs or not at all."""
    has_filters = hasattr(extractor, "mel_filters") or not isinstance(extractor, Speech2TextFeatureExtractor)
    return not getattr(extractor, "dither", 0.0) and getattr(extractor, "stride", 2) == 2 and has_filters


def through_extractor(extractor: Extractor, audio: Tensor) -> Tensor:
    """The features that the extractor itself computes; used for subclasses and for extractors not in FAST."""
    no_limit = {"truncation": False} if isinstance(extractor, WhisperFeatureExtractor) else {}
    with np.errstate(divide="ignore", invalid="ignore"):
        made = extractor(
            audio.numpy(), sampling_rate=extractor.sampling_rate, padding="longest", return_tensors="np", **no_limit
        )
    features = finite(torch.from_numpy(made[extractor.model_input_names[0]][0]))
    if no_limit:
        return features.T
    # SeamlessM4TFeatureExtractor stacks frames in pairs and masks the last one where its pair is padding.
    return features[: made["attention_mask"][0].sum()] if "attention_mask" in made else features


def samples(extractor: Extractor, audio: Tensor) -> Tensor:
    """The audio, with mean 0 and variance 1 if the extractor normalizes."""
    if not extractor.do_normalize:
        return audio
    centred = audio - audio.mean()
    return centred.mul_(torch.rsqrt(centred.dot(centred) / len(centred) + 1e-7))


def whisper(extractor: Extractor, audio: Tensor) -> Tensor:
    """Decibels, at most 80 below the loudest, scaled to about -1..1; without the last frame, as upstream."""
    window = torch.hann_window(extractor.n_fft)
    spectrum = torch.stft(audio, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)[:, :-1]
    mels = torch.from_numpy(extractor.mel_filters).float().T @ power(spectrum)
    decades = mels.clamp_(min=1e-10).log10_()
    return decades.clamp_(min=float(decades.max()) - 8.0).add_(4.0).div_(4.0).T


def parakeet(extractor: Extractor, audio: Tensor) -> Tensor:
    """Each feature has mean 0 and deviation 1 over the utterance. Upstream treats the last frame as padding.

    Bands that hardly change consist mostly of rounding errors, so every sum keeps upstream's order.
    """
    spectrum = torch.stft(
        torch.cat([audio[:1], audio[1:] - (extractor.preemphasis or 0.0) * audio[:-1]]),
        extractor.n_fft,
        extractor.hop_length,
        extractor.win_length,
        torch.hann_window(extractor.win_length, periodic=False),
        pad_mode="constant",
        return_complex=True,
    )
    mels: Tensor = extractor.mel_filters @ power(spectrum).sqrt_().square_().contiguous()
    logs = mels.add_(LOG_ZERO_GUARD_VALUE).log_()
    num_frames = len(audio) // extractor.hop_length
    logs[:, num_frames:] = 0.0
    centred = logs.sub_(logs.sum(1, keepdim=True) / num_frames)
    centred[:, num_frames:] = 0.0
    variance = centred.square().sum(1, keepdim=True) / (num_frames - 1)
    return centred.div_(variance.sqrt_().add_(EPSILON))[:, :num_frames].T


def speech_to_text(extractor: Extractor, audio: Tensor) -> Tensor:
    """Each feature has mean 0 and deviation 1 over the utterance; silence, which has deviation 0, becomes 0."""
    features = kaldi_mels(extractor, audio).contiguous().numpy()
    if extractor.do_ceptral_normalize:
        with np.errstate(divide="ignore", invalid="ignore"):
            (features,) = extractor.normalize([features])
    return finite(torch.from_numpy(features))


def pairs_of_mels(extractor: Extractor, audio: Tensor) -> Tensor:
    """Each feature has mean 0 and variance 1 over the utterance; frames are stacked in pairs, an odd last one is dropped."""
    logs = kaldi_mels(extractor, audio).numpy()
    centred = logs - logs.mean(0)
    centred /= np.sqrt(np.square(centred).sum(0) / (len(logs) - 1) + 1e-7)
    num_pairs = len(logs) // 2
    return torch.from_numpy(centred[: 2 * num_pairs].reshape(num_pairs, -1))


# --- spectra


def power(spectrum: Tensor) -> Tensor:
    return spectrum.real.square().add_(spectrum.imag.square())


def kaldi_mels(extractor: Extractor, audio: Tensor) -> Tensor:
    """(S,) -> (T, F): logarithms of Kaldi's mel bands, in double precision; the spectrum is rounded to single.

    Upstream subtracts the mean of each frame, then emphasises the frame. Here the whole signal is emphasised, and the
    emphasised mean is subtracted from each frame. Only the first sample of a frame differs; its window weight is 0.
    """
    signal = audio.double() * 2**15
    emphasised = signal.clone()
    emphasised[1:].sub_(signal[:-1], alpha=KALDI_PREEMPHASIS)
    frames, plain = (samples.unfold(0, KALDI_FRAME, KALDI_HOP) for samples in (emphasised, signal))
    offsets = (1 - KALDI_PREEMPHASIS) * plain.mean(1, keepdim=True)
    window, bands = torch.from_numpy(extractor.window), bands_of(extractor)
    padded = torch.zeros(FRAMES_IN_CACHE, KALDI_FFT, dtype=torch.double)
    mels = []
    for some, offset in zip(frames.split(FRAMES_IN_CACHE), offsets.split(FRAMES_IN_CACHE), strict=True):
        torch.sub(some, offset, out=padded[: len(some), :KALDI_FRAME]).mul_(window)
        spectrum = torch.fft.rfft(padded[: len(some)]).to(torch.complex64)
        powers = power(spectrum.to(torch.complex128)).T
        mels.append(torch.cat([filters @ powers[bins] for filters, bins in bands]))
    return torch.cat(mels, 1).clamp_(min=KALDI_FLOOR).log_().float().T


@cache
def bands_of(extractor: Extractor) -> list[tuple[Tensor, slice]]:
    """Groups of neighbouring mel filters, each group with the bins of the spectrum that it uses."""
    groups = []
    for filters in torch.from_numpy(extractor.mel_filters).T.chunk(NUM_GROUPS):
        used = filters.any(0).nonzero().flatten().tolist() or [0]
        bins = slice(used[0], used[-1] + 1)
        groups.append((filters[:, bins].contiguous(), bins))
    return groups


def finite(features: Tensor) -> Tensor:
    return features.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


FAST: dict[type, Callable[[Extractor, Tensor], Tensor]] = {
    ParakeetFeatureExtractor: parakeet,
    SeamlessM4TFeatureExtractor: pairs_of_mels,
    Speech2TextFeatureExtractor: speech_to_text,
    SpeechT5FeatureExtractor: samples,
    Wav2Vec2FeatureExtractor: samples,
    WhisperFeatureExtractor: whisper,
}
"""Fast functions by exact class of extractor; subclasses may compute something else."""
