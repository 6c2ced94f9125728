"""Searches of a trained model on the embedded test utterances: their errors, and the calls and time of the decoder.

    python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
    python benchmarks/decoding.py RUN                             # three minutes; --json FILE keeps the times

    wer        of each search, and its paired test against greedy search on the same utterances; then the
               same where three utterances are joined, which is longer than any in training
    calls      of the decoder, on the whole split
    seconds    of one core's time (CPU time, one thread): the median of the rounds, in which the sides take turns
    times      how many times as fast as the same search by `stock`, as a whole and without encoder and CTC head
    sorted     an evaluation in batches of utterances of one length, as it makes them, and of a random order

`stock` is `generate` of the class that `transformers` itself loads the folder with. Speed is measured with one
utterance at a time, and in the batches of an evaluation.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from hydra import compose, initialize_config_dir

import sedtrain
from sedtrain.build_saved import connect
from sedtrain.config.hydra_calls import create
from sedtrain.config.schema import conf_dir, register
from sedtrain.decoding.ctc import best_path, lattice_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import TRANSCRIPTION
from sedtrain.evaluation.statistics import confidence_intervals, paired_test
from sedtrain.models.saved import load
from sedtrain.models.steps import Steps
from sedtrain.text.normalizers import normalizer

SEARCHES = ("greedy", "beam", "joint", "ctc", "rescore", "speculative")
METRICS = MetricSet(TRANSCRIPTION, normalizer("lowercase"))


def created(group, *overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return create(compose("train", ["run_dir=.", "data.num_workers=0", *overrides]), group)


def utterances_of(batches):
    """(audio, text) of each utterance, in the order of the batches."""
    return [
        (audio[: mask.sum()], text)
        for batch in batches
        for audio, mask, text in zip(batch.inputs, batch.attention_mask, batch.texts, strict=True)
    ]


def batch_of(like, utterances):
    """A batch of (audio, text)."""
    audio, texts = zip(*utterances, strict=True)
    masks = [torch.ones(len(each), dtype=torch.long) for each in audio]
    inputs, mask = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (audio, masks))
    durations = [len(each) / 16_000 for each in audio]
    return replace(like, inputs=inputs, attention_mask=mask, ids=list(texts), texts=list(texts), durations=durations)


def joined(utterances, number):
    """Utterances of `number` neighbours each."""
    for first in range(0, len(utterances) - number + 1, number):
        audio, texts = zip(*utterances[first : first + number], strict=True)
        yield torch.cat(audio), " ".join(texts)


def errors(saved, batches):
    """Prints the word error rate of each search, and how it differs from greedy search."""
    references = [text for batch in batches for text in batch.texts]
    counts = {}
    for name in SEARCHES:
        options = created("decoding", f"decoding={name}")
        found = [each for batch in batches for each in decode_batch(saved.model, saved.tokenizer, batch, options)]
        counts[name] = METRICS.count(references, [each.texts[0] for each in found])
        wer = confidence_intervals(METRICS, counts[name])["wer"]
        line = f"  {name:12} wer {wer.value:.2%} ({wer.low:.2%} to {wer.high:.2%})"
        if name != "greedy":
            test = paired_test(METRICS, counts["greedy"], counts[name])["wer"]
            line += f"  greedy {test.difference:+.2%} ({test.low:+.2%} to {test.high:+.2%}), p = {test.p_value:.3f}"
        print(line, flush=True)


def sides_of(saved, stock):
    """Functions from a batch to rows of ids, by name; those of the encoders return nothing."""
    model, start = saved.model, saved.model.config.decoder_start_token_id

    def searched(name):
        options = created("decoding", f"decoding={name}")
        return lambda batch: [each.ids[0] for each in decode_batch(model, saved.tokenizer, batch, options)]

    def by_transformers(**options):
        def search(batch):
            ids = stock.generate(batch.inputs, attention_mask=batch.attention_mask, max_new_tokens=200, **options)
            special = {start, model.config.eos_token_id, model.config.pad_token_id}
            return [[token for token in row if token not in special] for row in ids.tolist()]

        return search

    def encoder(batch):
        best_path(lattice_of(model, model.encode(batch.inputs, batch.padding_mask)), 200)

    return {
        "stock": by_transformers(do_sample=False),
        "greedy": searched("greedy"),
        "speculative": searched("speculative"),
        "stock beam": by_transformers(do_sample=False, num_beams=5),
        "beam": searched("beam"),
        "encoder": encoder,
        "stock encoder": lambda batch: stock.encoder(batch.inputs, attention_mask=batch.attention_mask) and None,
    }


def called(search, model):
    """What a search returns, and how often it computes a position of the decoder, or a draft."""
    calls = []
    hook = model.decoder.register_forward_hook(lambda *_: calls.append(1))
    with patch.object(Steps, "step", autospec=True, side_effect=Steps.step) as step:
        found = search()
    hook.remove()
    return found, len(calls) + step.call_count


def times(sides, batches, rounds):
    """The median CPU seconds of each side, which take turns with every batch."""
    seconds = defaultdict(list)
    for number in range(rounds):
        of_round = defaultdict(float)
        for batch in batches:
            for name in sides if number % 2 == 0 else reversed(sides):
                began = time.process_time()
                sides[name](batch)
                of_round[name] += time.process_time() - began
        for name, each in of_round.items():
            seconds[name].append(each)
    return {name: statistics.median(each) for name, each in seconds.items()}


def speed(saved, stock, batches, rounds):
    """Prints the calls and times of the sides; returns the CPU seconds."""
    sides, ids, calls = sides_of(saved, stock), {}, {}
    for name in sides:
        sides[name](batches[0])
        if "encoder" not in name:
            model = stock if name.startswith("stock") else saved.model
            found = [called(lambda name=name, batch=batch: sides[name](batch), model) for batch in batches]
            ids[name], calls[name] = [row for rows, _ in found for row in rows], sum(number for _, number in found)
    middle = times(sides, batches, rounds)
    encoders = {True: middle["stock encoder"], False: middle["encoder"]}
    of_decoder = {name: each - encoders[name.startswith("stock")] for name, each in middle.items()}
    for name in sides:
        line = f"  {name:13} {middle[name]:.2f} s"
        if "encoder" not in name:
            peer = "stock beam" if "beam" in name else "stock"
            same = sum(a == b for a, b in zip(ids[name], ids[peer], strict=True))
            line += f"  {calls[name]} calls  times {middle[peer] / middle[name]:.2f} of {peer}"
            line += f", decoder alone {of_decoder[peer] / of_decoder[name]:.2f}"
            line += f"  ids of {peer}: {same} of {len(ids[name])}"
        print(line, flush=True)
    return middle


def order(saved, utterances, batches, rounds):
    """Prints and returns the time of an evaluation in batches of its own order, and of as many utterances drawn at random."""
    mixed = random.Random(0).sample(utterances, len(utterances))
    size = -(-len(utterances) // len(batches))
    drawn = [batch_of(batches[0], mixed[first : first + size]) for first in range(0, len(mixed), size)]
    options = created("decoding", "decoding=greedy")

    def evaluate(batches):
        for batch in batches:
            decode_batch(saved.model, saved.tokenizer, batch, options)

    middle = times({"sorted": evaluate, "random": lambda _: evaluate(drawn)}, [batches], rounds)
    seconds = [sum(batch.inputs.numel() for batch in each) / 16000 for each in (batches, drawn)]
    print(
        f"  sorted {middle['sorted']:.2f} s, random {middle['random']:.2f} s: {middle['random'] / middle['sorted']:.2f} times"
    )
    print(f"  padded audio {seconds[0]:.0f} s, {seconds[1]:.0f} s")
    return middle


@contextmanager
def trained(run):
    """The folder of a training: `run`, or that of 300 steps."""
    if run is not None:
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        steps = ["trainer.max_steps=300", "trainer.max_time=null", "trainer.val_check_interval=300"]
        yield sedtrain.run(f"run_dir={folder}/run", *steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_of_run = "folder of a training with loss=joint on the embedded corpus; without it, one of 300 steps is made"
    parser.add_argument("run", type=Path, nargs="?", help=help_of_run)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--utterances", type=int, default=250, help="for speed; errors count all")
    parser.add_argument("--speed", action="store_true", help="no errors, speed alone")
    parser.add_argument("--json", type=Path, help="a file for the CPU seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with trained(options.run) as run:
        found = compare(run, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


@torch.inference_mode()
def compare(run, options):
    """Prints errors and times of the model in a run's folder; returns the CPU seconds."""
    transformers.logging.set_verbosity_error()
    saved, data = load(run), created("data")
    stock = transformers.SpeechEncoderDecoderModel.from_pretrained(run / "model").eval()
    connect(data, saved, ["test"])
    batches = list(data.batches("test"))
    utterances = utterances_of(batches)
    singles = [batch_of(batches[0], [each]) for each in utterances]
    longer = list(joined(utterances, 3))
    if not options.speed:
        print(f"{len(utterances)} utterances")
        errors(saved, batches)
        print(f"{len(longer)} of three utterances each")
        errors(saved, [batch_of(batches[0], longer[first : first + 8]) for first in range(0, len(longer), 8)])
    singles, utterances = singles[: options.utterances], utterances[: options.utterances]
    batches = batches[: max(1, len(batches) * options.utterances // 250)]
    found = {}
    for name, each in (("one at a time", singles), (f"in {len(batches)} batches", batches)):
        print(name)
        found[name] = speed(saved, stock, each, options.rounds)
    print("order of an evaluation")
    return found | {"order": order(saved, utterances_of(batches), batches, options.rounds)}


if __name__ == "__main__":
    main()
