"""A model of ours and one of the base class of transformers, of the same tiny parts and with the same weights."""

import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    SpeechEncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

START, END, PAD, VOCABULARY = 4, 5, 3, 30
WAVE_ENCODER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 4, 4], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer", "do_stable_layer_norm": True, "mask_time_prob": 0.0,
}  # fmt: skip
WHISPER = {
    "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 100,
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip
DECODER = {"is_decoder": True, "add_cross_attention": True, "vocab_size": VOCABULARY}
BERT = {**DECODER, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {**DECODER, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
BART = {
    **DECODER, "is_encoder_decoder": False, "d_model": 24, "decoder_layers": 2, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
}  # fmt: skip
DROPOUTS = (
    "hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop", "dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop", "encoder_layerdrop",
    "decoder_layerdrop", "dropout_rate",
)  # fmt: skip
PARTS = {
    "hubert": (HubertModel, HubertConfig, WAVE_ENCODER),
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config, WAVE_ENCODER),
    "whisper": (WhisperModel, WhisperConfig, WHISPER),
    "bert": (BertLMHeadModel, BertConfig, BERT),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "bart": (BartForCausalLM, BartConfig, BART),
    "whole whisper": (WhisperForConditionalGeneration, WhisperConfig, WHISPER),
    "m2m_100": (M2M100ForConditionalGeneration, M2M100Config, {**BART, "pad_token_id": 0}),
    "t5": (T5ForConditionalGeneration, T5Config, T5),
    "llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
}


def part(name, dropout=0.0, **values):
    """A random encoder or decoder; eager, so that it gives attentions in the base class too."""
    model, config_class, tiny = PARTS[name]
    config = config_class(**{**tiny, **values})
    for dropout_name in DROPOUTS:
        if hasattr(config, dropout_name):
            setattr(config, dropout_name, dropout)
    return model._from_config(config, attn_implementation="eager")


def joined(encoder, decoder, kind=SpeechEncoderDecoder, seed=0, special_tokens=True, **options):
    torch.manual_seed(seed)
    model = kind(encoder=part(encoder, **options), decoder=part(decoder, **options)).eval()
    if special_tokens:
        for config in (model.config, model.generation_config):
            config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = START, END, PAD
    return model


def ours_and_base(encoder, decoder, **options):
    ours = joined(encoder, decoder, **options)
    base = joined(encoder, decoder, kind=SpeechEncoderDecoderModel, **options)
    base.load_state_dict(ours.state_dict())
    return ours, base


def two_utterances():
    """Two utterances, the second of half the length, and their mask."""
    audio = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 4000, dtype=torch.long)
    audio[1, 2000:], mask[1, 2000:] = 0.0, 0
    return {"input_values": audio, "attention_mask": mask}


LABELS = torch.tensor([[7, 8, 9, END], [10, END, -100, -100]])
IDS = torch.tensor([[START, 7, 8, 9], [START, 10, 11, 12]])


def assert_close(ours, base, atol=1e-5):
    """Of tensors, and of tuples of them however deep."""
    if isinstance(base, torch.Tensor):
        torch.testing.assert_close(ours, base, rtol=1e-4, atol=atol)
        return
    assert len(ours) == len(base)
    for mine, theirs in zip(ours, base, strict=True):
        assert_close(mine, theirs, atol)


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
