"""Time to quality: CPU seconds of training until the validation WER is at most 0.20, beside transformers' Seq2SeqTrainer.

    python benchmarks/quality.py FOLDER            # a table; --json FILE and --figure FILE.svg keep the curves

FOLDER holds `train.parquet` and `validation.parquet` of connected digits (recipes/connected_digits). Each run has a process
of its own with one thread. Both sides start with the same random weights and have the same tokenizer, targets, label
smoothing, AdamW, clipping, 150 steps of warm-up and then a constant learning rate; Seq2SeqTrainer gets batches of as many
utterances as ours have on average, grouped by length, of audio that is decoded once. What the other side lacks is what is
measured: CTC beside the cross-entropy, bounds in seconds and masks. Validations, every 100 steps, are not counted.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import jiwer
import lightning
import matplotlib.pyplot as plt
import soundfile
import torch
from datasets import Audio, Dataset, load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    SpeechEncoderDecoderModel,
    TrainerCallback,
    TrainerControl,
    set_seed,
)

import sedtrain
from sedtrain.batch import IGNORE_INDEX
from sedtrain.training.run import TrainingRun

QUALITY, STEPS_BETWEEN, WARMUP_STEPS, MOST_STEPS = 0.20, 100, 150, 15_000
UTTERANCES = 10  # of a batch: 1,200 utterances are 126 batches of ours


class Clock:
    """CPU seconds of this process since the clock was made, without those of validations; the curve of WER over them."""

    def __init__(self, limit: float) -> None:
        self.limit, self.start, self.curve = limit, time.process_time(), [(0.0, 1.0)]

    def seconds(self) -> float:
        return time.process_time() - self.start

    def validate(self, score: Callable[[], float]) -> bool:
        """Adds a point to the curve; True where training is over, by its quality or by the limit."""
        before = self.seconds()
        self.curve.append((before, score()))
        print(f"{before:8.1f} s  WER {self.curve[-1][1]:.3f}", flush=True)
        self.start += self.seconds() - before
        return self.curve[-1][1] <= QUALITY or before > self.limit


def composed(folder: Path, seed: int, run_dir: str) -> TrainingRun:
    schedule = ["scheduler=constant", f"scheduler.warmup_fraction={WARMUP_STEPS / MOST_STEPS}"]
    steps = [f"trainer.max_steps={MOST_STEPS}", "trainer.max_time=null", f"trainer.val_check_interval={STEPS_BETWEEN}"]
    files = [f"data.path={folder}", f"run_dir={run_dir}", "logger=none"]
    return sedtrain.compose("experiment=connected_digits", f"seed={seed}", *files, *steps, *schedule)


class Watch(lightning.Callback):
    """Stops the clock while Lightning validates."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.before = time.process_time()

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.clock.start += time.process_time() - self.before
        trainer.should_stop = self.clock.validate(lambda: float(trainer.callback_metrics["val/wer"]))


def ours(folder: Path, seed: int, limit: float) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as run_dir:
        run = composed(folder, seed, run_dir)
        clock = Clock(limit)
        run.trainer.callbacks.insert(0, Watch(clock))  # type: ignore[attr-defined]
        run.fit(None)
    return clock.curve


def utterances(folder: Path, split: str, run: TrainingRun) -> Dataset:
    """Decoded and normalized audio with labels and text, prepared once as transformers' example script does."""

    def prepared(row: dict[str, Any]) -> dict[str, Any]:
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        values = run.saved.feature_extractor(samples, sampling_rate=rate).input_values[0]
        labels = run.saved.tokenizer(row["text"]).input_ids
        return {"input_values": values, "labels": labels, "length": len(values)}

    rows = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    rows = rows.cast_column("audio", Audio(decode=False))
    return rows.map(prepared, remove_columns=[name for name in rows.column_names if name != "text"]).with_format(
        "numpy"
    )


