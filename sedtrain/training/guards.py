"""Watches a run: skipped steps, a loss that rises and stays up, a decoder that hardly listens to the audio."""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from sedtrain.annotations import checked
from sedtrain.batch import Batch
from sedtrain.errors import UserError
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.ranges import Count, Finite, Fraction, Positive
from sedtrain.training.gradients import Update, on_host
from sedtrain.training.strategies import gather_states
from sedtrain.training.tracking import is_logged

logger = logging.getLogger(__name__)

LASTING = 10
"""Steps for which a risen loss must stay up before it is reported."""
HISTORY, MIN_HISTORY = 100, 30
"""Most and fewest earlier steps for the comparison."""
COUNTS = ("num_bad", "num_in_a_row", "num_rises")


class Step(NamedTuple):
    """An optimizer step whose numbers may still be on the device.

    utterances: ids in each of this rank's micro-batches
    """

    number: int
    update: Update
    utterances: list[list[str]]

    def suspects(self) -> list[str]:
        """Utterances in micro-batches with a non-finite loss, of all ranks; every utterance if all losses are finite."""
        own = list(zip(self.utterances, self.update.micro_batches.isfinite().all(dim=1).tolist(), strict=True))
        micro_batches = [micro_batch for rank in gather_states(own) for micro_batch in rank]
        chosen = [ids for ids, is_finite in micro_batches if not is_finite] or [ids for ids, _ in micro_batches]
        return [utterance for ids in chosen for utterance in ids]


