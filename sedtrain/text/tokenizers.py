"""Tokenizers trained on transcripts, and the ids that a tokenizer of any family gives a target text."""

from collections.abc import Iterable
from itertools import islice
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sedtrain.errors import UserError, require

PAD, START, END, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3
SPACE = "▁"


def train_tokenizer(
    texts: Iterable[str], kind: Literal["bpe", "char"], vocab_size: int, max_texts: int | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens that decodes what it encoded, up to white space and NFC.

    `bpe` merges within words, so of few distinct words each becomes one token; punctuation stands apart.
    `char` has one token a character. Both write `</s>` behind a text and nothing before it: those are the
    labels, since the model puts the start token in front when it shifts them. Special tokens spelled out in a
    text are text. Of the texts, the first `max_texts` are read, each let go before the next; None reads all.
    Raises UserError without texts, or where the characters alone are more than `vocab_size`.
    """
    require(max_texts is None or max_texts > 0, "tokenizer.max_texts", max_texts, "a number above 0, or null")
    tokenizer = _untrained(kind)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size if kind == "bpe" else 0,  # 0: every character, no merges
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[SPACE],
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(texts, max_texts), trainer)
    _check_size(tokenizer.get_vocab_size(), vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,  # else decoding rewrites " ," as ","
        split_special_tokens=True,
    )


def _untrained(kind: Literal["bpe", "char"]) -> Tokenizer:
    # A space before the first word too makes a word the same token wherever it stands; characters need none.
    prepend_scheme = {"bpe": "always", "char": "never"}[kind]
    one_space = normalizers.Replace(Regex(rf"[\s{SPACE}]+"), " ")
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), one_space, normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(SPACE, prepend_scheme), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, SPECIAL_TOKENS.index(END))]
    )
    return tokenizer


def _check_size(trained_size: int, vocab_size: int) -> None:
    if trained_size == len(SPECIAL_TOKENS) + len(SPACE):
        raise UserError("there is no text to train a tokenizer on", "a training split whose texts are not empty")
    if trained_size > vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but the characters of the texts alone need {trained_size}",
            f"vocab_size of {trained_size} or more",
        )


def start_end_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Ids that start, end and pad a target: (bos, cls or end), (eos or sep), (pad or end); else a UserError.

    Where padding is the end token, mask labels by length: masked by id, the model never learns to stop.
    """
    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if end is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end token (eos or sep)",
            'a tokenizer whose tokenizer_config.json names an "eos_token"',
        )
    start = _first(tokenizer.bos_token_id, tokenizer.cls_token_id, end)
    pad = _first(tokenizer.pad_token_id, end)
    assert start is not None and pad is not None
    return start, end, pad


def _first(*ids: int | None) -> int | None:
    return next((id for id in ids if id is not None), None)


def encode_target(tokenizer: PreTrainedTokenizerBase, text: str, decoder_start_token_id: int) -> list[int]:
    """Label ids of a text as the tokenizer writes targets, without the start token, with one end token, last.

    The start token is dropped because shifting the labels puts it there; so is what a tokenizer writes behind
    the end token (mBART its language code).
    """
    ids: list[int] = tokenizer(text_target=text)["input_ids"]
    if ids[:1] == [decoder_start_token_id]:
        ids = ids[1:]
    _, end, _ = start_end_pad(tokenizer)
    special_ids = set(tokenizer.all_special_ids)
    num_content = len(ids)
    while num_content > 0 and ids[num_content - 1] in special_ids:
        num_content -= 1
    if end in ids[num_content:]:
        ids = ids[: ids.index(end, num_content)]
    return [*ids, end]
