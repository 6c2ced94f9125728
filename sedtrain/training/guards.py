"""Callbacks that watch a run: skipped steps, a loss that rises, a decoder that does not listen, a trial that falls behind."""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from sedtrain.annotations import checked
from sedtrain.batch import Batch
from sedtrain.errors import Unfinished, UserError
from sedtrain.ranges import Count, Finite, Fraction, Positive
from sedtrain.training.checkpoints import gather_states
from sedtrain.training.gradients import Update, on_host

logger = logging.getLogger(__name__)

HISTORY, ENOUGH = 100, 30  # steps, at most and at least, that the last ones are compared with
LASTING = 10  # steps for which the loss has to stay up
COUNTS = ("num_bad", "num_in_a_row", "num_rises")


class Step(NamedTuple):
    """A step of the optimizer whose numbers may not have been read yet.

    utterances: of each of this rank's micro-batches
    """

    number: int
    update: Update
    utterances: list[list[str]]

    def suspects(self) -> list[str]:
        """The utterances of all ranks in micro-batches with a loss that is not finite; all, if every loss is finite."""
        own = list(zip(self.utterances, self.update.micro_batches.isfinite().all(dim=1).tolist(), strict=True))
        micro_batches = [micro_batch for rank in gather_states(own) for micro_batch in rank]
        chosen = [ids for ids, is_finite in micro_batches if not is_finite] or [ids for ids, _ in micro_batches]
        return [utterance for ids in chosen for utterance in ids]


