"""The families of encoders and decoders that have an option file, at size=tiny."""

import string
from functools import cache

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sedtrain.batch import Utterance
from sedtrain.config.schema import conf_dir, register
from sedtrain.data.collate import Collator
from sedtrain.models.decoder import load_decoder
from sedtrain.models.decoder_families import DECODERS_OF_WHOLE
from sedtrain.models.encoder import load_encoder
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.text.tokenizers import train_tokenizer

MEMBERS = {"byt5", "nllb", "xls_r"}  # published members of t5, m2m_100 and wav2vec2, with their code
ENCODERS = sorted({path.stem for path in (conf_dir() / "encoder").glob("*.yaml")} - MEMBERS)
DECODER_FILES = sorted((conf_dir() / "decoder").glob("*.yaml"))


def reads_a_prefix(path):
    """True for the option of a language model behind a prefix, or one that inherits such an option."""
    text = path.read_text(encoding="utf-8")
    bases = [each for each in DECODER_FILES if f"defaults: [{each.stem}, " in text]
    return "adapter: stack_mlp" in text or any(map(reads_a_prefix, bases))


PREFIXED = [path.stem for path in DECODER_FILES if reads_a_prefix(path)]
OPTIONS = [path.stem for path in DECODER_FILES if path.stem not in {*PREFIXED, *MEMBERS}]  # with cross-attention
ALIKE = {"cohere_asr", "moonshine", "mt5", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "t5gemma"}
"""Decoders of whole models like canary, m2m_100 or t5: what the family's code decides is tested, not what the class does."""
DECODERS = [name for name in OPTIONS if name not in ALIKE]
START, END, PAD = 1, 2, 0
TOKENIZER = train_tokenizer([" ".join(string.printable)], "char", 200)


@cache
def option_file(group, name):
    """The values of conf/GROUP/NAME.yaml at size=tiny."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        option = compose("train", [f"{group}={name}"])
    values = OmegaConf.to_container(option[group], resolve=True)
    return {key: value for key, value in values.items() if key not in ("_target_", "_partial_")}


STACKS = [name for name in OPTIONS if option_file("decoder", name)["model_type"] in DECODERS_OF_WHOLE]
"""Decoders of whole models."""


def tiny_encoder(name, seed=0, **options):
    torch.manual_seed(seed)
    return load_encoder(**{**option_file("encoder", name), **options}).eval()


def tiny_decoder(name, seed=0, tokenizer=TOKENIZER, **options):
    torch.manual_seed(seed)
    return load_decoder(tokenizer, **{**option_file("decoder", name), **options}).eval()


def batch_of(model, *seconds):
    """A collated batch of noise, as the encoder's feature extractor prepares it, with texts of unequal length."""
    collator = Collator(feature_extractor_of(model.encoder), TOKENIZER, START)
    generator = torch.Generator().manual_seed(0)
    utterances = []
    for i, length in enumerate(seconds):
        audio = 0.1 * torch.randn(int(16000 * length), generator=generator)
        utterances.append(Utterance(str(i), audio, 16000, "one two"[: 3 + 4 * i], None, None, length))
    return collator(utterances)
