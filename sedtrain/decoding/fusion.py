"""Shallow fusion: a language model scores each word that the search completes.

R rows of beams, U tokens, V vocabulary of the decoder, N texts, L tokens of the language model.
Words are scored, not tokens, so that the language model may have any tokenizer.
Sources: shallow fusion, arXiv 1503.03535; scores of completed words, arXiv 2501.09258.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from sedtrain.decoding.alignment import texts_of
from sedtrain.errors import UserError
from sedtrain.models.loading import check_loaded, load_tokenizer, loading
from sedtrain.models.positions import max_tokens
from sedtrain.text.spacing import UNSPACED


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer; `start` and `end` are the tokens around a text, None where it has none."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    start: int | None
    end: int | None

    @torch.inference_mode()
    def log_probs(self, texts: Sequence[str], are_whole: bool) -> list[float]:
        """N log-probabilities of texts; whole texts are scored with the end token."""
        before, behind = ([] if token is None else [token] for token in (self.start, self.end))
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        rows = [[*before, *row, *(behind if are_whole else [])] for row in rows]
        pieces = [(number, *piece) for number, row in enumerate(rows) for piece in self.pieces(row)]
        scores = torch.zeros(len(texts))
        if pieces:
            numbers, ids, scored = zip(*pieces, strict=True)
            found = self.scores_of(pad_sequence([*ids], True), pad_sequence([*scored], True))
            scores.index_add_(0, torch.tensor(numbers), found)
        return scores.tolist()

    def pieces(self, ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of a text, as (L,) tokens and a mask of those to score.

        A piece fits the model's positions. The first half of each later piece is context and is not scored again.
        """
        half = (max_tokens(self.model) or len(ids) + 1) // 2
        for start in range(0, max(len(ids) - half, half), half):
            piece = torch.tensor(ids[start : start + 2 * half], dtype=torch.long)
            if len(piece) > 1:
                yield piece, torch.arange(len(piece)) >= (half if start else 1)

    def scores_of(self, ids: Tensor, scored: Tensor) -> Tensor:
        """(M, L) tokens, padded at the end -> (M,) log-probabilities of the scored tokens."""
        log_probs = self.model(input_ids=ids.to(self.model.device)).logits[:, :-1].float().log_softmax(-1).cpu()
        found: Tensor = log_probs.gather(2, ids[:, 1:, None])[..., 0]
        return found.masked_fill(~scored[:, 1:], 0.0).sum(1)


@lru_cache(maxsize=1)
def language_model(name: str) -> LanguageModel:
    """The causal language model in a folder or of a Hub id, on the CPU. Raises UserError for anything else."""
    with loading("decoding.lm", name):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_loaded("decoding.lm", name, model, loaded, used=model, is_trained=True)
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", True) is False:
        wrong = f"{type(model).__name__} does not write from left to right"
        raise UserError("decoding.lm", name, wrong, "write decoding.lm=FOLDER of a causal language model")
    tokenizer = load_tokenizer("decoding.lm", name)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return LanguageModel(model.eval(), tokenizer, end if start is None else start, end)


@dataclass(eq=False)
class Fusion(LogitsProcessor):
    """Adds `weight` · log p(word | words before it) to tokens that complete a word: the first token of the next, and the end.

    tokenizer: of the decoder
    begins:    (V,) True for a token that begins a word, see `word_beginnings`
    ends:      tokens that end a text
    num_given: tokens of the prompt
    known:     scores of texts already computed in this search
    """

    language_model: LanguageModel
    weight: float
    tokenizer: PreTrainedTokenizerBase
    begins: Tensor
    ends: list[int]
    num_given: int
    known: dict[tuple[str, bool], float] = field(default_factory=lambda: {("", False): 0.0})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(R, U) tokens, (R, V) scores of the decoder -> (R, V) scores of both."""
        rows = input_ids[:, self.num_given :]
        is_first = self.begins[rows] & (torch.arange(rows.shape[1], device=rows.device) > 0)
        of_last = [int(max(row.nonzero(), default=0)) for row in is_first]  # token that begins the last word
        texts = texts_of(self.tokenizer, rows.tolist())
        scored = texts_of(self.tokenizer, [row[:start] for row, start in zip(rows.tolist(), of_last, strict=True)])
        before = self.log_probs(scored, False)
        scores = scores + self.weight * (self.log_probs(texts, False) - before)[:, None] * self.begins
        scores[:, self.ends] += self.weight * (self.log_probs(texts, True) - before)[:, None]
        return scores

    def log_probs(self, texts: Sequence[str], are_whole: bool) -> Tensor:
        """(R,) scores of texts, each computed once."""
        new = [text for text in dict.fromkeys(texts) if (text, are_whole) not in self.known]
        if new:
            found = self.language_model.log_probs(new, are_whole)
            self.known |= {(text, are_whole): score for text, score in zip(new, found, strict=True)}
        return torch.tensor([self.known[text, are_whole] for text in texts], device=self.begins.device)


@lru_cache(maxsize=2)
def word_beginnings(tokenizer: PreTrainedTokenizerBase, size: int, device: torch.device) -> Tensor:
    """(V,) True for a token that begins a new word after another: it starts with white space or is an ideograph."""
    before = tokenizer(known_word(tokenizer), add_special_tokens=False)["input_ids"]
    alone = tokenizer.decode(before)
    written = tokenizer.batch_decode([[*before, token] for token in range(min(size, len(tokenizer)))])
    begins = torch.zeros(size, dtype=torch.bool)
    for token, text in enumerate(written):
        behind = text.removeprefix(alone)
        begins[token] = bool(behind[:1].isspace() or UNSPACED.match(behind))
    begins[[token for token in tokenizer.all_special_ids if token < size]] = False
    return begins.to(device)


def known_word(tokenizer: PreTrainedTokenizerBase) -> str:
    """A word that the tokenizer knows: the text of its first token that is made of letters."""
    texts = (tokenizer.decode([token]).strip() for token in range(len(tokenizer)))
    return next((text for text in texts if text.isalpha()), "a")
