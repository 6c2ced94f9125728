"""Writes a Hugging Face folder with the weights of linear layers in 8 bits, which `transformers` loads with torchao.

The layers compute in float32 from these weights. Embeddings are stored in bfloat16 and loaded as float32.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForSpeechSeq2Seq, SpeechEncoderDecoderModel, TorchAoConfig

from sedtrain.decoding.generate import prompts_of
from sedtrain.errors import UserError, one_line
from sedtrain.export.checks import check_set, compared, room_of
from sedtrain.models.lora import lora_layers
from sedtrain.models.parts import READ_AS_WEIGHTS
from sedtrain.models.saved import SavedModel
from sedtrain.models.whole import WholeSpeechModel

WITHOUT = "write export.dtype=bfloat16"


def refuse_int8(saved: SavedModel, lora: str) -> None:
    """Raises UserError if `transformers` could not load such a folder, or if torchao is missing."""
    wrong = ""
    if not (saved.is_stock or isinstance(saved.model, WholeSpeechModel)):
        kinds = f"{saved.model.config.encoder.model_type} + {saved.model.config.decoder.model_type}"
        wrong = f"a folder in 8 bits is for models that transformers loads without sedtrain, unlike this {kinds}"
    elif lora == "apart" and lora_layers(saved.model):
        wrong = "matrices of LoRA that stay apart belong to weights in float32"
    if wrong:
        raise UserError("export.dtype", "int8", wrong, WITHOUT)
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise UserError("export.dtype", "int8", f"it needs torchao: {error}", "pip install 'sedtrain[int8]'") from error


def to_int8(saved: SavedModel, folder: Path) -> str:
    """Replaces the weights in the folder of the model; returns a sentence that compares the texts with those in float32.

    Raises UserError if the folder in 8 bits cannot be loaded and run.
    """
    from torchao.quantization import Int8WeightOnlyConfig

    kind: Any = AutoModelForSpeechSeq2Seq if isinstance(saved.model, WholeSpeechModel) else SpeechEncoderDecoderModel
    load = partial(kind.from_pretrained, folder, trust_remote_code=False)
    model = load().eval()
    wanted = texts(saved, model)
    left = [name for name, module in model.named_modules() if isinstance(module, READ_AS_WEIGHTS)]
    output = model.get_output_embeddings()  # often tied to the input embeddings
    left += [name for name, module in model.named_modules() if module is output]
    weights = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left)
    model = load(quantization_config=weights)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data = module.weight.data.bfloat16()
    model.save_pretrained(folder)
    try:
        return compared(wanted, texts(saved, load().eval()))
    except RuntimeError as error:  # a layer reads its weights in its own way
        wrong = f"torchao cannot run this model: {one_line(error, 160)}"
        raise UserError("export.dtype", "int8", wrong, WITHOUT) from error


def texts(saved: SavedModel, model: Any) -> list[str]:
    """Texts of a model of `transformers` for utterances of the embedded corpus, one at a time, by greedy search."""
    batch, found = check_set(saved), list[str]()
    prompts = prompts_of(saved.model, batch)
    settings = {"num_beams": 1, "do_sample": False, "max_new_tokens": room_of(saved, prompts)}
    for inputs, mask, prompt in zip(batch.inputs, batch.attention_mask, prompts, strict=True):
        given = {} if saved.is_whisper else {"decoder_input_ids": prompt[None]}
        heard = inputs if saved.is_whisper else inputs[: int(mask.sum())]
        ids = model.generate(heard[None], **given, **settings)[0]
        found.append(saved.tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found
