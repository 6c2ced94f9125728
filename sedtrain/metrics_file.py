"""metrics.csv: what is logged, in a file that goes on where a run goes on. Beside it samples.jsonl and environment.json."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from sedtrain.evaluation.evaluate import Hypothesis
from sedtrain.run_folder import write_whole

SAMPLES, ENVIRONMENT = "samples.jsonl", "environment.json"


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, which does not delete the rows of a run that goes on."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file; on other ranks than the first one that writes nothing."""
        if self._experiment is None:
            self._experiment = Appending(self.log_dir)
        return self._experiment

    def keep_before(self, step: int) -> None:
        """Drops the rows of this step and later ones, which will be made again."""
        self.experiment.keep_before(step)
        samples = Path(self.log_dir) / SAMPLES
        if samples.is_file():
            lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            write_whole(samples, "".join(line for line in whole if json.loads(line)["step"] < step))

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Writes them to environment.json, save the configuration, which lies in config.yaml."""
        rest = {name: fact for name, fact in facts.items() if name != "config"}
        write_whole(Path(self.log_dir) / ENVIRONMENT, json.dumps(rest, indent=2) + "\n")

    def log_samples(self, samples: Sequence[Hypothesis], step: int) -> None:
        """Adds a line of JSON for each to samples.jsonl."""
        lines = [json.dumps({"step": step, **asdict(each)}, ensure_ascii=False) for each in samples]
        with (Path(self.log_dir) / SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


class Appending(ExperimentWriter):
    """Adds rows to what the file holds; whenever the process is killed, what was saved before is there."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        if self.path.is_file():
            self.metrics_keys = list(self.read()[0])

    def _check_log_dir_exists(self) -> None:
        """Nothing, unlike in the class above, which deletes the file."""

    def read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Heading and rows; a last line that was cut is left out."""
        text, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        reader = csv.DictReader(io.StringIO(text))
        return list(reader.fieldnames or []), list(reader)

    def write(self, heading: list[str], rows: list[dict[str, str]]) -> None:
        """Replaces the file as a whole."""
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, heading)
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(self.path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self.write(fieldnames, self.read()[1])

    def keep_before(self, step: int) -> None:
        if self.path.is_file():
            heading, rows = self.read()
            self.write(heading, [row for row in rows if int(row["step"]) < step])
