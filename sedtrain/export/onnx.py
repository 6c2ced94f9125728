"""A model as two ONNX graphs: encoder.onnx hears audio, decoder.onnx writes the next token with keys and values as inputs.

B batch, S samples, T frames, P past tokens, U new tokens, H heads, W width of a head, V vocabulary.
"""

import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sedtrain.decoding.hypotheses import end_tokens
from sedtrain.errors import UserError
from sedtrain.export.check_set import check_set, prompts_of, room_of
from sedtrain.models.saved import SavedModel
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import Memory, Steps, steps_of
from sedtrain.models.whole import WholeSpeechModel

NAMES = "encoder", "decoder"
FORCED_TOKENS = 24
WITHOUT = "write export=folder, whose model transformers and sedtrain load"


class Growing(Memory):
    """A memory whose keys and values are tensors of a graph: a step makes longer ones."""

    def write(self, index: int, new: Tensor) -> Tensor:
        self.slots[index] = torch.cat([self.slots[index], new], 3)
        return self.slots[index]


class Encoder(nn.Module):
    """(B, S) audio and mask -> (B, T) mask of frames, and for each layer of the decoder two (B, H, T, W)."""

    def __init__(self, model: SpeechEncoderDecoder, steps: Steps) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        encoded = self.model.encode(input_values, attention_mask)
        states, memory = encoded.last_hidden_state, Memory(input_values.shape[0], [], None, [])
        assert states is not None and encoded.attention_mask is not None
        frames = states.flatten(0, 1)
        pairs = [layer.heads(layer.cross_audio(frames), memory, 2).unbind(0) for layer in self.steps.layers]
        return encoded.attention_mask.long(), *(each for pair in pairs for each in pair)


