"""Where a training is told, besides its own files: TensorBoard, Weights & Biases."""

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from sedtrain.batch import UserError
from sedtrain.evaluation.evaluate import Hypothesis

COLUMNS = ["utterance", "reference", "hypothesis"]


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files in one folder, where a run that goes on adds to them.

    Raises UserError where tensorboard is not installed.
    """

    def __init__(self, save_dir: str) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"logger=tensorboard needs tensorboard: {error}", "pip install 'sedtrain[tensorboard]', or logger=csv"
            ) from error
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def keep_before(self, step: int) -> None:
        """Has TensorBoard not show this step and later ones, which will be made again."""
        self.finalize("success")
        self._experiment, self._kwargs["purge_step"] = None, step

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        for name, fact in facts.items():
            written = yaml.safe_dump(fact, sort_keys=False, allow_unicode=True)
            self.experiment.add_text(name, f"```yaml\n{written}```")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        rows = [COLUMNS, ["---"] * len(COLUMNS), *([escaped(each) for each in astuple(sample)] for sample in samples)]
        self.experiment.add_text("samples", "\n".join(f"| {' | '.join(row)} |" for row in rows), step)


def escaped(text: str) -> str:
    """A text as it stands in a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


class Wandb(WandbLogger):
    """A run of Weights & Biases, its files and its id in the run's folder, so that a run that goes on is the same there too.

    mode: auto is what WANDB_MODE says, else online where the user is logged in, else offline
    options: those of wandb.init

    Raises UserError where wandb is not installed.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "sedtrain",
        name: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        **options: Any,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logger=wandb needs wandb: {error}", "pip install 'sedtrain[wandb]', or logger=csv"
            ) from error
        self.folder, self.mode = Path(save_dir) / "wandb", mode
        settings = wandb.Settings(console="off", quiet=True)  # sedtrain.log has what is printed
        super().__init__(name or Path(save_dir).name, save_dir, project=project, settings=settings, **options)
        del self._wandb_init["anonymous"]  # which wandb warns of

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; not that which another training of this process, a job of a sweep, may have left open."""
        if self._experiment is None:
            import wandb

            mode = self.mode if self.mode != "auto" else mode_by_login()
            options = {**self._wandb_init, "id": self.run_id(), "mode": mode, "reinit": "create_new"}
            self._experiment = wandb.init(**options)
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    def run_id(self) -> str:
        """That of this folder, drawn when the run begins."""
        file = self.folder / "id.txt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        self.log_hyperparams(dict(facts))

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        self.log_table("samples", COLUMNS, [list(astuple(sample)) for sample in samples], step=step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def mode_by_login() -> str | None:
    """None where wandb reads WANDB_MODE itself."""
    import wandb

    if os.environ.get("WANDB_MODE"):
        return None
    return "online" if wandb.login(prompt=False, verify=False) else "offline"
