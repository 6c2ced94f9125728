"""Hot words: a search gets a bonus for the tokens of names and terms that the user expects.

R rows of beams, U tokens, V vocabulary. A word that the text leaves before its end loses its bonus again.
Source: the context graph of WeNet and icefall, an automaton of Aho and Corasick (1975).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from sedtrain.decoding.fusion import known_word
from sedtrain.errors import UserError


@dataclass
class Node:
    """A node in the tree of the words' tokens, `depth` tokens below its root.

    shorter: the node of the longest suffix of these tokens that also begins a word; None at the root
    """

    depth: int = 0
    is_word: bool = False
    children: dict[int, Node] = field(default_factory=dict)
    shorter: Node | None = None

    def add(self, tokens: Sequence[int]) -> None:
        node = self
        for token in tokens:
            node = node.children.setdefault(token, Node(node.depth + 1))
        node.is_word = True

    def word(self) -> int:
        """Bits of the longest word that ends here, see `HotWords.step`."""
        node: Node | None = self
        while node is not None and not node.is_word:
            node = node.shorter
        return 0 if node is None else (1 << node.depth) - 1

    def link(self, root: Node) -> None:
        """Sets `shorter` of the nodes below this one, level by level."""
        level = [self]
        while level:
            for node in level:
                for token, child in node.children.items():
                    behind = node.shorter
                    while behind is not None and token not in behind.children:
                        behind = behind.shorter
                    child.shorter = root if behind is None else behind.children[token]
            level = [child for node in level for child in node.children.values()]


class HotWords(LogitsProcessor):
    """Adds `bonus` to each token that begins or continues a hot word.

    tree: from `tree_of`; begins, ends, num_given: see `Fusion`
    """

    def __init__(self, tree: Node, bonus: float, begins: Tensor, ends: Collection[int], num_given: int) -> None:
        self.tree, self.bonus, self.num_given = tree, bonus, num_given
        self.completes = begins.clone()
        self.completes[list(ends)] = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, U) tokens, (R, V) scores of the decoder -> (R, V) scores with the bonus."""
        gains = torch.stack([self.gains(row) for row in input_ids[:, self.num_given :].tolist()])
        return scores + self.bonus * gains

    def gains(self, row: Sequence[int]) -> Tensor:
        """(V,) how each next token changes the number of tokens that have a bonus."""
        node, kept = self.tree, 0
        for token in row:
            node, kept, _ = self.step(node, kept, token)
        gains = torch.full(self.completes.shape, float(kept.bit_count() - node.depth), device=self.completes.device)
        gains[self.completes] = float((kept | node.word()).bit_count() - node.depth)
        behind: Node | None = node
        while behind is not None:
            for token in behind.children:
                gains[token] = self.step(node, kept, token)[2]
            behind = behind.shorter
        return gains

    def step(self, node: Node, kept: int, token: int) -> tuple[Node, int, int]:
        """Reads one token: the new node, the tokens that now keep their bonus, and the change in tokens that have one.

        kept: bit n is set if the node's n-th token from the end keeps its bonus, as part of a completed word
        """
        change = -node.depth
        if self.completes[token]:
            kept |= node.word()
        while token not in node.children and (shorter := node.shorter) is not None:
            change += (kept >> shorter.depth).bit_count()
            node, kept = shorter, kept & ((1 << shorter.depth) - 1)
        if token in node.children:
            node, kept = node.children[token], kept << 1
        return node, kept, change + node.depth


@lru_cache(maxsize=1)
def tree_of(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> Node:
    """The tree of the hot words as a text begins with them.

    Many tokenizers write a word differently after another word. The tree of those tokens is the `shorter` of this tree's root.
    Raises UserError for words that the tokenizer cannot write.
    """
    first, later = Node(), Node()
    before = known_word(tokenizer)
    num_before = len(inner_ids(tokenizer, before))
    tokens = {word: inner_ids(tokenizer, word) for word in words}
    if unknown := [word for word, ids in tokens.items() if not ids or tokenizer.unk_token_id in ids]:
        wrong = f"the decoder's tokenizer cannot write {', '.join(map(repr, unknown))}"
        write = "write words of its characters, such as lower-case ones"
        raise UserError("decoding.hotwords", list(words), wrong, write)
    for word, ids in tokens.items():
        first.add(ids)
        later.add(inner_ids(tokenizer, f"{before} {word}")[num_before:])
    later.link(later)
    first.shorter = later
    first.link(later)
    return first


def inner_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
