"""The collator of a saved model, and the longest audio that the model takes."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import torch

from sedtrain.data.collate import Collator
from sedtrain.data.sampler import SHORTEST_SECONDS
from sedtrain.decoding.timestamps import FrameTimes
from sedtrain.models.prefix import is_prefixed, num_in_front
from sedtrain.models.saved import SPARE_TOKENS, SavedModel
from sedtrain.text.tags import WholePrompt


def frames_per_second(saved: SavedModel) -> float:
    """Frames that the decoder gets per second of audio: the encoder's, unless the adapter changes their number."""
    return adapted_frames(saved, 1000) / 1000 / FrameTimes.of(saved).hop


@torch.no_grad()
def adapted_frames(saved: SavedModel, number: int) -> int:
    """Frames that the adapter makes of this number of encoder frames."""
    model = saved.model
    frames = torch.zeros(1, number, model.encoder_output_dim, dtype=model.dtype, device=model.device)
    with torch.random.fork_rng(devices=[]):  # dropout leaves the run's own random state alone
        adapted = model.adapt({"last_hidden_state": frames}, None).last_hidden_state
    assert adapted is not None
    return int(adapted.shape[1])


def positions_of_audio(saved: SavedModel) -> Callable[[float], int] | None:
    """A function from seconds of audio to the most positions that prompt and audio take; None if audio takes none."""
    config = saved.model.config.decoder
    if not is_prefixed(config):
        return None
    rate, of_one_frame = frames_per_second(saved), adapted_frames(saved, 1)
    return lambda seconds: num_in_front(config, ceil(rate * seconds) + of_one_frame)


def longest_audio(saved: SavedModel) -> float:
    """Most seconds that the encoder takes and that leave positions of the decoder for a text."""
    in_front, most = positions_of_audio(saved), saved.model.max_tokens
    if in_front is None or most is None:
        return saved.max_seconds
    return min(
        saved.max_seconds, max(SHORTEST_SECONDS, (most - SPARE_TOKENS - in_front(0.0)) / frames_per_second(saved))
    )


def collator_of(saved: SavedModel, rewrite: Callable[[str], str] = str, detects: bool = False) -> Collator:
    """The Collator of a saved model.

    rewrite: normalizes texts before they become labels
    detects: lets Whisper find a language that nothing names
    """
    tags = saved.tags
    if detects and saved.is_whisper and isinstance(tags, WholePrompt):
        tags = replace(tags, detects=bool(tags.ids))
    return Collator(
        saved.feature_extractor,
        saved.tokenizer,
        saved.model.config.decoder_start_token_id,
        rewrite,
        tags,
        longest_audio(saved),
        behind_prompt=is_prefixed(saved.model.config.decoder),
        pads=saved.is_whisper,
    )
