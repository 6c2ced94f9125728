"""The loggers of `logger=`: files in the run's folder, TensorBoard, Weights & Biases.

Beside Lightning's methods, a logger may have `log_facts`, `log_samples` and `keep_before`, which `tracking` calls.
"""

import csv
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from sedtrain.errors import UserError
from sedtrain.evaluation.results import Hypothesis
from sedtrain.run_dir import keep_until, write_whole

COLUMNS = ["utterance", "reference", "hypothesis"]


class MetricsFile(Logger):
    """metrics.csv, samples.jsonl and environment.json in the run's folder; a resumed run adds to them.

    Saved rows survive a kill at any instant.
    """

    name = version = None

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.folder = Path(save_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "metrics.csv"
        self.columns, _ = self.read()
        self.unsaved: list[dict[str, Any]] = []

    def read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Columns and rows of metrics.csv, without a truncated last line. Raises UserError if it is no table of metrics."""
        try:
            text = self.file.read_text(encoding="utf-8") if self.file.is_file() else ""
            reader = csv.DictReader(io.StringIO(text.rpartition("\n")[0]))
            columns, rows = list(reader.fieldnames or []), list(reader)
            for row in rows:
                int(row["step"]), [float(value) for value in row.values() if value]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            wrong = f"metrics.csv in this folder is no table of metrics: {error}"
            write = "remove that file, or write run_dir=ANOTHER_FOLDER"
            raise UserError("run_dir", str(self.folder), wrong, write) from error
        return columns, rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replaces metrics.csv as a whole."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.file, text.getvalue())

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.unsaved.append({**metrics, "step": step})

    def save(self) -> None:
        columns = sorted({*self.columns, *(name for row in self.unsaved for name in row)})
        if columns != self.columns:
            self.columns = columns
            self.write([*self.read()[1], *self.unsaved])
        elif self.unsaved:
            with self.file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, columns).writerows(self.unsaved)
        self.unsaved = []

    def keep_before(self, step: int) -> None:
        """Drops the rows and samples from this step on; the resumed run logs them again."""
        if self.file.is_file():
            self.write([row for row in self.read()[1] if int(row["step"]) < step])
        keep_until(step - 1, self.folder / "samples.jsonl")

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Writes facts to environment.json, except the configuration, which config.yaml holds."""
        rest = {name: fact for name, fact in facts.items() if name != "config"}
        write_whole(self.folder / "environment.json", json.dumps(rest, indent=2) + "\n")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        """Adds a line of JSON for each sample to samples.jsonl."""
        lines = [json.dumps({"step": step, **asdict(sample)}, ensure_ascii=False) for sample in samples]
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml holds them."""


class TensorBoard(TensorBoardLogger):
    """TensorBoard's event files in one folder; a resumed run adds to them.

    Raises UserError if tensorboard is not installed.
    """

    def __init__(self, save_dir: str) -> None:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            write = "pip install 'sedtrain[tensorboard]', or write logger=csv"
            raise UserError("logger", "tensorboard", f"this logger needs tensorboard: {error}", write) from error
        super().__init__(save_dir, name="", version="", default_hp_metric=False)

    def keep_before(self, step: int) -> None:
        """Has TensorBoard hide the values from this step on; the resumed run logs them again."""
        self.finalize("success")
        self._experiment, self._kwargs["purge_step"] = None, step

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        for name, fact in facts.items():
            text = yaml.safe_dump(fact, sort_keys=False, allow_unicode=True)
            self.experiment.add_text(name, f"```yaml\n{text}```")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        cells = [[" ".join(text.replace("|", "\\|").split()) for text in texts_of(sample)] for sample in samples]
        rows = [COLUMNS, ["---"] * len(COLUMNS), *cells]
        self.experiment.add_text("samples", "\n".join(f"| {' | '.join(row)} |" for row in rows), step)


class Wandb(WandbLogger):
    """A run of Weights & Biases with its files and id in the run's folder; a resumed run keeps its id.

    mode: auto: the value of WANDB_MODE, else online if the user is logged in, else offline
    options: passed to wandb.init
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "sedtrain",
        name: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        **options: Any,
    ) -> None:
        import wandb

        self.folder, self.mode = Path(save_dir) / "wandb", mode
        settings = wandb.Settings(console="off", quiet=True)  # sedtrain.log holds the terminal's text
        super().__init__(name or Path(save_dir).name, save_dir, project=project, settings=settings, **options)
        del self._wandb_init["anonymous"]  # wandb warns about this option

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Weights & Biases, a new one even if another job of the sweep left its own open in this process."""
        if self._experiment is None:
            import wandb

            mode = self.mode if self.mode != "auto" else None  # None: wandb reads WANDB_MODE
            if mode is None and not os.environ.get("WANDB_MODE"):
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            file = self.folder / "id.txt"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                write_whole(file, secrets.token_hex(4))
            options = {**self._wandb_init, "id": file.read_text(encoding="utf-8"), "mode": mode, "reinit": "create_new"}
            self._experiment = wandb.init(**options)
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        self.log_table("samples", COLUMNS, [texts_of(sample) for sample in samples], step=step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def texts_of(sample: Hypothesis) -> list[str]:
    return [sample.id, sample.reference, sample.hypothesis]
