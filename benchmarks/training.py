"""Training steps against `transformers.Seq2SeqTrainer`: seconds of audio in a second of one core's time.

    python benchmarks/training.py     # four minutes; --steps 10 --rounds 2 vary less; --json FILE keeps the figures
    python benchmarks/training.py --device cuda --peak-tflops 989    # wav2vec2-large and bart-large; wall time and MFU

On a CPU, wav2vec2 of 256 x 6 with the published 7 x 512 layer-norm convolutions and a BERT decoder of 256 x 4 with 30,522
words learn from noise of 1 to 20 s (log-normal), in float32 on one thread. All sides begin with the same weights, take as
many utterances in a batch on average, and have the same AdamW, clipping and loss:

    sedtrain  `sedtrain.compose` with `Trainer.fit`: its own reading, bucketing, loop and guards
    defaults  Seq2SeqTrainer as it comes, with normalized audio in memory; parts are frozen by requires_grad_(False)
    best      the same with lengths grouped, and no gradient asked of the input of a frozen front end

`encoder frozen` is an epoch after the first, of few utterances, with `data.cache_features=true` in sedtrain. Sides take
turns; the clock runs from the start of training to the end of the last step, without building, saving and validation.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import lightning
import numpy as np
import soundfile
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BertConfig, Seq2SeqTrainingArguments, Wav2Vec2Config

import sedtrain

RATE, TOKENS_PER_SECOND = 16_000, 4
CASES: dict[str, tuple[str | None, list[str]]] = {  # what the peer freezes, and the options of sedtrain
    "all trainable": (None, ["finetune=all"]),
    "convolutions frozen": ("encoder.feature_extractor", ["finetune=feature_encoder_frozen"]),
    "encoder frozen": ("encoder", ["finetune=encoder_frozen", "data.cache_features=true"]),
}
SIDES = "sedtrain", "defaults", "best"


class Clock:
    """CPU seconds, wall seconds and seconds of audio of the steps of one training."""

    def __init__(self, device: str) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return np.array([time.process_time(), time.perf_counter()])

    def start(self, *args: Any, **options: Any) -> None:
        self.began, self.audio = self.now(), 0.0

    def stop(self, *args: Any, **options: Any) -> None:
        self.cpu, self.wall = self.now() - self.began


class OurClock(lightning.Callback):
    """Counts the last epoch."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.on_train_epoch_start = clock, clock.start

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.clock.audio += batch.seconds
        self.clock.stop()


class Peer(transformers.Seq2SeqTrainer):
    """Counts the samples that it trains on, where they are."""

    num_samples: torch.Tensor | int = 0

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
        self.num_samples = self.num_samples + inputs["attention_mask"].sum()
        return super().training_step(model, inputs, *args)


def parts(device: str) -> tuple[Any, Any]:
    """Encoder and decoder with random weights."""
    audio = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "layerdrop": 0.0}
    roles = {"is_decoder": True, "add_cross_attention": True}
    if device == "cuda":
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        encoder = transformers.Wav2Vec2Model(Wav2Vec2Config(**large, **audio))
        return encoder, transformers.BartForCausalLM(BartConfig(**roles))
    size = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    encoder = transformers.Wav2Vec2Model(Wav2Vec2Config(**size, num_hidden_layers=6, **audio))
    return encoder, transformers.BertLMHeadModel(BertConfig(**size, num_hidden_layers=4, **roles))


def write_parts(folder: Path, encoder: Any, decoder: Any) -> Any:
    """Writes both with an extractor and a tokenizer of as many words as the decoder has; returns the tokenizer."""
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = [*names.values(), *(f"w{number}" for number in range(decoder.config.vocab_size - len(names)))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    for name, part in {"encoder": encoder, "decoder": decoder}.items():
        part.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "decoder")
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder / "encoder")
    return tokenizer


