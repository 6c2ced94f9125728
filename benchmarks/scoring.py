"""Time and memory of scoring 10,000 pairs of texts: counts alone, beside jiwer and sacrebleu.

    python benchmarks/scoring.py        # a minute

counts    CPU seconds of one thread, the fastest of five rounds in turns with the package whose values they have
memory    most that Python and NumPy hold while a corpus of so many pairs is counted in batches
compare   seconds of `task=compare` for two runs of so many utterances
"""

import io
import json
import random
import tempfile
import time
import tracemalloc
from contextlib import redirect_stdout
from pathlib import Path

import jiwer
import sacrebleu

from sedtrain.compare import compare
from sedtrain.evaluation.metric_set import CorpusMetrics, MetricSet
from sedtrain.text.normalizers import normalizer

NUMBER, BATCH = 10_000, 16
ERRORS, OVERLAPS = ["wer", "cer", "mer", "wil"], ["bleu", "chrf"]
WORDS = [f"word{number}" for number in range(2_000)]
PEERS = {
    "wer": ("jiwer", jiwer.wer),
    "cer": ("jiwer", jiwer.cer),
    "bleu": ("sacrebleu", lambda references, hypotheses: sacrebleu.corpus_bleu(hypotheses, [references])),
    "chrf": ("sacrebleu", lambda references, hypotheses: sacrebleu.corpus_chrf(hypotheses, [references])),
}


def drawn_texts():
    """References of 5 to 25 words."""
    drawn = random.Random(0)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(5, 25))) for _ in range(NUMBER)]


def spoiled(texts, seed, share=0.1):
    """Hypotheses in which this share of the words is wrong."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choice(WORDS) if drawn.random() < share else w for w in text.split()) for text in texts]


def seconds_of(function, *arguments):
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def batches(references, hypotheses):
    for first in range(0, NUMBER, BATCH):
        yield references[first : first + BATCH], hypotheses[first : first + BATCH]


def show_counts(references, hypotheses, rounds=5):
    for name, (package, peer) in PEERS.items():
        sides = MetricSet([name], normalizer("none")).count, peer
        taken = [[seconds_of(side, references, hypotheses) for side in sides] for _ in range(rounds)]
        ours, theirs = map(min, zip(*taken, strict=True))
        print(f"{name}: {ours:.3f} s, {package} {theirs:.3f} s", flush=True)


def show_memory(names, references, hypotheses):
    for share in (10, 1):
        corpus = CorpusMetrics(MetricSet(names, normalizer("lowercase")))
        corpus.update(["a"], ["a"])
        tracemalloc.start()
        for number, batch in enumerate(batches(references, hypotheses)):
            if number * BATCH * share < NUMBER:
                corpus.update(*batch)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"memory of {NUMBER // share:,} pairs, {' '.join(names)}: {peak / 1e6:.2f} MB", flush=True)


def write_run(folder, names, references, hypotheses):
    metric_set = MetricSet(names)
    results = {
        "split": "test",
        "metrics": {name: {"value": 0.1, "low": 0.0, "high": 1.0} for name in names},
        "normalizer": metric_set.normalize.label(),
        "signatures": metric_set.signatures(),
    }
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    lines = (
        {"id": str(number), "speaker": f"s{number % 40}", "reference": one, "hypothesis": two}
        for number, (one, two) in enumerate(zip(references, hypotheses, strict=True))
    )
    (folder / "hypotheses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def show_compare(references, hypotheses):
    others = spoiled(references, seed=2)
    for names in (["wer", "cer"], ERRORS + OVERLAPS):
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder, name) for name in ("one", "two")]
            for run, written in zip(runs, (hypotheses, others), strict=True):
                write_run(run, names, references, written)
            start = time.perf_counter()
            with redirect_stdout(io.StringIO()):
                compare([str(run) for run in runs], Path(folder))
            print(f"compare, {len(names)} metrics: {time.perf_counter() - start:.1f} s", flush=True)


def main():
    references = drawn_texts()
    hypotheses = spoiled(references, seed=1)
    show_counts(references, hypotheses)
    for names in (ERRORS, OVERLAPS):
        show_memory(names, references, hypotheses)
    show_compare(references, hypotheses)


if __name__ == "__main__":
    main()
