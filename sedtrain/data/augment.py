"""Applies a chain of augmentations to the waveform; each depends on (seed, epoch, utterance id, its name) alone.

S samples. Every augmentation has its own random generator. So its result does not depend on workers, ranks, batches,
order or the other augmentations. Nothing clips: if the chain leaves audio louder than full scale, the whole utterance
is scaled down, which keeps every signal-to-noise ratio.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import inf, prod

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from sedtrain.annotations import checked
from sedtrain.batch import Utterance
from sedtrain.errors import UserError
from sedtrain.ranges import Fraction

Samples = NDArray[np.float32]


class Augmentation:
    """A change of the waveform, made with a `probability`. Subclass it to add your own.

    longest: largest factor by which it lengthens an utterance
    """

    longest = 1.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            setattr(cls, "__init__", checked("")(cls.__init__))  # noqa: B010 - mypy allows no other way

    def __init__(self, probability: Fraction = 1.0) -> None:
        self.probability = probability

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        """New (S,) samples at the same rate. Must draw from `random` only and must not change `audio`."""
        raise NotImplementedError


class Augment:
    """Applies named augmentations in order, each with its probability. For training only.

    max_seconds: skips an augmentation that would make the utterance longer than this
    longest:     largest factor by which the chain lengthens an utterance
    """

    def __init__(self, augmentations: Mapping[str, Augmentation], seed: int, max_seconds: float = inf) -> None:
        self.augmentations, self.seed, self.max_seconds = dict(augmentations), seed, max_seconds
        self.longest = prod(augmentation.longest for augmentation in augmentations.values())

    def __call__(self, utterance: Utterance, epoch: int) -> Utterance:
        """A copy of the utterance as it sounds in this epoch, with its new length in `seconds`."""
        original: Samples = utterance.audio.numpy()
        audio, rate = original, utterance.sampling_rate
        for name, augmentation in self.augmentations.items():
            random = generator(self.seed, epoch, utterance.id, name)
            if random.random() < augmentation.probability:
                changed = augmentation(audio, rate, random)
                audio = changed if len(changed) <= max(self.max_seconds * rate, len(audio)) else audio
        if audio is original:
            return utterance
        audio = np.ascontiguousarray(audio / max(1.0, float(np.abs(audio).max())), dtype=np.float32)
        return replace(utterance, audio=torch.from_numpy(audio), seconds=len(audio) / rate)


def generator(seed: int, epoch: int, id: str, name: str) -> Generator:
    """The random generator of one augmentation for one utterance in one epoch."""
    key = ascii((seed, epoch, id, name)).encode()  # different tuples have different texts
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))


@contextmanager
def options_of(path: str) -> Iterator[None]:
    """Completes the option in a UserError with the path of its augmentation, which the augmentation does not know."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}.{error.option}", error.value, error.wrong, error.write) from error
