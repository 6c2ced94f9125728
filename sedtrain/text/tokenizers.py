"""Trains tokenizers on transcripts, and encodes target texts with any tokenizer."""

from collections.abc import Iterable
from itertools import islice
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sedtrain.annotations import checked
from sedtrain.errors import UserError
from sedtrain.ranges import Count, UpToMillion
from sedtrain.text.spacing import UNSPACED

PAD, START, END, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # ids 0, 1, 2, 3
SPACE = "▁"


@checked("tokenizer.")
def train_tokenizer(
    texts: Iterable[str], kind: Literal["bpe", "char"], vocab_size: UpToMillion, max_texts: Count | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens, whose decoding undoes encoding up to white space and NFC.

    `bpe` merges within words, so that frequent words become one token; punctuation stays apart. `char` has one token per
    character. Both write `</s>` after a text and nothing before it, since the model prepends the start token when it
    shifts labels. Special tokens spelled out in a text are encoded as text.

    max_texts: number of texts to read, one at a time; None for all
    Raises UserError if there is no text, or if the characters alone need more than `vocab_size` tokens.
    """
    tokenizer = untrained(kind)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size if kind == "bpe" else 0,  # 0: every character, no merges
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=[SPACE],
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(texts, max_texts), trainer)
    size = tokenizer.get_vocab_size()
    if size == len(SPECIAL_TOKENS) + len(SPACE):
        wrong, write = "there is no text to train a tokenizer on", "write data.train_split of texts that are not empty"
        raise UserError("tokenizer.kind", kind, wrong, write, "write texts that are not empty")
    if size > vocab_size:
        wrong = f"the characters of the texts alone need {size} tokens"
        raise UserError("tokenizer.vocab_size", vocab_size, wrong, f"write tokenizer.vocab_size={size} or more")
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


def untrained(kind: Literal["bpe", "char"]) -> Tokenizer:
    # A space before the first word makes a word the same token at every position; characters do not need it.
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


def start_end_pad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """Ids that start, end and pad a target: (bos, cls or end), (eos or sep), (pad or end).

    If the end token is also the padding, mask labels by length: masked by id, the model would never learn to stop.
    Raises UserError if the tokenizer has no end token.
    """
    end = first_id(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if end is None:
        raise UserError(
            "decoder.checkpoint",
            tokenizer.name_or_path or type(tokenizer).__name__,
            "the tokenizer has no end token (eos or sep)",
            'write decoder.checkpoint of a tokenizer whose tokenizer_config.json names an "eos_token"',
        )
    start = first_id(tokenizer.bos_token_id, tokenizer.cls_token_id, end)
    pad = first_id(tokenizer.pad_token_id, end)
    assert start is not None and pad is not None
    return start, end, pad


def first_id(*ids: int | None) -> int | None:
    return next((id for id in ids if id is not None), None)


def encode_target(tokenizer: PreTrainedTokenizerBase, text: str, decoder_start_token_id: int | None) -> list[int]:
    """Label ids of a text: no start token, which shifting the labels prepends, and one end token, which is the last.

    Drops tokens that a tokenizer writes after the end token, such as mBART's language code.

    decoder_start_token_id: None if the text continues a prompt; the tokenizer then writes no token before it
    """
    begins = decoder_start_token_id is not None
    ids: list[int] = tokenizer(text_target=text, add_special_tokens=begins)["input_ids"]
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


def encode_whisper(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Label ids after Whisper's prompt. As in its pretraining, a text starts with a space if its script has spaces."""
    spaced = text if UNSPACED.match(text) else f" {text}"
    return [*tokenizer(spaced, add_special_tokens=False)["input_ids"], start_end_pad(tokenizer)[1]]
