"""The Trainer of a run: its callbacks in order, when it validates, and where it logs to."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning

from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import METRICS
from sedtrain.training.checkpoints import NEVER, ValidateEvery
from sedtrain.training.finetune import FineTuning
from sedtrain.training.loggers import Tracker, Tracking
from sedtrain.training.progress import ProgressBar


def run_trainer(
    make: Callable[..., lightning.Trainer],
    settings: Mapping[str, Any],
    callbacks: Mapping[str, lightning.Callback | partial[lightning.Callback]],
    loggers: Sequence[Tracker],
    finetuning: FineTuning,
    main_metric: str,
) -> lightning.Trainer:
    """The Trainer that `make` builds with the options of `trainer`, and with what follows from other options.

    settings:  the whole configuration as plain values
    callbacks: by name; a partial is given the metric to monitor. `checkpoints` comes last
    Raises UserError where nothing ends the training.
    """
    mode = "max" if METRICS[main_metric].higher_is_better else "min"
    named = {
        name: each(monitor=f"val/{main_metric}", mode=mode) if isinstance(each, partial) else each
        for name, each in callbacks.items()
    }
    checkpoints = named.pop("checkpoints")
    steps = settings["trainer"].get("val_check_interval")  # a duration is Lightning's
    every = [ValidateEvery(steps)] if isinstance(steps, int) else []
    bars = [each for each in named.values() if isinstance(each, ProgressBar)]
    shows_progress = settings["trainer"].get("enable_progress_bar") is not False
    for bar in [] if shows_progress else bars:
        bar.disable()  # it stays, since it counts what training consumes
    trainer = make(
        default_root_dir=settings["run_dir"],
        callbacks=[*named.values(), *every, Tracking(settings), finetuning, checkpoints],
        logger=list(loggers) or False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=shows_progress or bool(bars),
        **({"val_check_interval": NEVER} if every else {}),
    )
    if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        wrong = "the learning rate falls until the end of training, and this has none"
        write = "write trainer.max_steps=NUMBER or trainer.max_epochs=NUMBER"
        raise UserError("trainer.max_steps", -1, wrong, write)
    return trainer