def collated(rows: list[dict[str, Any]], start: int, pad: int) -> dict[str, torch.Tensor]:
    """With the decoder's input, since Seq2SeqTrainer takes the labels away where it smooths them."""
    audio = [torch.tensor(row["input_values"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    shifted = [torch.cat([torch.tensor([start]), each[:-1]]) for each in labels]
    return {
        "input_values": pad_sequence(audio, batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(each), dtype=torch.long) for each in audio], batch_first=True),
        "decoder_input_ids": pad_sequence(shifted, batch_first=True, padding_value=pad),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


def word_errors(model: Any, run: TrainingRun, split: Dataset, collator: Callable[..., Any]) -> float:
    """WER of greedy search, in batches of similar lengths."""
    model.eval()
    rows, texts = sorted(split, key=lambda row: row["length"]), []
    for first in range(0, len(rows), 2 * UTTERANCES):
        batch = collator(rows[first : first + 2 * UTTERANCES])
        with torch.no_grad():
            ids = model.generate(batch["input_values"], attention_mask=batch["attention_mask"], max_new_tokens=40)
        texts += run.saved.tokenizer.batch_decode(ids, skip_special_tokens=True)
    model.train()
    return float(jiwer.wer([str(row["text"]) for row in rows], texts))


class Validation(TrainerCallback):
    """Validates Seq2SeqTrainer's model as often as ours, outside its own loop, which would score all batches alike."""

    def __init__(self, clock: Clock, score: Callable[[], float]) -> None:
        self.clock, self.score = clock, score

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if state.global_step % STEPS_BETWEEN == 0:
            control.should_training_stop = self.clock.validate(self.score)


def theirs(folder: Path, seed: int, limit: float) -> list[tuple[float, float]]:
    with tempfile.TemporaryDirectory() as name:
        run = composed(folder, seed, name)
        run.saved.save(Path(name, "start"), {})
        model = SpeechEncoderDecoderModel.from_pretrained(Path(name, "start"))
        set_seed(seed)
        clock = Clock(limit)
        train, validation = (utterances(folder, split, run) for split in ("train", "validation"))
        ids = {"start": model.config.decoder_start_token_id, "pad": model.config.pad_token_id}
        collator = partial(collated, **ids)
        watch = Validation(clock, lambda: word_errors(model, run, validation, collator))
        options = {"args": arguments(name, seed), "data_collator": collator, "callbacks": [watch]}
        trainer = Seq2SeqTrainer(model=model, train_dataset=train, **options)
        trainer.train()
    return clock.curve


def arguments(folder: str, seed: int) -> Seq2SeqTrainingArguments:
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": WARMUP_STEPS, "max_steps": MOST_STEPS}
    adam = {"learning_rate": 1e-3, "adam_beta2": 0.98, "weight_decay": 0.01, "optim": "adamw_torch_fused"}
    quiet = {"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    batches = {"per_device_train_batch_size": UTTERANCES, "train_sampling_strategy": "group_by_length"}
    return Seq2SeqTrainingArguments(
        folder, seed=seed, use_cpu=True, label_smoothing_factor=0.1, remove_unused_columns=False,
        length_column_name="length", **schedule, **adam, **quiet, **batches,
    )  # fmt: skip


def reached(curve: list[tuple[float, float]]) -> float | None:
    """CPU seconds until the quality; None where the limit came first."""
    seconds, error_rate = curve[-1]
    return seconds if error_rate <= QUALITY else None


def draw(found: dict[int, dict[str, list[tuple[float, float]]]], file: Path) -> None:
    """Writes the curves of all seeds in colors for light and dark pages."""
    ink = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#888888")
    with plt.rc_context({**ink, "text.color": "#888888", "svg.fonttype": "none", "svg.hashsalt": "sedtrain"}):
        drawn, axes = plt.subplots(figsize=(7, 3), layout="constrained")
        for number, curves in enumerate(found.values()):
            for color, (side, curve) in zip(("#2a8fbd", "#d1762b"), curves.items(), strict=True):
                seconds, rates = zip(*curve, strict=True)
                axes.plot(seconds, [min(rate, 1.0) for rate in rates], color=color, label=side if number == 0 else None)
        axes.axhline(QUALITY, color="#888888", linewidth=0.8, linestyle=":")
        axes.set(xlabel="CPU seconds of training", ylabel="WER of validation", ylim=(0, 1.02), xlim=(0, None))
        axes.legend(frameon=False, loc="center right")
        drawn.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--times", type=float, default=5, help="Seq2SeqTrainer is given as many times our CPU seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    spawn, found = multiprocessing.get_context("spawn"), {}
    for seed in options.seeds:
        with spawn.Pool(1, maxtasksperchild=1) as pool:
            first = pool.apply(ours, (options.folder, seed, 3600.0))
            second = pool.apply(theirs, (options.folder, seed, options.times * first[-1][0]))
        found[seed] = {"sedtrain": first, "Seq2SeqTrainer": second}
        print(f"seed {seed}: {reached(first)} and {reached(second)} s, limit {second[-1][0]:.0f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
