"""The families of encoders and decoders that have an option file, at size=tiny."""

import string
from functools import cache

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sedtrain.config.schema import conf_dir, register
from sedtrain.models.decoder import load_decoder
from sedtrain.models.encoder import load_encoder
from sedtrain.models.stacks import OF_WHOLE
from sedtrain.text.tokenizers import train_tokenizer

MEMBERS = {"byt5", "nllb", "xls_r"}  # published members of t5, m2m_100 and wav2vec2, with their code
ENCODERS = sorted({path.stem for path in (conf_dir() / "encoder").glob("*.yaml")} - MEMBERS)
DECODER_FILES = sorted((conf_dir() / "decoder").glob("*.yaml"))
PREFIXED = [path.stem for path in DECODER_FILES if "adapter: stack_mlp" in path.read_text(encoding="utf-8")]
DECODERS = [path.stem for path in DECODER_FILES if path.stem not in {*PREFIXED, *MEMBERS}]  # with cross-attention
TOKENIZER = train_tokenizer([" ".join(string.printable)], "char", 200)


@cache
def option_file(group, name):
    """The values of conf/GROUP/NAME.yaml at size=tiny."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        option = compose("train", [f"{group}={name}"])
    values = OmegaConf.to_container(option[group], resolve=True)
    return {key: value for key, value in values.items() if key not in ("_target_", "_partial_")}


STACKS = [name for name in DECODERS if option_file("decoder", name)["model_type"] in OF_WHOLE]  # of whole models


def tiny_encoder(name, seed=0, **options):
    torch.manual_seed(seed)
    return load_encoder(**{**option_file("encoder", name), **options}).eval()


def tiny_decoder(name, seed=0, tokenizer=TOKENIZER, **options):
    torch.manual_seed(seed)
    return load_decoder(tokenizer, **{**option_file("decoder", name), **options}).eval()
