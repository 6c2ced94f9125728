"""What a training tells the study that it is a trial of, and its end where the study has seen better."""

import lightning

from sedtrain.batch import UserError
from sedtrain.tasks import Unfinished

PRUNED_AT = "pruned_at_step"


class Pruned(Unfinished):
    """The training was worse than others at the same step; that is no failure."""

    status = 0


class Reporting(lightning.Callback):
    """Reports a metric of every validation to Optuna's study, and ends the training where the study would prune it.

    storage, study, number: which trial
    prunes: whether a trial ends whose best validation is worse than the median of others at that step
    full_trials, warmup_steps: as many trials come to their end before, and none ends before that step
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
        """Raises Pruned on every rank."""
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.metric)
        if value is None:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"hydra.sweeper.metric: {self.metric} is not logged", f"one of {logged}")
        worse = trainer.is_global_zero and self.report(float(value), trainer.global_step)
        if trainer.strategy.reduce_boolean_decision(worse, all=False):
            raise Pruned(
                f"pruned at step {trainer.global_step}: other trials were better there; {self.metric} {value:.4g}"
            )

    def report(self, value: float, step: int) -> bool:
        """Whether the trial should be pruned."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=self.full_trials, n_warmup_steps=self.warmup_steps)
        study = optuna.load_study(study_name=self.study, storage=self.storage, pruner=pruner)
        frozen = study.trials[self.number]
        trial = optuna.trial.Trial(study, frozen._trial_id)
        if step not in frozen.intermediate_values:  # of a training that goes on, it may be
            trial.report(value, step)
        worse = self.prunes and trial.should_prune()
        if worse:
            trial.set_user_attr(PRUNED_AT, step)
        return worse