def write_corpus(folder: Path, number: int, vocab_size: int) -> list[dict[str, Any]]:
    """Writes recordings and their manifest; returns its rows."""
    random, rows = np.random.default_rng(0), []
    folder.mkdir()
    for each in range(number):
        seconds = float(np.clip(random.lognormal(np.log(6), 0.6), 1, 20))
        soundfile.write(file := folder / f"{each}.wav", random.normal(0, 0.05, int(seconds * RATE)), RATE)
        words = random.integers(0, vocab_size - 4, int(TOKENS_PER_SECOND * seconds))
        rows.append({"audio_filepath": str(file), "text": " ".join(f"w{word}" for word in words), "duration": seconds})
    for split, listed in {"train": rows, "validation": rows[:1]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return rows


def our_run(folder: Path, corpus: Path, case: str, steps: int, device: str, seed: int) -> tuple[Clock, float]:
    """The clock, and how many utterances a batch has on average."""
    on, decoder, seconds = ("gpu", "bart", 240) if device == "cuda" else ("cpu", "bert", 24)
    run: Any = sedtrain.compose(
        *("encoder=wav2vec2", f"encoder.checkpoint={folder / 'encoder'}", f"decoder={decoder}", "loss=cross_entropy"),
        *(f"decoder.checkpoint={folder / 'decoder'}", "loss.label_smoothing=0", "data=manifest", f"data.path={corpus}"),
        *("data.test_split=validation", f"data.batch_seconds={seconds}", "vocabulary_texts=0", f"seed={seed}"),
        *("trainer.limit_val_batches=0", f"trainer.accelerator={on}", "trainer.enable_progress_bar=false", "logger=none"),
        *(f"trainer.max_epochs={2 if steps == -1 else 1}", f"trainer.max_steps={steps}", f"run_dir={folder / 'run'}"),
        *CASES[case][1],
    )  # fmt: skip
    clock = Clock(device)
    run.trainer.callbacks.append(OurClock(clock))
    run.fit(None)
    return clock, len(run.data.load_split("train")) / run.num_batches


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    audio, labels = ([torch.as_tensor(row[name]) for row in rows] for name in ("input_values", "labels"))
    return {
        "input_values": pad_sequence(audio, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(each, dtype=torch.long) for each in audio], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def peer_rows(rows: list[dict[str, Any]], tokenizer: Any) -> datasets.Dataset:
    """Normalized audio and labels, as the example of `transformers` prepares them ahead of training."""
    extractor, prepared = transformers.Wav2Vec2FeatureExtractor(), []
    for row in rows:
        samples, rate = soundfile.read(row["audio_filepath"], dtype="float32")
        labels = [*tokenizer(row["text"])["input_ids"], tokenizer.sep_token_id]
        inputs = {"input_values": extractor(samples, sampling_rate=rate)["input_values"][0], "labels": labels}
        prepared.append({**inputs, "length": len(samples)})
    return datasets.Dataset.from_list(prepared).with_format("torch")


def peer_run(side: str, model: Any, rows: Any, case: str, steps: int, device: str, seed: int, size: int) -> Clock:
    """Trains a copy of the model; size: utterances in a batch."""
    model, clock, is_best = copy.deepcopy(model), Clock(device), side == "best"
    if (frozen := CASES[case][0]) is not None:
        model.get_submodule(frozen).requires_grad_(False)
        if is_best:
            model.encoder.freeze_feature_encoder()
    callback: Any = transformers.TrainerCallback()
    callback.on_train_begin, callback.on_step_end = clock.start, clock.stop
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder, per_device_train_batch_size=size, max_steps=steps, num_train_epochs=1, seed=seed,
            learning_rate=1e-4, weight_decay=0.01, adam_beta2=0.98, max_grad_norm=1.0, lr_scheduler_type="cosine",
            train_sampling_strategy="group_by_length" if is_best else "random", save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=device == "cpu", bf16=device == "cuda", remove_unused_columns=False,
            dataloader_num_workers=0 if device == "cpu" else 8, dataloader_pin_memory=device == "cuda",
        )  # fmt: skip
        (peer := Peer(model, arguments, collated, rows, callbacks=[callback])).train()
    clock.audio = float(peer.num_samples) / RATE
    return clock


def flops_of_a_second(model: Any, device: str) -> float:
    """Operations of a step for a second of audio, without padding: three times those of the forward pass of 8 s."""
    labels = torch.zeros(1, 8 * TOKENS_PER_SECOND, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to(device)(torch.zeros(1, 8 * RATE, device=device), labels=labels)
    return 3 * counter.get_total_flops() / 8


def measure(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures of each case and side."""
    torch.manual_seed(0)
    encoder, decoder = parts(options.device)
    tokenizer = write_parts(folder, encoder, decoder)
    datasets.config.HF_DATASETS_CACHE = folder  # where sedtrain keeps features
    number = {"many": 200 if options.device == "cpu" else 4000, "few": 12 * options.steps}
    rows = {name: write_corpus(folder / name, number[name], len(tokenizer)) for name in number}
    prepared = {name: peer_rows(each, tokenizer) for name, each in rows.items()}
    model = transformers.SpeechEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id, model.config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    for case in options.cases:
        totals, corpus = {side: np.zeros(3) for side in SIDES}, "few" if case == "encoder frozen" else "many"
        for seed, side in product(range(options.rounds), SIDES):
            if side == "sedtrain":
                steps = -1 if corpus == "few" else options.steps
                clock, size = our_run(folder, folder / corpus, case, steps, options.device, seed)
            else:
                clock = peer_run(side, model, prepared[corpus], case, options.steps, options.device, seed, round(size))
            totals[side] += clock.audio, clock.cpu, clock.wall
        for side, (audio, cpu, wall) in totals.items():
            yield {"case": case, "side": side, "audio": audio, "cpu": cpu, "wall": wall}
    yield {"flops": flops_of_a_second(model, options.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="of each side in each round of a case")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, for MFU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        *figures, flops = measure(options, Path(folder))
    unit, ours = "cpu" if options.device == "cpu" else "wall", 0.0
    print(f"{'case':20} {'side':9} audio s  CPU s  wall s  audio s per {unit} s  sedtrain is times as fast")
    for each in figures:
        speed = each["speed"] = each["audio"] / each[unit]
        ours = speed if each["side"] == "sedtrain" else ours
        each["times"] = ours / speed
        print("{case:20} {side:9} {audio:7.1f} {cpu:6.1f} {wall:7.1f}  {speed:17.2f}  {times:.2f}".format(**each))
        if options.peak_tflops:
            each["mfu"] = each["audio"] / each["wall"] * flops["flops"] / options.peak_tflops / 1e12
            print(f"{'':20} {'':9} MFU {each['mfu']:.1%}")
    if options.json:
        options.json.write_text(json.dumps([*figures, flops], indent=2))


if __name__ == "__main__":
    main()
