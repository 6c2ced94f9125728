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
