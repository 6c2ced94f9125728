"""Joint scores of decoder and CTC: in every step of a beam, or for whole texts that CTC has found.

B batch, K beams, P prompt, U tokens, V vocabulary of the decoder. A joint score is (1 - w) · log p(decoder) + w · log p(CTC).
Source: Watanabe et al. 2017 (doi 10.1109/JSTSP.2017.2763455); the loss with the same weights: arXiv 1609.06773.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from sedtrain.decoding.ctc import IMPOSSIBLE, Lattice, Prefixes
from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.prefix import is_prefixed
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


class JointScores(LogitsProcessor):
    """Mixes into each token's score the change that the token makes to the CTC score of the text.

    An end token changes it to the score of the whole text. The scores of a hypothesis then sum to its joint score.

    ends: tokens that end a text
    """

    def __init__(self, lattice: Lattice, ctc_weight: float, ends: Collection[int]) -> None:
        self.prefixes, self.ctc_weight, self.ends = Prefixes.empty(lattice), ctc_weight, list(ends)
        self.ids: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B K, U) tokens, (B K, V) scores of the decoder -> (B K, V) joint scores."""
        beams = input_ids.unflatten(0, (len(self.prefixes.scores), -1))
        self.follow(beams)
        before = self.prefixes.scores[..., None]
        ctc = pad(self.prefixes.extensions(), (0, scores.shape[1]), value=IMPOSSIBLE)[..., : scores.shape[1]]
        ctc[..., self.ends] = self.prefixes.whole[..., None]
        gain = torch.where(ctc.isneginf(), IMPOSSIBLE, ctc - before).flatten(0, 1)
        scores = scores.log_softmax(-1) if beams.shape[1] == 1 else scores  # beam search has normalised them
        if self.ctc_weight == 1:
            return gain.masked_fill(scores.isneginf(), IMPOSSIBLE)
        return (1 - self.ctc_weight) * scores + self.ctc_weight * gain

    def follow(self, beams: Tensor) -> None:
        """Extends the prefix of each parent beam by the last token of its (B, K, U) children."""
        if self.ids is None:
            parents = torch.zeros_like(beams[..., 0])
            self.prefixes = self.prefixes.chosen(parents)
        else:
            same = (beams[:, :, None, :-1] == self.ids[:, None]).all(-1)
            self.prefixes = self.prefixes.extended(same.int().argmax(-1), beams[..., -1])
        self.ids = beams


def rescored(
    model: SpeechEncoderDecoder,
    encoded: EncodedSpeech,
    prompts: Tensor,
    found: list[Hypotheses],
    ctc_weight: float,
    num_best: int,
) -> list[Hypotheses]:
    """The `num_best` texts of CTC with the best joint scores. The decoder scores the n-th texts of all utterances at once.

    prompts: (B, P) start token and tags
    """
    end = model.config.eos_token_id
    most = max(len(each.ids) for each in found)
    ranks = [[each.ids[min(n, len(each.ids) - 1)] for each in found] for n in range(most)]
    decoder = torch.stack([decoder_scores(model, encoded, prompts, [[*ids, end] for ids in rank]) for rank in ranks], 1)
    return [reordered(each, row, ctc_weight, num_best) for each, row in zip(found, decoder.tolist(), strict=True)]


def reordered(found: Hypotheses, decoder: list[float], ctc_weight: float, num_best: int) -> Hypotheses:
    assert found.scores is not None
    joint = [(1 - ctc_weight) * a + ctc_weight * c for a, c in zip(decoder, found.scores, strict=False)]
    order = sorted(range(len(joint)), key=joint.__getitem__, reverse=True)[:num_best]
    return replace(found, ids=[found.ids[n] for n in order], scores=[joint[n] for n in order])


def decoder_scores(
    model: SpeechEncoderDecoder, encoded: EncodedSpeech, prompts: Tensor, texts: list[list[int]]
) -> Tensor:
    """(B,) log-probabilities of one text per utterance, after its prompt."""
    targets = pad_sequence([torch.tensor(ids, device=prompts.device) for ids in texts], True, -1)
    inputs = torch.cat([prompts, targets[:, :-1].clamp(min=0)], 1)
    mask = None
    if is_prefixed(model.config.decoder):  # there padding would take positions
        mask = torch.cat([torch.ones_like(prompts), (targets[:, 1:] >= 0).long()], 1)
    logits = model(
        encoder_outputs=encoded, decoder_input_ids=inputs, decoder_attention_mask=mask, use_cache=False
    ).logits
    log_probs: Tensor = logits[:, prompts.shape[1] - 1 :].float().log_softmax(-1)
    return log_probs.gather(2, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0.0).sum(1)