class Guards(Callback):
    """Counts bad steps, which are skipped for a non-finite loss or gradient, and lists their utterances in a file.

    Stops a run after too many bad steps in a row. Logs gradient norms by part of the model. Warns of a loss that rises and
    stays up, and of a decoder that hardly listens.

    folder:         of the run, for bad_steps.jsonl
    max_bad_steps:  number of bad steps in a row that stops the run
    min_loss_rise:  nats per token; see `lasting_rise`
    min_audio_gain: nats per token; a decoder that gains less from the right audio hardly listens
    probe_after:    fraction of the steps before the first such warning; at least 100 steps
    """

    counts_one_run = True  # a new run that starts from this run's checkpoint counts from 0

    @checked("callbacks.guards.")
    def __init__(
        self,
        folder: str,
        max_bad_steps: Count = 10,
        min_loss_rise: Positive = 0.5,
        min_audio_gain: Finite = 0.05,
        probe_after: Fraction = 0.25,
    ) -> None:
        self.file = Path(folder) / "bad_steps.jsonl"
        self.max_bad_steps, self.min_loss_rise = max_bad_steps, min_loss_rise
        self.min_audio_gain, self.probe_after = min_audio_gain, probe_after
        self.num_bad = self.num_in_a_row = self.num_rises = 0
        self.losses: deque[float] = deque(maxlen=HISTORY + LASTING)
        self.utterances: list[list[str]] = []  # of each micro-batch since the last step
        self.latest: Update | None = None
        self.unread: list[Step] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        self.utterances.append(batch.ids)
        update: Update | None = pl_module.update
        if update is None or update is self.latest:
            return  # no optimizer step yet
        self.unread.append(Step(trainer.global_step, update, self.utterances))
        self.latest, self.utterances = update, []
        if not pl_module.is_read:
            return
        self.judge_all(trainer)
        if not is_logged(trainer):
            return  # log_dict takes milliseconds even if no logger receives the values
        logged = {"train/bad_steps": float(self.num_bad), "train/loss_rises": float(self.num_rises)}
        if update.gradient_is_finite:
            logged |= {f"gradient_norm/{part}": norm for part, norm in update.gradient_norms.items()}
        pl_module.log_dict(on_host(logged), batch_size=1)

    def judge_all(self, trainer: Trainer) -> None:
        """Judges the unread steps. Raises UserError after too many bad ones in a row."""
        unread, self.unread = self.unread, []
        for step in unread:
            self.judge(trainer, step)

    def judge(self, trainer: Trainer, step: Step) -> None:
        update = step.update
        if reason := reason_to_skip(trainer, update):
            self.num_bad += 1
            self.num_in_a_row += 1
            self.note(trainer, step, reason, "skipped")
            if self.num_in_a_row >= self.max_bad_steps:
                wrong = f"{self.num_in_a_row} steps in a row were skipped, since their loss or gradient is not finite\n"
                wrong += f"{self.file} names their utterances"
                write = "write a lower optimizer.lr, trainer.precision=32-true, or data without these utterances; "
                write += "a higher callbacks.guards.max_bad_steps lets the run continue for longer"
                raise UserError("callbacks.guards.max_bad_steps", self.max_bad_steps, wrong, write)
        elif update.num_tokens and update.gradient_is_finite:
            self.num_in_a_row = 0
            self.losses.append(update.cross_entropy)
            if rise := lasting_rise(self.losses, self.min_loss_rise):
                self.num_rises += 1
                reason = "the loss rose from {:.2f} to {:.2f} nats per token and stays up".format(*rise)
                advice = "try a lower optimizer.lr or more warm-up (scheduler.warmup_fraction), or check that the texts match"
                self.note(trainer, step, reason, advice)
                self.losses.clear()  # later losses are compared with the new level

    def note(self, trainer: Trainer, step: Step, reason: str, consequence: str) -> None:
        """Adds the step, its loss and its utterances to bad_steps.jsonl, and warns."""
        update, utterances = step.update, step.suspects()
        if not trainer.is_global_zero:
            return
        numbers = {"loss": update.cross_entropy, "ctc_loss": update.ctc, "gradient_norm": update.gradient_norm}
        line = {
            "step": step.number,
            "reason": reason,
            "skipped": bool(update.skipped),
            **{name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
            "utterances": utterances,
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        measured = f"loss {update.cross_entropy:.3g}, gradient norm {update.gradient_norm:.3g}"
        text = "step %d: %s (%s), %s; its %d utterances are in %s"
        logger.warning(text, step.number, reason, measured, consequence, len(utterances), self.file)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge_all(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns of a decoder that hardly listens, except early in training."""
        gain = trainer.callback_metrics.get("val/audio_gain")
        if gain is None or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        beginning = max(HISTORY, self.probe_after * trainer.estimated_stepping_batches)
        if trainer.global_step >= beginning and gain < self.min_audio_gain:
            text = (
                "step %d: the decoder hardly listens to the audio: with the audio of other utterances, its loss rises by only "
                "%.3f nats per token (val/audio_gain); try loss.ctc_weight=0.3, finetune=all, more warm-up "
                "(scheduler.warmup_fraction), another optimizer.lr, or more steps"
            )
            logger.warning(text, trainer.global_step, gain)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Judges the last steps, on all ranks, before the first rank writes the checkpoint."""
        self.judge_all(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge_all(trainer)
        if self.num_bad and trainer.is_global_zero:
            wrong = "steps were skipped, since their loss or gradient is not finite"
            logger.warning("%d %s; see %s", self.num_bad, wrong, self.file)

    def state_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in COUNTS}, "losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update({name: state_dict.get(name, 0) for name in COUNTS})  # older versions had other counts
        self.losses.extend(state_dict["losses"])


def lasting_rise(losses: Sequence[float], least: float) -> tuple[float, float] | None:
    """Medians of the earlier losses and of the last 10, if each of the last 10 exceeds nine tenths of the earlier ones.

    None if fewer than 30 losses came earlier, or if the medians differ by less than `least`. If 110 losses came in random
    order, this would happen once in 250 million times, whatever their distribution: batches of few or hard tokens do not
    cause it, and a falling loss makes it rarer still.
    """
    before, last = list(losses)[:-LASTING], list(losses)[-LASTING:]
    if len(before) < MIN_HISTORY or 10 * sum(loss >= min(last) for loss in before) > len(before):
        return None
    medians = statistics.median(before), statistics.median(last)
    return medians if medians[1] - medians[0] >= least else None


def reason_to_skip(trainer: Trainer, update: Update) -> str | None:
    """Why a step was skipped; None for an overflow in float16 while the scaler can still lower its scale."""
    if not update.loss_is_finite:
        return "the loss is not finite"
    if update.gradient_is_finite:
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return "the gradient is not finite" if scaler is None or scaler.get_scale() < 1 else None


class OtherAudio:
    """Exchanges the encoded audio of utterances, batch after batch."""

    def __init__(self) -> None:
        self.previous: EncodedSpeech | None = None

    def exchanged(self, encoded: EncodedSpeech) -> EncodedSpeech | None:
        """Gives each utterance the audio of the one before it in the batch; the first gets the last one's.

        A single utterance gets the first of the previous batch; None if there is no previous batch.
        """
        previous, self.previous = self.previous, encoded.rows([0])
        num_utterances = len(encoded.last_hidden_state)
        return previous if num_utterances == 1 else encoded.rows([num_utterances - 1, *range(num_utterances - 1)])
