"""Memory and time of the output layer and its loss, against `cross_entropy` of a linear layer, and of a whole command.

    python benchmarks/memory.py                     # the loss: a table; --json FILE also writes it
    python benchmarks/memory.py task=train ...      # the peak of that command of sedtrain and of its workers

The loss: forward and backward pass in float32 on one thread, 60 % of the positions labelled, as in batches of utterances
of unequal length. `peak` is what PyTorch's allocator had handed out at most, beside what it had before; weights are not
in it, their gradients are. The sides take turns, and the fastest of the rounds is shown, in CPU seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sedtrain.models.output_layer import DeferrableLinear, labelled_cross_entropy

WIDTH, LABELLED, SMOOTHING = 256, 0.6, 0.1
SIZES = {30_522: 2048, 250_112: 1024}  # positions of a batch by the size of the vocabulary


def peak(step: Callable[[], object]) -> int:
    """Bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    changes = [each.nbytes() for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(changes))


def sides(vocab_size: int, positions: int) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    layer = DeferrableLinear(WIDTH, vocab_size)
    hidden = torch.randn(1, positions, WIDTH, generator=generator).requires_grad_()
    labels = torch.randint(vocab_size, (1, positions), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) > LABELLED] = -100

    def backward(loss: Tensor) -> None:
        for each in (hidden, *layer.parameters()):
            each.grad = None
        loss.backward()

    def plain() -> None:
        logits = F.linear(hidden, layer.weight, layer.bias)
        options = {"ignore_index": -100, "label_smoothing": SMOOTHING, "reduction": "sum"}
        backward(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options))

    return {"plain": plain, "sedtrain": lambda: backward(labelled_cross_entropy(layer, hidden, labels, SMOOTHING)[0])}


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def compare_losses(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    found = {}
    for vocab_size, positions in SIZES.items():
        steps = sides(vocab_size, positions)
        times = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]
        row = {
            name: {"seconds": min(each[name] for each in times), "megabytes": peak(step) / 1e6}
            for name, step in steps.items()
        }
        found[str(vocab_size)], plain, ours = row, row["plain"], row["sedtrain"]
        print(f"vocabulary {vocab_size}, {positions} positions: cross_entropy {plain['megabytes']:.0f} MB", end="")
        print(f" {plain['seconds']:.2f} s, sedtrain {ours['megabytes']:.0f} MB {ours['seconds']:.2f} s:", end="")
        print(f" 1/{plain['megabytes'] / ours['megabytes']:.1f} of the memory, ", end="")
        print(f"{plain['seconds'] / ours['seconds']:.1f} times as fast", flush=True)
    return found


def processes(parent: int) -> list[int]:
    try:
        lists = [each.read_text().split() for each in Path(f"/proc/{parent}/task").glob("*/children")]
    except OSError:
        return [parent]
    return [parent, *(each for numbers in lists for number in numbers for each in processes(int(number)))]


def resident(process: int) -> int:
    """Bytes; pages that processes share are counted in parts."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def watch(arguments: list[str]) -> None:
    """Prints the most memory that a command and the processes that it starts had, looked at each half second."""
    command, most = subprocess.Popen([sys.executable, "-m", "sedtrain", *arguments]), 0
    while command.poll() is None:
        most = max(most, sum(map(resident, processes(command.pid))))
        time.sleep(0.5)
    print(f"peak: {most / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options, command = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if command:
        watch(command)
        return
    found = compare_losses(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
