"""Training steps of a run on batches of noise, to see how much memory they take; they change no weight."""

import copy
import warnings
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning
import torch
from omegaconf import DictConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from sedtrain.averaging import EMA
from sedtrain.batch import Batch, UserError
from sedtrain.creation import create
from sedtrain.data.collate import Collator
from sedtrain.memory import OutOfMemory
from sedtrain.module import SpeechSeq2SeqModule
from sedtrain.peak_memory import Memory
from sedtrain.run import TrainingRun

SMALL_STEPS = 2  # before the one that is measured: gradients and the optimizer's state are there by then


@dataclass(frozen=True)
class Trial:
    """A step on a batch of so many utterances.

    peak:    bytes, None where memory ran out
    at_rest: bytes that were taken before the step, by weights, gradients and all the rest
    seconds: the step took
    """

    utterances: int
    peak: int | None
    at_rest: int
    seconds: float


class TrialSteps:
    """Steps as one process of the run makes them once all that is ever to move moves, with no layer left out by chance."""

    def __init__(self, cfg: DictConfig, run: TrainingRun, memory: Memory) -> None:
        self.cfg, self.run, self.memory = cfg, run, memory
        run.module.scheduler = standing_still
        run.finetuning.starts = dict.fromkeys(run.finetuning.starts, 0)
        for part in (run.saved.model.encoder, run.saved.model.decoder):
            for name in part.config.to_dict():
                if name.endswith("layerdrop"):
                    setattr(part.config, name, 0.0)

    def trial(self, seconds: float, tokens: int, utterances: int) -> Trial:
        """A step on utterances of this length. Raises OutOfMemory where memory runs out even before."""
        module, collator = untouched(self.run.module), self.run.data.collator
        assert collator is not None
        module.zero_grad(set_to_none=True)
        self.memory.forget()
        steps = [noise(collator, 1.0, 2, 1)] * SMALL_STEPS + [noise(collator, seconds, tokens, utterances)]
        watch = Watch(self.memory)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # training itself says once what there is to say
                self.trainer(watch).fit(module, DataLoader(steps, batch_size=None))  # type: ignore[arg-type]
        except OutOfMemory:
            if watch.at_rest is None:
                raise
        assert watch.at_rest is not None
        return Trial(utterances, watch.peak, watch.at_rest, watch.seconds)

    def trainer(self, watch: "Watch") -> lightning.Trainer:
        """The run's own, for a few steps of one process."""
        strategy, device = self.cfg.trainer.get("strategy", "auto"), self.run.trainer.strategy.root_device
        callbacks = [each for each in self.run.callbacks if isinstance(each, EMA)]
        several = {"strategy": "ddp"} if strategy == "auto" and self.run.trainer.world_size > 1 else {}
        trainer: lightning.Trainer = create(self.cfg, "trainer")(
            **several,
            devices=1 if device.index is None else [device.index],
            num_nodes=1,
            max_steps=SMALL_STEPS + 1,
            max_epochs=None,
            max_time=None,
            limit_train_batches=None,
            limit_val_batches=0,
            val_check_interval=None,
            accumulate_grad_batches=1,
            callbacks=[*callbacks, self.run.finetuning, watch],
            default_root_dir=self.cfg.run_dir,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        return trainer


class Watch(lightning.Callback):
    """What the last step took, of memory and of time."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.at_rest: int | None = None
        self.peak: int | None = None
        self.started = self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx == SMALL_STEPS:
            self.memory.forget()
            self.at_rest, self.started = self.memory.taken(), perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Raises UserError where the steps were without effect, so that a real one takes more."""
        if batch_idx == SMALL_STEPS:
            self.peak, self.seconds = self.memory.peak(), perf_counter() - self.started
            if not all(optimizer.state for optimizer in trainer.optimizers):
                raise UserError(
                    "task=fit_batches: no step on noise has a finite gradient, so that the optimizer never begins",
                    "trainer.precision=bf16-mixed or 32-true",
                )


def untouched(module: SpeechSeq2SeqModule) -> SpeechSeq2SeqModule:
    """The same module around the same model, to be fitted once: FSDP marks what it has cut, and refuses to cut it again."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


def standing_still(optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.0)


def noise(collator: Collator, seconds: float, tokens: int, utterances: int) -> Batch:
    """Utterances of noise with texts of two tokens in turn, which CTC can align."""
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
