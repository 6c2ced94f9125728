"""Writes the ONNX graphs in 8 bits beside those in float32: onnxruntime quantizes their matrix products dynamically."""

import logging
from pathlib import Path

from sedtrain.decoding.generate import prompts_of
from sedtrain.decoding.hypotheses import end_tokens, until_end
from sedtrain.export.check_set import check_set, compared, room_of
from sedtrain.export.onnx import NAMES
from sedtrain.export.onnx_check import greedy
from sedtrain.models.saved import SavedModel

NUM_COMPARED = 50


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
