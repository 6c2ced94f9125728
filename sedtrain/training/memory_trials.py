"""Training steps on noise, by the run's own Trainer, that measure the memory and time of a batch."""

import copy
import warnings
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch
from lightning import Callback, Trainer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sedtrain.batch import Batch
from sedtrain.data.collate import Collator
from sedtrain.errors import UserError
from sedtrain.training.averaging import EMA
from sedtrain.training.memory import MemoryMeter, OutOfMemory
from sedtrain.training.module import SpeechSeq2SeqModule
from sedtrain.training.run import TrainingRun

SMALL_STEPS = 2
"""Steps before the measured one; they allocate the gradients and the optimizer's state."""


class Trial(NamedTuple):
    """A measured step on one batch.

    peak:    bytes; None if memory ran out
    at_rest: bytes before the step: weights, gradients, optimizer state, libraries
    seconds: duration of the step
    """

    utterances: int
    peak: int | None
    at_rest: int
    seconds: float


class TrialSteps(Callback):
    """Takes the largest steps of one rank: every layer trains, and none is dropped at random.

    The learning rate is 0, so no weight changes.
    """

    def __init__(self, run: TrainingRun, make_trainer: Callable[..., Trainer], memory: MemoryMeter) -> None:
        self.run, self.make_trainer, self.memory = run, make_trainer, memory
        self.measured: Trial | None = None
        run.module.scheduler = lambda optimizer, num_training_steps: LambdaLR(optimizer, lambda step: 0.0)
        run.finetuning.starts = dict.fromkeys(run.finetuning.starts, 0)
        for component in (run.saved.model.encoder, run.saved.model.decoder):
            for name in component.config.to_dict():
                if name.endswith("layerdrop"):
                    setattr(component.config, name, 0.0)

    def trial(self, seconds: float, tokens: int, utterances: int) -> Trial:
        """Measures a step on utterances of this length. Raises OutOfMemory if memory runs out before that step."""
        module, collator = unsharded_twin(self.run.module), self.run.data.collator
        assert collator is not None
        module.zero_grad(set_to_none=True)
        self.memory.reset()
        self.measured = None
        batches = [noise(collator, 1.0, 2, 1)] * SMALL_STEPS + [noise(collator, seconds, tokens, utterances)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # training itself shows them once
                self.trainer().fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        except OutOfMemory:
            if self.measured is None:
                raise
        assert self.measured is not None
        return self.measured

    def trainer(self) -> Trainer:
        """The run's own Trainer, for a few steps of one process."""
        device = self.run.trainer.strategy.root_device
        return self.make_trainer(
            devices=1 if device.index is None else [device.index],
            num_nodes=1,
            fast_dev_run=SMALL_STEPS + 1,
            max_time=None,
            accumulate_grad_batches=1,
            callbacks=[*self.run.callbacks(EMA), self.run.finetuning, self],
            default_root_dir=self.run.folder,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: object, batch: Batch, batch_idx: int) -> None:
        if batch_idx == SMALL_STEPS:
            self.memory.reset()
            self.measured = Trial(len(batch), None, self.memory.used(), 0.0)
            self.started = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: object, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Raises UserError if the optimizer skipped every step: a real step takes more memory."""
        if batch_idx == SMALL_STEPS:
            assert self.measured is not None
            peak, seconds = self.memory.peak(), perf_counter() - self.started
            self.measured = self.measured._replace(peak=peak, seconds=seconds)
            if not all(optimizer.state for optimizer in trainer.optimizers):
                wrong = "steps on noise have no finite gradient, so the optimizer skips all of them"
                write = "write trainer.precision=bf16-mixed or 32-true"
                raise UserError("trainer.precision", trainer.precision, wrong, write)


def unsharded_twin(module: SpeechSeq2SeqModule) -> SpeechSeq2SeqModule:
    """A second module around the same model: FSDP marks the module of a fit, and refuses to shard it again."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


def noise(collator: Collator, seconds: float, tokens: int, utterances: int) -> Batch:
    """A batch of noise. Its texts alternate two tokens: CTC needs an extra frame between equal ones."""
    features = collator.features(0.1 * torch.randn(round(seconds * collator.sampling_rate)))
    inputs = features.expand(utterances, *features.shape).contiguous()
    special = set(collator.tokenizer.all_special_ids)
    ordinary = [id for id in range(len(collator.tokenizer)) if id not in special][:2]
    return Batch(
        inputs=inputs.transpose(1, 2) if collator.time_is_last else inputs,
        attention_mask=torch.ones(utterances, len(features), dtype=torch.long),
        labels=torch.tensor((ordinary * tokens)[:tokens]).expand(utterances, tokens).contiguous(),
        ids=["noise"] * utterances,
        texts=[""] * utterances,
        seconds=utterances * seconds,
    )
