"""The tokenizer of Speech2Text2: fastBPE merges within words; every token of a word but the last ends in "@@"."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizer

from sedtrain.errors import UserError
from sedtrain.plain import content, parsed

LAST, CONTINUES = "</w>", "@@"
"""Suffix of a word's last symbol in merges.txt, and of its other tokens in vocab.json."""


def read_vocabulary(file: Path) -> dict[str, int]:
    """The ids of tokens in vocab.json. Raises ValueError for anything else."""
    vocabulary = parsed(file)
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{file.name} is no object of tokens with their ids")
    for token, id in vocabulary.items():
        if type(id) is not int or not 0 <= id < 10 * len(vocabulary):
            raise ValueError(f"{file.name} gives {token[:40]!r} the id {str(id)[:40]!r}")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{file.name} gives an id to two tokens")
    return vocabulary


def read_merges(file: Path) -> dict[tuple[str, str], int]:
    """The rank of each pair of symbols in merges.txt; a count may follow a pair. Raises ValueError for other lines."""
    lines = [line.split() for line in content(file).split("\n")]
    pairs = [tuple(words[:2]) for words in lines if words]
    if wrong := next((pair for pair in pairs if len(pair) < 2), None):
        raise ValueError(f"{file.name} has a line with one symbol, {wrong[0][:40]!r}, instead of a pair")
    return {(first, second): rank for rank, (first, second) in enumerate(pairs)}


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Merges every occurrence of the pair, from the left."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


class Speech2Text2Tokenizer(PreTrainedTokenizer):
    """Splits a text at white space and each word by `merges.txt`; without that file, it only decodes.

    Decoding joins tokens with spaces and removes each "@@ ", and a final "@@". Encoding adds no special tokens.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None = None,
        merges_file: str | None = None,
        bos_token: str = "<s>",
        pad_token: str = "<pad>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        do_lower_case: bool = False,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise ValueError("there is no vocab.json")
        self.encoder = read_vocabulary(Path(vocab_file))
        self.decoder = {id: token for token, id in self.encoder.items()}
        self.ranks = read_merges(Path(merges_file)) if merges_file else None
        self.splits: dict[str, list[str]] = {}
        self.do_lower_case = do_lower_case
        kwargs = {"special_tokens_pattern": "none", "clean_up_tokenization_spaces": False, **kwargs}
        super().__init__(
            bos_token=bos_token,
            pad_token=pad_token,
            eos_token=eos_token,
            unk_token=unk_token,
            do_lower_case=do_lower_case,
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return max(self.decoder) + 1

    def get_vocab(self) -> dict[str, int]:
        return {**self.encoder, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.ranks is None:
            raise UserError(
                "decoder.checkpoint",
                self.name_or_path,
                "its tokenizer has no merges.txt, so it decodes but cannot encode",
                "write decoder.checkpoint=FOLDER that has merges.txt beside vocab.json",
            )
        words = (text.lower() if self.do_lower_case else text).split()
        return [token for word in words for token in self.split(word, self.ranks)]

    def split(self, word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
        """The tokens of a word: merges its neighbouring symbols, the pair of lowest rank first."""
        if word not in self.splits:
            symbols = [*word[:-1], word[-1] + LAST]
            while (
                len(symbols) > 1
                and (best := min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))) in ranks
            ):
                symbols = merge(symbols, best)
            *others, last = symbols
            self.splits[word] = [*(symbol + CONTINUES for symbol in others), last.removesuffix(LAST)]
        return self.splits[word]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes vocab.json, and merges.txt if there are merges; returns their paths."""
        written = {"vocab.json": json.dumps(self.encoder, ensure_ascii=False, indent=2) + "\n"}
        if self.ranks is not None:
            written["merges.txt"] = "".join(
                f"{' '.join(pair)}\n" for pair in sorted(self.ranks, key=self.ranks.__getitem__)
            )
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        files = {Path(save_directory) / f"{prefix}{name}": text for name, text in written.items()}
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
        return tuple(map(str, files))

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.encoder.get(token, self.encoder.get(self.unk_token))

    def _convert_id_to_token(self, index: int) -> str:
        return self.decoder.get(index, str(self.unk_token))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        if tokens and tokens[-1] != CONTINUES:
            tokens = [*tokens[:-1], tokens[-1].removesuffix(CONTINUES)]
        return " ".join(tokens).replace(f"{CONTINUES} ", "")
