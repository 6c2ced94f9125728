"""A chain of changes to the waveform, each drawn from (seed, epoch, id of the utterance, name of the augmentation) alone.

S samples. Every augmentation has a random generator of its own, so neither workers, ranks, batches and order nor the
other augmentations of the chain change what it does. No augmentation clips: audio that the chain leaves louder than
full scale is scaled down to it as a whole, which keeps every ratio of signal to noise.
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
    """A change of the waveform that is made with a `probability`; one of your own is a subclass.

    longest: the factor by which it lengthens an utterance at most
    """

    longest = 1.0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            setattr(cls, "__init__", checked("")(cls.__init__))  # noqa: B010 - mypy allows no other way

    def __init__(self, probability: Fraction = 1.0) -> None:
        self.probability = probability

    def __call__(self, audio: Samples, sampling_rate: int, random: Generator) -> Samples:
        """Other (S,) samples at the same rate; draws from `random` alone and leaves `audio` as it is."""
        raise NotImplementedError


class Augment:
    """Applies augmentations in their order, by name, each with its probability; meant for training alone.

    max_seconds: an augmentation that would make an utterance longer is left out for it
    longest:     the factor by which the chain lengthens an utterance at most
    """

    def __init__(self, augmentations: Mapping[str, Augmentation], seed: int, max_seconds: float = inf) -> None:
        self.augmentations, self.seed, self.max_seconds = dict(augmentations), seed, max_seconds
        self.longest = prod(augmentation.longest for augmentation in augmentations.values())

    def __call__(self, utterance: Utterance, epoch: int) -> Utterance:
        """The utterance as it sounds in this epoch, with its new length in `seconds`; the given one stays as it is."""
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
    """The random numbers of one augmentation for one utterance in one epoch."""
    key = ascii((seed, epoch, id, name)).encode()  # no two such tuples are written alike
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big"))


@contextmanager
def options_of(path: str) -> Iterator[None]:
    """Puts the path of an augmentation, which it does not know itself, before the options that it refuses."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}.{error.option}", error.value, error.wrong, error.write) from error
