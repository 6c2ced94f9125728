"""The ONNX graphs in 8 bits: products of matrices by the dynamic quantization of onnxruntime, beside those in float32."""

import logging
from pathlib import Path

from sedtrain.decoding.hypotheses import end_tokens
from sedtrain.export.check_set import check_set, compared, prompts_of, room_of
from sedtrain.export.onnx import NAMES, greedy, until_end
from sedtrain.models.saved import SavedModel

NUM_COMPARED = 50


def write_int8(saved: SavedModel, folder: Path) -> str:
    """Writes encoder_int8.onnx and decoder_int8.onnx; returns how far their texts are from those of the other graphs."""
    from onnxruntime.quantization import quantize_dynamic

    settings = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "use_external_data_format": True}
    logging.disable(logging.WARNING)  # that graphs could be simplified first; torch has done so
    try:
        for name in NAMES:
            quantize_dynamic(folder / f"{name}.onnx", folder / f"{name}_int8.onnx", **settings)
    finally:
        logging.disable(logging.NOTSET)
    return compared(texts(saved, folder, ""), texts(saved, folder, "_int8"))


def texts(saved: SavedModel, folder: Path, ending: str) -> list[str]:
    """What two graphs write for utterances of the embedded corpus, one at a time."""
    import onnxruntime

    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}{ending}.onnx") for name in NAMES)
    batch, ends = check_set(saved, NUM_COMPARED), end_tokens(saved.model.generation_config)
    prompts, found = prompts_of(saved, batch), list[str]()
    for inputs, mask, prompt in zip(batch.inputs, batch.attention_mask, prompts, strict=True):
        length = int(mask.sum())
        audio, heard, given = (each[None].numpy() for each in (inputs[:length], mask[:length], prompt))
        [ids] = greedy(encoder, decoder, audio, heard, given, ends, room_of(saved, prompts)).tolist()
        found.append(saved.tokenizer.decode(until_end(ids, ends), skip_special_tokens=True))
    return found
