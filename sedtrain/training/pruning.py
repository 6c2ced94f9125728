"""Reports the validations of a search's trial to its Optuna study, and ends a trial that falls behind."""

import lightning

from sedtrain.errors import Unfinished, UserError

PRUNED_AT = "pruned_at_step"  # attribute of a trial in the study


class Reporting(lightning.Callback):
    """Reports a metric of every validation to Optuna's study, and ends the run where the study would prune it.

    storage, study, number: which trial
    prunes: whether a trial ends whose best validation is worse than the median of others at that step
    full_trials: trials that run to their end before any is pruned
    warmup_steps: step before which none is pruned
    """

    def __init__(
        self,
        storage: str,
        study: str,
        number: int,
        metric: str,
        prunes: bool = True,
        full_trials: int = 5,
        warmup_steps: int = 0,
    ) -> None:
        self.storage, self.study, self.number, self.metric = storage, study, number, metric
        self.prunes, self.full_trials, self.warmup_steps = prunes, full_trials, warmup_steps

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
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
        """Whether the trial should be pruned."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=self.full_trials, n_warmup_steps=self.warmup_steps)
        study = optuna.load_study(study_name=self.study, storage=self.storage, pruner=pruner)
        frozen = study.trials[self.number]
        trial = optuna.trial.Trial(study, frozen._trial_id)
        if step not in frozen.intermediate_values:  # a run that resumes may repeat a validation
            trial.report(value, step)
        worse = self.prunes and trial.should_prune()
        if worse:
            trial.set_user_attr(PRUNED_AT, step)
        return worse
