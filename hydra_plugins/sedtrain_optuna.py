"""hydra/sweeper=optuna: Hydra finds sweepers in this folder."""

from typing import Literal

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sedtrain.ranges import Count, CountOrZero


class OptunaSweeper(Sweeper):
    """Calls `sedtrain.search`, imported on use.

    `conf/hydra/sweeper/optuna.yaml` explains the options; the search reads them from the configuration.
    """

    def __init__(
        self,
        metric: str | None,
        direction: Literal["minimize", "maximize"] | None,
        num_trials: Count,
        num_parallel: Count,
        sampler: Literal["tpe", "random"],
        seed: CountOrZero,
        pruner: Literal["median", "none"],
        full_trials: CountOrZero,
        warmup_steps: CountOrZero,
        storage: str | None,
        study: str,
    ) -> None:
        super().__init__()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.given = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        context, task, config = self.given
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)
        from sedtrain.console import fail
        from sedtrain.errors import UserError
        from sedtrain.search import search

        try:
            search(config, arguments, launcher.launch, context.config_loader)
        except UserError as error:
            fail(str(error))
