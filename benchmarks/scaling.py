"""What a training step costs, against audio length, vocabulary, batch and ranks: CPU seconds of one thread, float32.

    python benchmarks/scaling.py            # tables; --json FILE also writes them

The model: wav2vec2 256 x 6 with the published 7 x 512 convolutions (layer norm), BERT decoder 256 x 4; random weights and
noise. A step is forward, backward, clipping and AdamW. Seconds are the fastest of the rounds, peaks are what PyTorch's
allocator had handed out at most, beside the weights. Rows of a corpus: `python benchmarks/data.py --plan ROWS`.

Ranks: two processes of one thread each train by DDP over gloo on this machine, and average a gradient of several sizes.
What more ranks would take is a model of a ring all-reduce, not a measurement: 2 (n - 1) messages of bytes / n.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from feature_cache import batch, parts
from memory import peak
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertLMHeadModel

from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

LENGTHS, VOCABULARIES, BATCHES = (1, 2, 4, 8, 16, 32), (1_000, 30_522, 128_000, 250_112), (8, 16, 32, 64)
BATCH_SECONDS, UTTERANCE_SECONDS, VOCABULARY = 32, 8, 30_522
MEGABYTES = (1, 4, 16, 64)
RANKS = (2, 8, 64)


def model_of(vocabulary: int = VOCABULARY) -> SpeechEncoderDecoder:
    torch.manual_seed(0)
    encoder, decoder = parts()
    if vocabulary != VOCABULARY:
        decoder = BertLMHeadModel(BertConfig(**decoder.config.to_dict() | {"vocab_size": vocabulary}))
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder).train()
    model.set_special_tokens(101, 102, 0)
    return model


def stepping(model: Any, utterances: int, seconds: float, most: int = VOCABULARY) -> Callable[[], None]:
    """A training step on so many utterances of so many seconds each."""
    some = batch([seconds] * utterances)
    labels = torch.where(some.labels < 0, some.labels, some.labels % most)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(some.inputs, attention_mask=some.attention_mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fastest(step: Callable[[], None], rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of a step, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = clock()
        step()
        times.append(clock() - start)
    return min(times[1:])


def cost(step: Callable[[], None], rounds: int, audio_seconds: float) -> dict[str, float]:
    found = {"audio_seconds": audio_seconds, "cpu_seconds": fastest(step, rounds), "peak_megabytes": peak(step) / 1e6}
    print(f"{found['cpu_seconds']:6.2f} s, {audio_seconds / found['cpu_seconds']:5.1f} s of audio a second,", end="")
    print(f" {found['peak_megabytes']:6.0f} MB", flush=True)
    return found


def costs(rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    model, found = model_of(), {"length": {}, "batch": {}, "vocabulary": {}}  # type: ignore[var-annotated]
    for seconds in LENGTHS:
        print(f"{BATCH_SECONDS} s in utterances of {seconds:2} s ", end="")
        step = stepping(model, BATCH_SECONDS // seconds, seconds)
        found["length"][seconds] = cost(step, rounds, BATCH_SECONDS)
    for seconds in BATCHES:
        print(f"{seconds} s in utterances of {UTTERANCE_SECONDS} s ", end="")
        step = stepping(model, seconds // UTTERANCE_SECONDS, UTTERANCE_SECONDS)
        found["batch"][seconds] = cost(step, rounds, seconds)
    for vocabulary in VOCABULARIES:
        print(f"vocabulary of {vocabulary:7,} ", end="")
        step = stepping(model_of(vocabulary), BATCH_SECONDS // UTTERANCE_SECONDS, UTTERANCE_SECONDS, vocabulary)
        found["vocabulary"][vocabulary] = cost(step, rounds, BATCH_SECONDS)
    return found


def rank(number: int, store: str, rounds: int, results: Any) -> None:
    """Times a step alone and with DDP, and all-reduces, in each of two processes; the first reports them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=timedelta(minutes=5)
    )
    model = model_of()
    some = (model, DistributedDataParallel(model, gradient_as_bucket_view=True))
    alone, together = (fastest(stepping(each, 4, UTTERANCE_SECONDS), rounds, clock=time.perf_counter) for each in some)
    reduced = {}
    for size in MEGABYTES:
        gradient = torch.ones(size * 250_000)
        reduced[size] = fastest(lambda: dist.all_reduce(gradient), 5 * rounds, clock=time.perf_counter)  # noqa: B023
    if number == 0:
        megabytes = 4 * sum(weight.numel() for weight in model.parameters()) / 1e6
        results.put({"alone": alone, "together": together, "megabytes": megabytes, "all_reduce": reduced})
    dist.destroy_process_group()


def ranks(rounds: int) -> dict[str, Any]:
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(rank, (f"{folder}/store", rounds, results), nprocs=2)
    found: dict[str, Any] = results.get()
    alone, megabytes, reduced = found["alone"], found["megabytes"], found["all_reduce"]
    bandwidth = (MEGABYTES[-1] - MEGABYTES[0]) / (reduced[MEGABYTES[-1]] - reduced[MEGABYTES[0]])
    latency = max(0.0, reduced[MEGABYTES[0]] - MEGABYTES[0] / bandwidth) / 2
    found |= {"megabytes_per_second": bandwidth, "latency_seconds": latency}
    print(f"two ranks: {alone:.2f} s a step without averaging, {found['together']:.2f} s by DDP, both busy;", end=" ")
    print(f"gradient of {megabytes:.0f} MB; all-reduce {bandwidth:.0f} MB/s, {1e6 * latency:.0f} us a message")
    found["model"] = {n: alone + 2 * (n - 1) * (latency + megabytes / n / bandwidth) for n in RANKS}
    for n, seconds in found["model"].items():
        print(
            f"model of {n:2} ranks, nothing overlapped: {seconds:.2f} s, {alone / seconds:.0%} of the speed", flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = costs(options.rounds) | {"ranks": ranks(options.rounds)}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
