"""Tiny random folders of whole speech models, as they are published."""

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

LANGUAGES = ("en", "de")
SECONDS = 4


def whisper_tokenizer(languages=LANGUAGES):
    """Whisper's tokenizer with a token a byte; without languages as in a checkpoint of English alone."""
    prompt = [*(f"<|{language}|>" for language in languages), "<|translate|>", "<|transcribe|>"]
    special = ["<|endoftext|>", "<|startoftranscript|>", *prompt, "<|notimestamps|>"]
    vocab = {token: id for id, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = transformers.WhisperTokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    return tokenizer


def whisper_folder(folder, languages=LANGUAGES, **options):
    """Writes a folder of a Whisper of random weights, which hears `SECONDS`."""
    torch.manual_seed(0)
    tokenizer = whisper_tokenizer(languages)
    id_of = tokenizer.convert_tokens_to_ids
    special = {
        "decoder_start_token_id": id_of("<|startoftranscript|>"),
        **dict.fromkeys(["eos_token_id", "pad_token_id", "bos_token_id"], id_of("<|endoftext|>")),
    }
    sizes = dict.fromkeys(["encoder_layers", "decoder_layers"], 1)
    sizes |= dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    sizes |= dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 32)
    config = WhisperConfig(
        vocab_size=len(tokenizer), max_source_positions=50 * SECONDS, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None, **{"d_model": 16, "num_mel_bins": 8, **sizes, **special, **options},
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    multilingual = {
        "lang_to_id": {f"<|{language}|>": id_of(f"<|{language}|>") for language in languages},
        "task_to_id": {task: id_of(f"<|{task}|>") for task in ("transcribe", "translate")},
    }
    model.generation_config = GenerationConfig(
        **special, is_multilingual=bool(languages), no_timestamps_token_id=id_of("<|notimestamps|>"), max_length=64,
        suppress_tokens=[0, 1], begin_suppress_tokens=[2, special["eos_token_id"]], return_timestamps=False,
        alignment_heads=[[0, 0]], prev_sot_token_id=None, **(multilingual if languages else {}),
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=SECONDS).save_pretrained(folder)
    return folder


SPECIAL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
PARAKEET = {
    "model_type": "parakeet_encoder", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "subsampling_conv_channels": 8, "num_mel_bins": 16,
}  # fmt: skip
LAYERS = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 4,
}  # fmt: skip
OTHERS = {
    "canary": {
        "encoder_config": {**PARAKEET, "hidden_size": 16}, "decoder_config": {**LAYERS, **SPECIAL}, **SPECIAL,
    },
    "cohere_asr": {"encoder_config": PARAKEET, **LAYERS, **SPECIAL},
    "moonshine_streaming": {
        "encoder_config": {**LAYERS, "hidden_size": 24, "head_dim": 6, "sliding_windows": ((5, 2), (4, 0))},
        "max_position_embeddings": 40, **LAYERS, **SPECIAL,
    },
    "speecht5": {
        "hidden_size": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_layers": 2,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "conv_dim": [16, 16], "conv_kernel": [20, 8],
        "conv_stride": [16, 20], "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
        **SPECIAL,
    },
}  # fmt: skip
"""Whole models whose parts are no options by themselves together, as small ones: values of their configurations."""


def other_whole(name):
    """A model of this type with random weights that tell frames and tokens apart."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**OTHERS[name])
    model = transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING[type(config)](config).eval()
    for weight_name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in weight_name:
            torch.nn.init.normal_(weight, std=0.3)
    return model
