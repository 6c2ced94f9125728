"""Reports the validations of one trial to the Optuna study of a search, which may prune it."""

from typing import Literal

from lightning import Callback, LightningModule, Trainer

from sedtrain.errors import Unfinished, UserError


class TrialReport(Callback):
    """Reports a metric of every validation, and ends the run if the study prunes it.

    storage, study, number: database, study and number of the trial
    pruner: median ends a trial whose best validation is worse than the median of other trials at that step
    full_trials: number of trials that run to their end before any is pruned
    warmup_steps: no trial is pruned before this step
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
        """Raises Unfinished on every rank of a pruned trial, UserError for a metric that the run does not log."""
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.metric)
        if value is None:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError("hydra.sweeper.metric", self.metric, "this run does not log it", f"write one of {logged}")
        worse = trainer.is_global_zero and self.report(float(value), trainer.global_step)
        if trainer.strategy.reduce_boolean_decision(worse, all=False):
            better = f"other trials were better; {self.metric} {value:.4g}"
            raise Unfinished(f"pruned at step {trainer.global_step}: {better}", status=0)  # it has not failed

    def report(self, value: float, step: int) -> bool:
        """True if the trial ends here; the study records it as pruned."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=self.full_trials, n_warmup_steps=self.warmup_steps)
        study = optuna.load_study(study_name=self.study, storage=self.storage, pruner=pruner)
        frozen = study.trials[self.number]
        trial = optuna.trial.Trial(study, frozen._trial_id)
        if step not in frozen.intermediate_values:  # a resumed run may repeat a validation
            trial.report(value, step)
        worse = self.pruner == "median" and trial.should_prune()
        if worse:
            study.tell(self.number, state=optuna.trial.TrialState.PRUNED)
        return worse
