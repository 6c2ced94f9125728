"""One optimizer step on eight utterances, split into micro-batches and ranks in many ways.

`two_ranks.py` launches the splits of two ranks.
"""

import os
from functools import partial
from itertools import product

import lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from pairs import END, VOCABULARY, joined
from torch.nn.utils import parameters_to_vector

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.models.losses import LossWeights
from sedtrain.training.guards import Guards
from sedtrain.training.module import SpeechSeq2SeqModule

SAMPLES = [1200, 5000, 2600, 8000, 900, 3300, 6100, 1700]
TOKENS = [2, 7, 1, 9, 3, 4, 8, 2]
# The utterances of each micro-batch, by rank.
CUTS = {
    "8 × 1": [[[0, 1, 2, 3, 4, 5, 6, 7]]],
    "4 × 2": [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    "1 × 8": [[[each] for each in range(8)]],
    "5, 1 and 2, × 3": [[[0, 1, 2, 3, 4], [5], [6, 7]]],
    "7 and none, × 3": [[[0, 1, 2, 3, 4, 5, 6], [7], []]],
    "4 × 1 × 2 ranks": [[[0, 1, 2, 3]], [[4, 5, 6, 7]]],
    "2 × 2 × 2 ranks": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    "6, 1 and 1, none × 2 ranks": [[[0, 1, 2, 3, 4, 5], [6]], [[7], []]],
}
KINDS = ["whole whisper", "m2m_100", "t5", "llama"]
"""Decoders out of whole models, of each kind of positions, and a language model."""
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]


def batch(utterances, is_padded=False):
    """Some of the eight utterances; with `is_padded`, noise and padding follow that nobody needs."""
    if not utterances:
        none = torch.zeros(0, 0, dtype=torch.long)
        return Batch(none.float(), none, none, [], [], 0.0)
    length = max(SAMPLES[each] for each in utterances) + 2000 * is_padded
    width = max(TOKENS[each] for each in utterances) + 1 + 3 * is_padded
    inputs = torch.randn(len(utterances), length) * is_padded
    mask = torch.zeros(len(utterances), length, dtype=torch.long)
    labels = torch.full((len(utterances), width), IGNORE_INDEX)
    for row, each in enumerate(utterances):
        generator = torch.Generator().manual_seed(each)
        inputs[row, : SAMPLES[each]] = torch.randn(SAMPLES[each], generator=generator)
        mask[row, : SAMPLES[each]] = 1
        labels[row, : TOKENS[each]] = torch.randint(6, VOCABULARY, (TOKENS[each],), generator=generator)
        labels[row, TOKENS[each]] = END
    return Batch(inputs, mask, labels, [f"utterance {each}" for each in utterances], [""] * len(utterances), 0.5)


def new_module(decoder="bert"):
    """A module with the same weights at every call; a step of its SGD moves them by the gradient itself."""
    model = joined("hubert", decoder).train()
    model.add_ctc_head(VOCABULARY)
    constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
    return SpeechSeq2SeqModule(
        model,
        tokenizer=None,
        weights=LossWeights(label_smoothing=0.1, ctc_weight=0.3),
        metric_set=MetricSet(["wer"]),
        decoding=DecodingOptions(),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=lambda optimizer, num_training_steps: constant(optimizer),
    )


class Loader:
    """The batches of one rank, once."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def trainer_of(precision, **options):
    """A trainer on the CPU; for float16 with the loss scaler that Lightning keeps to GPUs."""
    chosen = {"precision": precision}
    if precision == "16-mixed":
        chosen = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    return lightning.Trainer(
        **{"max_steps": 1, **options}, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, accelerator="cpu", **chosen,
    )  # fmt: skip


def trained(cut, precision="32-true", is_padded=False, decoder="bert", **options):
    """The module after one step, and the update of its weights."""
    module = new_module(decoder)
    before = parameters_to_vector(module.parameters()).detach().double()
    mine = cut[int(os.environ.get("RANK", 0))]
    options = {"devices": len(cut), "accumulate_grad_batches": len(mine), **options}
    trainer_of(precision, **options).fit(module, Loader([batch(each, is_padded) for each in mine]))
    return module, parameters_to_vector(module.parameters()).detach().double() - before


class Synchronised(lightning.Callback):
    """Records for every micro-batch whether its gradients are reduced over the ranks."""

    def __init__(self):
        self.seen = []

    def on_after_backward(self, trainer, pl_module):
        self.seen.append(trainer.strategy.model.require_backward_grad_sync)


def over_two_ranks():
    """By split, precision and padding: the update, whether each micro-batch synchronised, and the module's own `Update`."""
    results = {}
    for name, cut in CUTS.items():
        for precision in PRECISIONS if len(cut) == 2 else ():
            for is_padded in (False, True):
                synchronised = Synchronised()
                module, moved = trained(cut, precision, is_padded, strategy="ddp", callbacks=[synchronised])
                results[name, precision, is_padded] = moved, synchronised.seen, module.update
    for name, decoder in product(["2 × 2 × 2 ranks", "6, 1 and 1, none × 2 ranks"], KINDS):
        results[name, decoder] = trained(CUTS[name], is_padded=True, decoder=decoder, strategy="ddp")[1]
    return results


def after_a_bad_batch(folder):
    """The weights of this rank after three steps of two micro-batches; in the second step, one of rank 1 holds a NaN."""
    module, rank = new_module(), int(os.environ["RANK"])
    batches = [batch([each]) for each in ([0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5])[rank]]
    if rank == 1:
        batches[3].inputs[0, 7] = torch.nan
    options = {"max_steps": 3, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    trainer_of("32-true", callbacks=[Guards(folder)], **options).fit(module, Loader(batches))
    return parameters_to_vector(module.parameters()).detach()


def measure_ranks(folder):
    torch.save((over_two_ranks(), after_a_bad_batch(folder)), folder / f"out.{os.environ['RANK']}")
