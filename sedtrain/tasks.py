"""The tasks of a command, except transcribe, serve and compare, which need fewer imports and have files of their own."""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from sedtrain import build, build_saved, terminal
from sedtrain.errors import Unfinished
from sedtrain.export.card import write_model_card
from sedtrain.export.folder import refuse_taken, write_folder
from sedtrain.hub import files_of, refuse_impossible, upload
from sedtrain.inspection.summary import inspected
from sedtrain.inspection.tables import tables, write_page
from sedtrain.run_dir import config_of, is_finished, write_whole
from sedtrain.training.finetune import PartPlan
from sedtrain.training.fit_batches import Budget, Fitted, fitted_batches, write_batches
from sedtrain.training.resume import refuse_other_settings, starting_point
from sedtrain.training.tracking import log_scores

NOT_FOR_TRAINING = ("task", "memory_gb", "inspect_utterances", "run_dir", "data.batches")
"""Options of task=fit_batches that the training command must not repeat."""

logger = logging.getLogger(__name__)


def train(cfg: DictConfig) -> None:
    """Trains, keeps the best weights as a Hugging Face folder, and scores them on the split."""
    settings = build.settings_of(cfg)
    if is_finished(cfg.run_dir):
        refuse_other_settings(Path(cfg.run_dir), settings)
        logger.info("run_dir=%s: this run has finished, there is nothing to do", cfg.run_dir)
        return
    start = starting_point(cfg.resume, Path(cfg.run_dir), settings)
    run = build.training_run(cfg)
    if run.trainer.is_global_zero:
        keep_configuration(cfg.run_dir, settings)
        terminal.show(plan(*run.plan()))
    run.fit(start)
    if not run.trainer.is_global_zero:
        return
    run.load_best()
    run.saved.save(run.folder / "model", run.module.decoding.generation_kwargs())
    if number := run.stopped_by():
        stopped = f"stopped at step {run.trainer.global_step}; saved in {run.folder}: model, checkpoints/last.ckpt"
        raise Unfinished(f"{stopped}\n  resume=auto with this run_dir resumes it", 128 + number)
    if text := run.ended_early():
        logger.warning("%s; write a longer one, or null, to train for all steps", text)
    with torch.compiler.set_stance("force_eager"):  # torch.compile would compile anew for every token
        results, evaluation = build_saved.scoring(cfg, run.data).score(run.saved, run.data, run.totals())
    terminal.show(*terminal.scored(results, evaluation, run.folder))
    log_scores(run.trainer, results)
    facts = build_saved.card_facts(cfg, settings, run.saved)
    write_model_card(run.folder / "model", run.saved, results, facts, cfg.target)


def keep_configuration(run_dir: str, settings: dict[str, Any]) -> None:
    """Writes config.yaml from the settings of a run."""
    write_whole(config_of(run_dir), OmegaConf.to_yaml(OmegaConf.create(settings)))


def evaluate(cfg: DictConfig) -> None:
    """Scores a saved model on a split."""
    settings = build.settings_of(cfg)
    scoring, saved, data = build_saved.evaluation(cfg)
    results, evaluation = scoring.score(saved, data)
    # Comes last: after an error or a stop, the folder stays free for another try.
    keep_configuration(cfg.run_dir, settings)
    terminal.show(*terminal.scored(results, evaluation, scoring.folder))


def inspect(cfg: DictConfig) -> None:
    """Shows what the data hold and what training would leave out. Needs no model."""
    folder = Path(cfg.run_dir)
    found, columns = inspected(build_saved.inspected_data(cfg), cfg.inspect_utterances)
    found.write(folder / "inspect.json")
    write_page(folder / "inspect.html", found, columns)
    saved = terminal.saved_files(folder, ["inspect.html", "inspect.json", "skipped.jsonl", "sedtrain.log"])
    terminal.show(*tables(found), saved)


def fit_batches(cfg: DictConfig) -> None:
    """Finds the largest batches that memory holds, and writes them for `data.batches`."""
    run = build.training_run(cfg)
    make_trainer = build.trainer_factory(cfg, run.trainer.world_size)
    found, budget = fitted_batches(run, make_trainer, cfg.memory_gb, cfg.inspect_utterances)
    file = run.folder / "batches.yaml"
    write_batches(file, found, budget, shlex.join(sys.argv[1:]))
    arguments = [option for option in sys.argv[1:] if option.lstrip("+").partition("=")[0] not in NOT_FOR_TRAINING]
    command = shlex.join(["python", "-m", "sedtrain", *arguments, f"data.batches={file}"])
    terminal.show(
        batches(found, budget),
        terminal.saved_files(run.folder, ["batches.yaml", "skipped.jsonl", "sedtrain.log"]),
        f"to train with them:\n  {command}",
    )


def export(cfg: DictConfig) -> None:
    """Writes a saved model as a folder for others, and uploads it if `hub` says so."""
    folder = Path(cfg.out).expanduser().resolve()  # links and `.` cannot be replaced
    refuse_taken(folder)
    if cfg.hub:
        refuse_impossible(cfg.hub, cfg.dry_run)
    write_folder(folder, *build_saved.export_parts(cfg))
    files = files_of(folder)
    terminal.show(terminal.files(files), f"saved in {folder}")
    if cfg.hub and cfg.dry_run:
        terminal.show(f"nothing was uploaded: dry_run=false would write these {len(files)} files to {cfg.hub}")
    elif cfg.hub:
        terminal.show(f"uploaded to {upload(folder, cfg.hub, cfg.export.private)}")


# --- tables for people


def plan(parts: Sequence[PartPlan], facts: Mapping[str, str]) -> Table:
    """A table of how each part of the model is trained; the facts of the run follow as its caption."""
    numbers = ("trainable", "frozen", "peak learning rate", "from step")
    rows = terminal.table("what will be trained", "part", *numbers, right=numbers)
    rows.columns[0].no_wrap = True
    for part in parts:
        rates, steps = [f"{rate:.2g}" for rate in part.learning_rates], [f"{step:,}" for step in part.steps]
        rows.add_row(part.name, f"{part.num_trainable:,}", f"{part.num_frozen:,}", ends(rates), ends(steps))
    rows.add_section()
    trainable, frozen = sum(part.num_trainable for part in parts), sum(part.num_frozen for part in parts)
    rows.add_row("all", f"{trainable:,}", f"{frozen:,}")
    rows.caption = "\n".join(f"{name:<16}{fact}" for name, fact in facts.items())
    return rows


def ends(values: Sequence[str]) -> str:
    """The first and last of sorted values, such as `1e-05 to 0.001`; empty without values."""
    return " to ".join(dict.fromkeys([*values[:1], *values[-1:]]))


def batches(found: Sequence[Fitted], budget: Budget) -> Table:
    """A table of the largest batch of each bucket, with memory and speed of a step on it."""
    headings = ("seconds up to", "tokens up to", "utterances", "audio", "peak memory", "speed")
    rows = terminal.table("the largest batches that fit", *headings, right=headings)
    for (seconds, tokens, utterances), peak_gb, speed in found:
        audio = f"{seconds * utterances:,.0f} s"
        rows.add_row(f"{seconds:g}", f"{tokens}", f"{utterances:,}", audio, f"{peak_gb:.2f} GB", f"{speed:,.0f} s/s")
    rows.caption = f"into {budget.text}\nspeed: seconds of audio per second, in one step"
    return rows
