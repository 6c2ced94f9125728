"""What is kept from ending a long training, and what is told of it: bad steps, spikes of the loss, a deaf decoder."""

import json
import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn

from sedtrain.batch import Batch
from sedtrain.errors import UserError, require
from sedtrain.training.gradients import Update
from sedtrain.training.module import SpeechSeq2SeqModule

logger = logging.getLogger(__name__)

FILE = "bad_steps.jsonl"
HISTORY = 100
"""Steps whose losses a spike is measured against."""
ENOUGH = 20
"""Fewer losses are no measure."""


class Guards(lightning.Callback):
    """Counts the steps that a loss or gradient that is not finite left without effect, names their utterances, and stops a run
    that makes no other; reports spikes of the loss, gradient norms by part, and a decoder that does not listen.

    folder: of the run, for bad_steps.jsonl
    max_bad_steps: as many in a row end the run
    spike_deviations: a loss above the mean of the last 100 steps by as many standard deviations is reported
    min_audio_gain: nats per token; below it the decoder is said not to listen
    probe_after: from this fraction of the steps on, and after the first 100
    """

    counts_one_run = True  # another run that starts from a checkpoint of this one counts anew

    def __init__(
        self,
        folder: str,
        max_bad_steps: int = 10,
        spike_deviations: float = 6.0,
        min_audio_gain: float = 0.05,
        probe_after: float = 0.25,
    ) -> None:
        require(max_bad_steps >= 1, "callbacks.guards.max_bad_steps", max_bad_steps, "1 or more")
        require(spike_deviations > 0, "callbacks.guards.spike_deviations", spike_deviations, "a number above 0")
        require(0 <= probe_after <= 1, "callbacks.guards.probe_after", probe_after, "a fraction from 0 to 1")
        self.file = Path(folder) / FILE
        self.max_bad_steps, self.spike_deviations = max_bad_steps, spike_deviations
        self.min_audio_gain, self.probe_after = min_audio_gain, probe_after
        self.num_bad = self.num_in_a_row = self.num_spikes = 0
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.utterances: list[list[str]] = []
        self.seen: Update | None = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, SpeechSeq2SeqModule)
        self.utterances.append(batch.ids)
        update = pl_module.update
        if update is None or update is self.seen:
            return  # the optimizer has not stepped
        self.judge(trainer, update)
        self.seen, self.utterances = update, []
        pl_module.log_dict(
            {"train/bad_steps": float(self.num_bad), "train/loss_spikes": float(self.num_spikes)}, batch_size=1
        )
        if update.gradient_is_finite:
            norms = {f"gradient_norm/{part}": norm for part, norm in update.gradient_norms.items()}
            pl_module.log_dict(norms, batch_size=1)

    def judge(self, trainer: lightning.Trainer, update: Update) -> None:
        """Raises UserError after too many bad steps in a row."""
        if reason := what_is_wrong(trainer, update):
            self.num_bad += 1
            self.num_in_a_row += 1
            self.tell(trainer, update, reason)
            if self.num_in_a_row >= self.max_bad_steps:
                raise UserError(
                    f"{self.num_in_a_row} steps in a row had a loss or a gradient that is not finite and were left out; "
                    f"{self.file} names their utterances",
                    "a lower optimizer.lr, trainer.precision=32-true, or data without these utterances; "
                    "callbacks.guards.max_bad_steps=NUMBER to go on for longer",
                )
        elif update.num_tokens and update.gradient_is_finite:
            self.num_in_a_row = 0
            if self.is_spike(update.cross_entropy):
                self.num_spikes += 1
                self.tell(trainer, update, "loss spike")
            self.losses.append(update.cross_entropy)

    def is_spike(self, loss: float) -> bool:
        if len(self.losses) < ENOUGH:
            return False
        return loss > statistics.fmean(self.losses) + self.spike_deviations * statistics.stdev(self.losses)

    def tell(self, trainer: lightning.Trainer, update: Update, reason: str) -> None:
        """Writes the step, its loss and its utterances to bad_steps.jsonl."""
        utterances = self.named(trainer, update)
        if not trainer.is_global_zero:
            return
        skipped = reason != "loss spike"
        numbers = {"loss": update.cross_entropy, "ctc_loss": update.ctc, "gradient_norm": update.gradient_norm}
        line = {
            "step": trainer.global_step,
            "reason": reason,
            "skipped": skipped,
            **{name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
            "utterances": utterances,
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        logger.warning(
            "step %d: %s (loss %.3g, gradient norm %.3g)%s; its %d utterances are in %s",
            trainer.global_step,
            reason,
            update.cross_entropy,
            update.gradient_norm,
            ", left out" if skipped else "",
            len(utterances),
            self.file,
        )

    def named(self, trainer: lightning.Trainer, update: Update) -> list[str]:
        """The utterances of all ranks in the micro-batches whose loss is not finite, or in all where every loss is."""
        micro_batches = zip(self.utterances, update.micro_batches, strict=True)
        mine = [(ids, bool(sums.isfinite().all())) for ids, sums in micro_batches]
        of_ranks = [mine] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(of_ranks, mine)
        everything = [each for rank in of_ranks for each in rank]
        chosen = [ids for ids, is_finite in everything if not is_finite] or [ids for ids, _ in everything]
        return [each for ids in chosen for each in ids]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Warns of a decoder that does not listen, once training is past its beginning."""
        gain = trainer.callback_metrics.get("val/audio_gain")
        if gain is None or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        beginning = max(HISTORY, self.probe_after * trainer.estimated_stepping_batches)
        if trainer.global_step >= beginning and gain < self.min_audio_gain:
            logger.warning(
                "step %d: the decoder hardly listens: with the audio of other utterances its loss is %.3f nats per token "
                "higher than with their own (val/audio_gain); try loss.ctc_weight=0.3, finetune=all, more warm-up "
                "(scheduler.warmup_fraction), another optimizer.lr, or more steps",
                trainer.global_step,
                gain,
            )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.num_bad and trainer.is_global_zero:
            logger.warning("%d steps were left out for what is not finite; see %s", self.num_bad, self.file)

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("num_bad", "num_in_a_row", "num_spikes")}
        return {**counts, "losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("num_bad", "num_in_a_row", "num_spikes"):
            setattr(self, name, state_dict[name])
        self.losses.extend(state_dict["losses"])


def what_is_wrong(trainer: lightning.Trainer, update: Update) -> str | None:
    """Why a step was left out; a gradient too large for float16 is the scaler's business as long as its scale can fall."""
    if not update.loss_is_finite:
        return "the loss is not finite"
    if update.gradient_is_finite:
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return "the gradient is not finite" if scaler is None or scaler.get_scale() < 1 else None