class Guards(Callback):
    """Counts the steps that were skipped for a loss or gradient that is not finite, and names their utterances in a file.

    Stops a run that makes only such steps. Reports a loss that rises and stays up, gradient norms by part of the model,
    and a decoder that hardly listens.

    folder:         of the run, for bad_steps.jsonl
    max_bad_steps:  as many in a row stop the run
    min_loss_rise:  nats per token; see `lasting_rise`
    min_audio_gain: nats per token; a decoder that gains less from the right audio hardly listens
    probe_after:    says so from this fraction of the steps on, and after the first 100
    """

    counts_one_run = True  # another run that starts from a checkpoint of this one begins at 0

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
            return  # the optimizer has not stepped
        self.unread.append(Step(trainer.global_step, update, self.utterances))
        self.latest, self.utterances = update, []
        if not pl_module.is_read:
            return
        self.judge_all(trainer)
        if not trainer._logger_connector.should_update_logs:
            return  # Lightning takes milliseconds for values that no logger gets
        logged = {"train/bad_steps": float(self.num_bad), "train/loss_rises": float(self.num_rises)}
        if update.gradient_is_finite:
            logged |= {f"gradient_norm/{part}": norm for part, norm in update.gradient_norms.items()}
        pl_module.log_dict(on_host(logged), batch_size=1)

    def judge_all(self, trainer: Trainer) -> None:
        """Judges the steps whose numbers have not been read. Raises UserError after too many bad ones in a row."""
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
                write = "write a lower optimizer.lr, trainer.precision=32-true, or data without these utterances; "
                write += "a higher callbacks.guards.max_bad_steps lets the run continue for longer"
                option, wrong = "callbacks.guards.max_bad_steps", f"{wrong}{self.file} names their utterances"
                raise UserError(option, self.max_bad_steps, wrong, write)
        elif update.num_tokens and update.gradient_is_finite:
            self.num_in_a_row = 0
            self.losses.append(update.cross_entropy)
            if rise := lasting_rise(self.losses, self.min_loss_rise):
                self.num_rises += 1
                reason = "the loss rose from {:.2f} to {:.2f} nats per token and stays up".format(*rise)
                advice = "try a lower optimizer.lr or more warm-up (scheduler.warmup_fraction), or see whether these texts fit"
                self.note(trainer, step, reason, advice)
                self.losses.clear()  # from here on, this is what is usual

    def note(self, trainer: Trainer, step: Step, reason: str, then: str) -> None:
        """Writes the step, its loss and its utterances to bad_steps.jsonl, and warns."""
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
        logger.warning(text, step.number, reason, measured, then, len(utterances), self.file)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.judge_all(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns of a decoder that hardly listens, once training is past its beginning."""
        gain = trainer.callback_metrics.get("val/audio_gain")
        if gain is None or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        beginning = max(HISTORY, self.probe_after * trainer.estimated_stepping_batches)
        if trainer.global_step >= beginning and gain < self.min_audio_gain:
            text = (
                "step %d: the decoder hardly listens to the audio: the audio of other utterances raises its loss by only "
                "%.3f nats per token (val/audio_gain); try loss.ctc_weight=0.3, finetune=all, more warm-up "
                "(scheduler.warmup_fraction), another optimizer.lr, or more steps"
            )
            logger.warning(text, trainer.global_step, gain)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Judges before the checkpoint is written; runs on all ranks."""
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
        vars(self).update({name: state_dict.get(name, 0) for name in COUNTS})  # older ones count other things
        self.losses.extend(state_dict["losses"])


def lasting_rise(losses: Sequence[float], least: float) -> tuple[float, float] | None:
    """Medians of the up to 100 losses before the last 10, and of these, if all of these are above nine tenths of the others.

    None for less of a rise. Of 110 losses in random order the last 10 are so once in 250 million times, however they are
    distributed: batches of few or hard tokens are no reason, and a loss that falls makes it rarer still.
    """
    before, last = list(losses)[:-LASTING], list(losses)[-LASTING:]
    if len(before) < ENOUGH or 10 * sum(loss >= min(last) for loss in before) > len(before):
        return None
    medians = statistics.median(before), statistics.median(last)
    return medians if medians[1] - medians[0] >= least else None


def reason_to_skip(trainer: Trainer, update: Update) -> str | None:
    """The reason why a step was skipped; None for an overflow in float16, as long as the scaler can lower its scale."""
    if not update.loss_is_finite:
        return "the loss is not finite"
    if update.gradient_is_finite:
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return "the gradient is not finite" if scaler is None or scaler.get_scale() < 1 else None


class Reporting(Callback):
    """Reports a metric of every validation to Optuna's study, and ends the run where the study would prune it.

    storage, study, number: which trial
    pruner: median ends a trial whose best validation is worse than the median of others at that step
    full_trials: trials that run to their end before any is pruned
    warmup_steps: step before which none is pruned
    """

    def __init__(
        self,
        storage: str,
        study: str,
        number: int,
        metric: str,
        pruner: Literal["median", "none"] = "median",
        full_trials: int = 5,
        warmup_steps: int = 0,
    ) -> None:
        self.storage, self.study, self.number, self.metric = storage, study, number, metric
        self.pruner, self.full_trials, self.warmup_steps = pruner, full_trials, warmup_steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises Unfinished on every rank of a trial that falls behind, and UserError for a metric that is not logged."""
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.metric)
        if value is None:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError("hydra.sweeper.metric", self.metric, "this is not logged", f"write one of {logged}")
        worse = trainer.is_global_zero and self.report(float(value), trainer.global_step)
        if trainer.strategy.reduce_boolean_decision(worse, all=False):
            behind = f"other trials were better there; {self.metric} {value:.4g}"
            raise Unfinished(f"pruned at step {trainer.global_step}: {behind}", status=0)  # it has not failed

    def report(self, value: float, step: int) -> bool:
        """True if the trial is to end; the study notes it as pruned."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=self.full_trials, n_warmup_steps=self.warmup_steps)
        study = optuna.load_study(study_name=self.study, storage=self.storage, pruner=pruner)
        frozen = study.trials[self.number]
        trial = optuna.trial.Trial(study, frozen._trial_id)
        if step not in frozen.intermediate_values:  # a run that resumes may repeat a validation
            trial.report(value, step)
        worse = self.pruner == "median" and trial.should_prune()
        if worse:
            study.tell(self.number, state=optuna.trial.TrialState.PRUNED)
        return worse