class Decoder(nn.Module):
    """(B, U) tokens, (B, T) mask, keys and values of the audio and of P tokens -> (B, U, V) logits, those of P + U tokens."""

    def __init__(self, model: SpeechEncoderDecoder, steps: Steps) -> None:
        super().__init__()
        self.decoder, self.steps = model.decoder, steps

    def forward(
        self, input_ids: Tensor, encoder_attention_mask: Tensor, audio: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        num_past, num_new = past[0].shape[2], input_ids.shape[1]
        padding = past[0].new_zeros(encoder_attention_mask.shape).masked_fill(encoder_attention_mask == 0, -torch.inf)
        slots = [torch.stack(pair) for pair in zip(past[::2], past[1::2], strict=True)]
        heard = list(zip(audio[::2], audio[1::2], strict=True))
        memory = Growing(input_ids.shape[0], heard, padding[:, None, None], slots, num_past)
        positions = torch.arange(num_new) + num_past
        later = torch.arange(num_past + num_new) > positions[:, None]
        seen = past[0].new_zeros(later.shape).masked_fill(later, -torch.inf)[None, None]
        logits = self.steps.logits(self.steps.step(input_ids, positions, memory, seen))
        return logits, *(each for slot in memory.slots for each in slot.unbind(0))


def write_onnx(saved: SavedModel, folder: Path) -> None:
    """Writes encoder.onnx and decoder.onnx of a model in float32 on the CPU, once onnxruntime writes the ids of `generate`.

    Raises UserError for a missing extra, a family that has no such graphs, and other ids.
    """
    try:
        import onnx  # noqa: F401 - torch asks for it late
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        wrong = f"it needs onnx, onnxruntime and onnxscript: {error}"
        raise UserError("export.onnx", True, wrong, "pip install 'sedtrain[onnx]'") from error
    model = saved.model.requires_grad_(False)
    steps = steps_of(model)
    if steps is None or isinstance(model, WholeSpeechModel) or model.encoder.main_input_name != "input_values":
        names = model.config.encoder.model_type, model.config.decoder.model_type
        wrong = "graphs are made of encoders of raw audio and of decoders that sedtrain drives itself, not of {} + {}"
        raise UserError("export.onnx", True, wrong.format(*names), WITHOUT)
    folder.mkdir()
    try:
        trace(model, steps, folder)
    except torch.onnx.OnnxExporterError as error:
        cause = one_line(error.__cause__ or error)
        raise UserError("export.onnx", True, f"torch cannot export this model: {cause}", WITHOUT) from error
    sessions = [onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in NAMES]
    failures = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        refuse_other_ids(saved, *sessions)
    except (failures.Fail, failures.InvalidArgument, failures.RuntimeException) as error:
        raise UserError(
            "export.onnx", True, f"onnxruntime cannot run its graphs: {one_line(error)}", WITHOUT
        ) from error


def one_line(error: BaseException) -> str:
    """Its beginning, without the codes of colours."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())[:200]


@torch.no_grad()
def trace(model: SpeechEncoderDecoder, steps: Steps, folder: Path) -> None:
    """Exports both modules, with dynamic sizes by name."""
    layers = [f"{number}.{{}}.{kind}" for number in range(len(steps.layers)) for kind in ("key", "value")]
    audio, own = ([each.format(part) for each in layers] for part in NAMES)
    mask = torch.ones(2, 8000, dtype=torch.long)
    mask[1, 6000:] = 0
    inputs = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)), mask
    encoder, decoder = Encoder(model, steps).eval(), Decoder(model, steps).eval()
    frames, *heard = encoder(*inputs)
    past = [each.new_zeros(2, each.shape[1], 3, each.shape[3]) for each in heard]
    tokens = torch.ones(2, 2, dtype=torch.long)
    samples, by_frame, by_token = ({0: "batch", 1: each} for each in ("samples", "frames", "tokens"))
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(
        logging.ERROR
    )  # that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch's exporter says of itself
        torch.onnx.export(
            encoder,
            inputs,
            folder / "encoder.onnx",
            input_names=["input_values", "attention_mask"],
            output_names=["encoder_attention_mask", *(f"present.{each}" for each in audio)],
            dynamic_shapes=(samples, samples),
            verbose=False,
        )
        torch.onnx.export(
            decoder,
            (tokens, frames, heard, past),
            folder / "decoder.onnx",
            input_names=["input_ids", "encoder_attention_mask", *(f"past_key_values.{each}" for each in audio + own)],
            output_names=["logits", *(f"present.{each}" for each in own)],
            dynamic_shapes=(
                by_token,
                by_frame,
                [{0: "batch", 2: "frames"} for _ in audio],
                [{0: "batch", 2: "past"} for _ in own],
            ),
            verbose=False,
        )


def greedy(
    encoder: Any, decoder: Any, inputs: Any, mask: Any, prompt: Any, ends: Sequence[int], most: int, least: int = 0
) -> Any:
    """Ids of each utterance by two sessions of onnxruntime; what follows an end has no meaning.

    (B, S) float32 audio and its mask, (B, P) int64 prompt -> (B, U) ids, U from `least` to `most`
    """
    heard = encoder.run(None, {"input_values": inputs, "attention_mask": mask.astype("int64")})
    places = decoder.get_inputs()
    past = [np.zeros((len(prompt), each.shape[1], 0, each.shape[3]), "float32") for each in places[1 + len(heard) :]]
    ids, new = prompt, prompt
    ended = np.zeros(len(prompt), bool)
    for number in range(1, most + 1):
        values = [new, *heard, *past]
        logits, *past = decoder.run(None, {each.name: value for each, value in zip(places, values, strict=True)})
        if number <= least:
            logits[:, -1, list(ends)] = -np.inf
        new = logits[:, -1:].argmax(-1)
        ids = np.concatenate([ids, new], 1)
        ended |= np.isin(new[:, 0], ends)
        if ended.all():
            break
    return ids[:, prompt.shape[1] :]


def refuse_other_ids(saved: SavedModel, encoder: Any, decoder: Any) -> None:
    """Raises UserError where onnxruntime writes other ids than `generate`, for utterances of the embedded corpus.

    Each text is compared up to its end, and again with the end forbidden for FORCED_TOKENS tokens. The last token that
    fits is left out: there some families force an end.
    """
    batch, model, ends = check_set(saved), saved.model, end_tokens(saved.model.generation_config)
    prompt = prompts_of(saved, batch)
    room = room_of(saved, prompt)
    for least, most in ((0, room), (min(FORCED_TOKENS, room), min(FORCED_TOKENS, room))):
        settings = {"num_beams": 1, "do_sample": False, "max_new_tokens": most, "min_new_tokens": least or None}
        whole = model.generate(batch.inputs, attention_mask=batch.attention_mask, decoder_input_ids=prompt, **settings)
        arrays = batch.inputs.numpy(), batch.attention_mask.numpy(), prompt.numpy()
        found = greedy(encoder, decoder, *arrays, ends, most, least)
        wanted = [until_end(row, ends) for row in whole[:, prompt.shape[1] :][:, : most - 1].tolist()]
        texts = [until_end(row, ends) for row in found[:, : most - 1].tolist()]
        if wrong := sum(text != each for text, each in zip(texts, wanted, strict=True)):
            words = f"onnxruntime writes other tokens than transformers for {wrong} of {len(wanted)} utterances"
            raise UserError("export.onnx", True, words, WITHOUT)


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids in front of the first end."""
    return ids[: next((number for number, each in enumerate(ids) if each in ends), len(ids))]
