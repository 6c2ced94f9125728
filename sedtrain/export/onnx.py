"""Writes a model as two ONNX graphs: encoder.onnx encodes audio, decoder.onnx scores the next token; also in 8 bits.

B batch, S samples, T frames, P past tokens, U new tokens, H heads, W width of a head, V vocabulary.
"""

import logging
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from sedtrain.decoding.generate import prompts_of
from sedtrain.decoding.hypotheses import end_tokens, until_end
from sedtrain.errors import UserError, one_line
from sedtrain.export.checks import WITHOUT, check_set, compared, greedy, refuse_other_ids, room_of
from sedtrain.models.saved import SavedModel
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.step_layers import Memory
from sedtrain.models.steps import Steps, decoder_steps
from sedtrain.models.whole import WholeSpeechModel

NAMES = "encoder", "decoder"
NUM_COMPARED = 50
COLOUR = re.compile(r"\x1b\[[\d;]*m")
"""An escape code in messages of torch.onnx."""


class Growing(Memory):
    """A memory for graphs: keys and values grow by a step, and are not written in place."""

    def write(self, index: int, new: Tensor) -> Tensor:
        self.slots[index] = torch.cat([self.slots[index], new], 3)
        return self.slots[index]


class Encoder(nn.Module):
    """(B, S) audio and mask -> (B, T) mask of frames, then keys and values (B, H, T, W) for each layer of the decoder."""

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
    """Scores U tokens after P earlier ones.

    (B, U) tokens, (B, T) mask, keys and values of the audio and of P tokens -> (B, U, V) logits, and the keys and values of
    P + U tokens
    """

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
    """Writes encoder.onnx and decoder.onnx of a model in float32 on the CPU, and checks that they write the ids of `generate`.

    Raises UserError for a missing extra, a family that has no such graphs, and other ids.
    """
    try:
        import onnx  # noqa: F401 - torch imports it only when it exports
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        wrong = f"it needs onnx, onnxruntime and onnxscript: {error}"
        raise UserError("export.onnx", True, wrong, "pip install 'sedtrain[onnx]'") from error
    model = saved.model.requires_grad_(False)
    steps = decoder_steps(model)
    if steps is None or isinstance(model, WholeSpeechModel) or model.encoder.main_input_name != "input_values":
        names = model.config.encoder.model_type, model.config.decoder.model_type
        wrong = "graphs are made of encoders of raw audio and of decoders that sedtrain drives itself, not of {} + {}"
        raise UserError("export.onnx", True, wrong.format(*names), WITHOUT)
    folder.mkdir()
    try:
        trace(model, steps, folder)
    except torch.onnx.OnnxExporterError as error:
        cause = COLOUR.sub("", one_line(error.__cause__ or error))
        raise UserError("export.onnx", True, f"torch cannot export this model: {cause}", WITHOUT) from error
    sessions = [onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in NAMES]
    failures = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        refuse_other_ids(saved, *sessions)
    except (failures.Fail, failures.InvalidArgument, failures.RuntimeException) as error:
        wrong = f"onnxruntime cannot run its graphs: {one_line(error)}"
        raise UserError("export.onnx", True, wrong, WITHOUT) from error


@torch.no_grad()
def trace(model: SpeechEncoderDecoder, steps: Steps, folder: Path) -> None:
    """Exports both modules with named dynamic sizes."""
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
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.setLevel(logging.ERROR)  # it warns that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
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


def write_int8(saved: SavedModel, folder: Path) -> str:
    """Writes encoder_int8.onnx and decoder_int8.onnx; returns a comparison of their texts with those of float32."""
    from onnxruntime.quantization import quantize_dynamic

    settings = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "use_external_data_format": True}
    logging.disable(logging.WARNING)  # it advises to simplify the graphs first, which torch has done
    try:
        for name in NAMES:
            quantize_dynamic(folder / f"{name}.onnx", folder / f"{name}_int8.onnx", **settings)
    finally:
        logging.disable(logging.NOTSET)
    return compared(texts(saved, folder, ""), texts(saved, folder, "_int8"))


def texts(saved: SavedModel, folder: Path, ending: str) -> list[str]:
    """Texts that two graphs write for utterances of the embedded corpus, one at a time."""
    import onnxruntime

    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}{ending}.onnx") for name in NAMES)
    batch, ends = check_set(saved, NUM_COMPARED), end_tokens(saved.model.generation_config)
    prompts, found = prompts_of(saved.model, batch), list[str]()
    for inputs, mask, prompt in zip(batch.inputs, batch.attention_mask, prompts, strict=True):
        length = int(mask.sum())
        audio, heard, given = (each[None].numpy() for each in (inputs[:length], mask[:length], prompt))
        [ids] = greedy(encoder, decoder, audio, heard, given, ends, room_of(saved, prompts)).tolist()
        found.append(saved.tokenizer.decode(until_end(ids, ends), skip_special_tokens=True))
    return found
