"""Several runs over the same utterances: what is compared, what is refused, where a difference comes from."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import nan

import numpy as np
import pytest
from corpora import refused
from test_results import RESULTS

from sedtrain.compare import compare, short_names
from sedtrain.errors import UserError
from sedtrain.evaluation import statistics
from sedtrain.evaluation.comparison import compare_runs, differences_of
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import METRICS, Metric
from sedtrain.evaluation.results import Evaluation, Hypothesis, write_hypotheses
from sedtrain.evaluation.scored_runs import ScoredRun
from sedtrain.evaluation.statistics import Interval, chances_of_swaps, confidence_intervals, holm, paired_test

WER = MetricSet(["wer"])
WORDS = ["one", "two", "three", "four", "five", "six"]


def write_run(folder, rate, names=("wer", "cer"), number=60, seed=0, **changed):
    """A run that writes other words at a rate; every speaker has five utterances."""
    texts, said = np.random.default_rng(9), np.random.default_rng(seed)
    hypotheses = []
    for n in range(number):
        reference = texts.choice(WORDS, 3 + n % 7).tolist()
        wrote = ["zero" if said.random() < rate else word for word in reference]
        of_speaker = (f"speaker {n // 5}", "de" if n % 2 else "nl")
        hypotheses.append(Hypothesis(f"test-{n}", " ".join(reference), " ".join(wrote), *of_speaker, 1.5))
    metric_set = MetricSet(names)
    counts = metric_set.count([each.reference for each in hypotheses], [each.hypothesis for each in hypotheses])
    metrics = confidence_intervals(metric_set, counts)
    folder.mkdir(parents=True)
    of_set = {"normalizer": metric_set.normalize.label(), "signatures": metric_set.signatures()}
    replace(RESULTS, **{"metrics": metrics, **of_set, **changed}).write(folder / "results.json")
    write_hypotheses(folder / "hypotheses.jsonl", Evaluation({}, hypotheses, counts, 1.0, 1.0), metric_set)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "worse": {"rate": 0.3},
        "better": {"rate": 0.1, "seed": 1},
        "equal": {"rate": 0.3, "seed": 3, "number": 55},
    }
    return [write_run(folder / name, **each) for name, each in options.items()]


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The folder of a comparison of three runs, made by the command, and what it printed."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    code = (
        "import sys; from sedtrain.cli import run_command_line\n"
        "run_command_line(sys.argv[1:]); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    arguments = ["task=compare", f"runs=[{','.join(runs)}]", f"run_dir={folder}"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return folder, ended.stdout


def test_a_comparison_is_a_table_a_page_and_json_and_needs_no_torch(compared):
    folder, printed = compared
    stored = json.loads((folder / "compare.json").read_text())
    page = (folder / "compare.html").read_text()
    assert stored["names"] == ["worse", "better", "equal"] and list(stored["values"]) == ["wer", "cer"]
    assert (stored["num_utterances"], stored["left_out"]) == (55, [5, 5, 0])
    headline = "test: 55 utterances in common (5 of worse, 5 of better left out: another run lacks them)"
    better, equal = stored["verdicts"][:2]
    assert better.startswith("WER: better is better: ") and float(better.partition(", p = ")[2]) < 0.05
    assert equal.startswith("WER: no difference shown between equal and worse (p = ")
    for text in (headline, better, equal, "by speaker (11 speakers)", "WER, CER: normalizer lowercase"):
        assert text in printed and text.replace("<", "&lt;") in page
    assert "Confusions that changed most" in page and "http" not in page.replace("http://www.w3.org", "")
    assert printed.splitlines()[-1] == "False False"


def test_values_and_tests_are_those_of_the_common_utterances(runs):
    read = [ScoredRun.read(each) for each in runs]
    comparison = compare_runs(read, ["a", "b", "c"])
    common = [each for id, each in read[0].utterances.items() if id in read[2].utterances]
    speakers, references = [each.speaker for each in common], [each.reference for each in common]
    counts = [WER.count(references, [run.utterances[each.id].hypothesis for each in common]) for run in read]
    for run, difference in enumerate(comparison.differences["wer"], 1):
        assert difference.paired == paired_test(WER, counts[0], counts[run], speakers)["wer"]
        assert difference.p_value >= max(difference.paired.p_value, difference.p_swaps)
        assert comparison.values["wer"][run] == confidence_intervals(WER, counts[run], speakers)["wer"]


def test_points_of_groups_add_up_to_the_difference(runs):
    comparison = compare_runs([ScoredRun.read(each) for each in runs], ["a", "b", "c"])
    whole = comparison.differences["wer"][0].paired.difference
    groups = comparison.origins[0].groups
    assert list(groups) == ["length", "speaker", "language"]
    for of_kind in groups.values():
        assert sum(each.points for each in of_kind) == pytest.approx(whole)
        assert sum(each.num_utterances for each in of_kind) == 55
    assert groups["length"][0].name.startswith("3")


def test_many_speakers_are_those_that_explain_most_and_the_others(tmp_path):
    runs = [ScoredRun.read(write_run(tmp_path / name, rate, number=100)) for name, rate in (("a", 0.3), ("b", 0.1))]
    speakers = compare_runs(runs, ["a", "b"]).origins[0].groups["speaker"]
    assert len(speakers) == 13 and speakers[-1].name == "8 others" and speakers[-1].num_utterances == 40
    assert abs(speakers[0].points) >= abs(speakers[11].points)


def test_confusions_and_utterances_that_changed_are_named(tmp_path):
    before, after = (write_run(tmp_path / name, rate, number=4) for name, rate in (("a", 1.0), ("b", 0.0)))
    origin = compare_runs([ScoredRun.read(before), ScoredRun.read(after)], ["a", "b"]).origins[0]
    word, wrote, times, none = origin.confusions[0]
    assert word in WORDS and (wrote, none) == ("zero", 0) and times > 1
    assert [(each.first, each.other) for each in origin.changes] == [(1.0, 0.0)] * 4
    assert origin.changes[0].utterance.id == "test-3"  # the longest


@pytest.mark.parametrize("name", [*METRICS, "zeros"])
def test_any_metric_alone_is_compared(tmp_path, monkeypatch, name):
    """`zeros` is a new row of METRICS."""

    def count(reference, hypothesis):
        return [hypothesis.count("zero"), len(hypothesis.split())]

    def value(counts):
        return counts[..., 0] / np.maximum(counts[..., 1], 1)

    monkeypatch.setitem(METRICS, "zeros", Metric("Zeros", ("zeros", "words"), False, count, value))
    folders = [write_run(tmp_path / run, rate, [name], number=10) for run, rate in (("a", 0.5), ("b", 0.0))]
    compare(folders, tmp_path)
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["ranking"] == name and len(stored["origins"][0]["changes"]) > 5
    assert f"{METRICS[name].title} by length" in (tmp_path / "compare.html").read_text()


def test_a_metric_of_the_users_alone_is_refused_since_it_needs_the_function(tmp_path):
    own = {"metrics": {"mine": Interval(0.5, nan, nan)}}
    runs = [ScoredRun.read(write_run(tmp_path / name, 0.1, number=5, **own)) for name in "ab"]
    assert [each.own for each in runs] == [["mine"], ["mine"]]
    with pytest.raises(UserError, match="no metric is common to all"):
        compare_runs(runs, ["a", "b"])


def test_chances_of_swaps_are_those_of_all_swaps():
    generator = np.random.default_rng(0)
    counts = [
        WER.count(["a b c d e"] * 8, ["x " * n + "a b c d e"[2 * n :] for n in generator.integers(0, 5, 8)])
        for _ in "ab"
    ]
    errors = [each[:, 1:4].sum(axis=1) for each in counts]
    observed = abs(sum(errors[1]) - sum(errors[0]))
    swapped = [
        abs(sum(s * (b - a) for s, a, b in zip(signs, *errors, strict=True))) for signs in product((-1, 1), repeat=8)
    ]
    exact = np.mean([each >= observed for each in swapped])
    assert chances_of_swaps(WER, *counts, [])["wer"] == pytest.approx(exact, abs=0.02)
    assert chances_of_swaps(WER, counts[0][:5], counts[1][:5], []) == {}  # 2 of 32 swaps are no less than 0.05


@pytest.mark.parametrize("num_speakers", [None, 40, 8])
def test_equally_good_runs_are_told_apart_7_times_in_100_at_most_by_either_test(num_speakers, monkeypatch):
    monkeypatch.setattr(statistics, "NUM_SWAPS", 800)
    generator, p_values = np.random.default_rng(1), []
    speakers = [str(n % num_speakers) for n in range(240)] if num_speakers else [None] * 240
    for _ in range(300):
        # how difficult a speaker is for each run varies too, so that utterances of a speaker are no independent pairs
        rates = generator.beta(2, 8, (2, num_speakers))[:, np.arange(240) % num_speakers] if num_speakers else 0.2
        errors = generator.binomial(10, rates, (2, 240))
        zeros = np.zeros_like(errors[0])
        counts = [np.stack([zeros + 10, each, zeros, zeros, 10 - each], axis=1) for each in errors]
        [found] = differences_of(WER, counts[0], [counts[1]], speakers)["wer"]
        p_values.append((found.paired.p_value, found.p_swaps, found.p_value))
    rejected = (np.array(p_values) < 0.05).mean(axis=0)
    assert (rejected <= 0.07).all() and rejected[0] > 0.01


def test_holm_corrects_for_the_number_of_runs():
    # Holm's own steps: 3 x 0.01, 2 x 0.03, 1 x 0.04
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_better_run_has_the_lower_rate_and_the_higher_overlap(tmp_path):
    options = {"names": ("bleu", "ter"), "number": 60}
    runs = [ScoredRun.read(write_run(tmp_path / str(rate), rate, **options)) for rate in (0.4, 0.02)]
    verdicts = compare_runs(runs, ["a", "b"]).verdicts()
    assert [each.partition(":")[2][:12] for each in verdicts] == [" b is better"] * 2
    assert compare_runs(runs[::-1], ["b", "a"]).verdicts()[0].startswith("BLEU: b is better")


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    assert short_names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    assert short_names([tmp_path / "a", tmp_path / "b\x1b[2J"]) == ["a", "b\ufffd[2J"]


# --- what is refused


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"split": "validation"}, "its split is 'validation', that of {first} is 'test'"),
        (
            {"normalizer": {"name": "none", "version": "1"}},
            "its normalizer is 'none 1', that of {first} is 'lowercase 1",
        ),
        (
            {"signatures": {"bleu": "tok:zh"}, "names": ("wer", "bleu")},
            "its bleu is tok:zh, that of {first} is nrefs:1",
        ),
        ({"names": ("ter",)}, "no metric is common to all: {first} has ['wer', 'bleu']"),
    ],
)
def test_runs_that_were_scored_otherwise_are_refused(tmp_path, changed, wrong):
    first = write_run(tmp_path / "first", 0.1, names=("wer", "bleu"))
    other = write_run(tmp_path / "other", 0.1, **{"names": ("wer", "bleu"), **changed})
    with pytest.raises(UserError) as error:
        compare_runs([ScoredRun.read(first), ScoredRun.read(other)], ["first", "other"])
    assert error.value.option == "runs" and error.value.wrong.startswith(wrong.format(first=first))


def rewritten(folder, *changes):
    """The run with the lines of hypotheses.jsonl changed."""
    file = folder / "hypotheses.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for number, change in changes:
        lines[number] |= change
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_other_references_and_no_common_utterance_are_refused(tmp_path):
    first, other = (write_run(tmp_path / name, 0.1, number=8) for name in ("a", "b"))
    rewritten(tmp_path / "b", (2, {"reference": "another"}))
    message = refused(compare_runs, [ScoredRun.read(first), ScoredRun.read(other)], ["a", "b"])
    assert "1 of 8 common utterances have other references than in a: 'test-2'" in message
    rewritten(tmp_path / "b", *((n, {"id": f"other {n}"}) for n in range(8)))
    message = refused(compare_runs, [ScoredRun.read(first), ScoredRun.read(other)], ["a", "b"])
    assert "these runs have no utterance in common: their ids differ" in message


def test_files_of_a_stranger_are_data_that_is_checked(tmp_path):
    folder = write_run(tmp_path / "run", 0.1, number=4)
    rewritten(tmp_path / "run", (2, {"id": "test-1"}))
    assert "line 3 of" in (message := refused(ScoredRun.read, folder))
    assert "has the id 'test-1' again: utterances cannot be told apart" in message
    other = [{"reference": 3}, {"seconds": float("nan")}, {"speaker": []}, {"id": None}]
    for value in (*other, {"seconds": 10**400}, {"score": True}, {"hypothesis": "\ud800"}, {"speaker": "\udfff"}):
        rewritten(tmp_path / "run", (2, {"id": "test-2", "reference": "a", "seconds": 1, "speaker": None} | value))
        assert "line 3 of" in refused(ScoredRun.read, folder)
    for line in ("[" * 100_000, "3", "\udcff", '"' + "a" * 1_000_001):
        (tmp_path / "run/hypotheses.jsonl").write_bytes(line.encode("utf-8", "surrogateescape"))
        assert "is no utterance: expected JSON with the texts id, reference, hypothesis" in refused(
            ScoredRun.read, folder
        )
    for text in ('{"metrics": {"wer": 1}, "split": [], "normalizer": {"name": "none"}}', '{"metrics": 3}', "[]"):
        (tmp_path / "run/results.json").write_text(text)
        assert "holds no results: split, data, metrics, normalizer, signatures" in refused(ScoredRun.read, folder)
    (tmp_path / "run/results.json").unlink()
    message = refused(ScoredRun.read, folder)
    assert f"runs = '{folder}'\n    there is no file {folder}/results.json\n    write folders of runs" in message


def test_names_of_a_stranger_are_shown_without_what_a_terminal_acts_on(tmp_path):
    changed = {"data": "a\x1b[31mb\ud800", "signatures": {"bleu": "\x07"}, "metrics": {"wer": 1, "own\x1b": 1}}
    folder = write_run(tmp_path / "run", 0.1, number=4)
    results = tmp_path / "run/results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | changed))
    run = ScoredRun.read(folder)
    assert (run.data, run.signatures, run.own) == ("a\ufffd[31mb\ufffd", {"bleu": "\ufffd"}, ["own\ufffd"])


def test_a_run_is_not_compared_with_itself(runs, tmp_path):
    with pytest.raises(UserError, match="a run is named twice"):
        compare([runs[0], runs[0]], tmp_path)
