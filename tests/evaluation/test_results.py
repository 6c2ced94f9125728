import json
import math
import os
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.results import (
    Evaluation,
    Hypothesis,
    Results,
    TrainingTotals,
    installed_versions,
    write_hypotheses,
)
from sedtrain.evaluation.statistics import Interval
from sedtrain.export.card_facts import write_eval_results

RESULTS = Results(
    task="train",
    split="test",
    num_utterances=200,
    audio_seconds=431.5,
    metrics={"wer": Interval(0.08, 0.06, 0.1), "cer": Interval(0.03, 0.02, 0.04)},
    normalizer={"name": "lowercase", "version": "1"},
    decoding={"num_beams": 1, "max_new_tokens": 40},
    rtfx=120.0,
    train=TrainingTotals(seconds=300.0, steps=1000, utterances=32000, audio_seconds_per_second=210.0),
    skipped={"too_long": 3},
    versions={"python": "3.11.9", "lightning": None},
    training_normalizer={"name": "none", "version": "1"},
    not_scored={"too long": 4},
    resampled="speaker",
    num_speakers=6,
    data="digits, test",
    run_dir="runs/a",
    commit={"id": "0123456789", "dirty": True},
)


def test_the_file_has_the_documented_keys(tmp_path):
    RESULTS.write(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == {
        "task": "train",
        "split": "test",
        "num_utterances": 200,
        "audio_seconds": 431.5,
        "metrics": {
            "wer": {"value": 0.08, "low": 0.06, "high": 0.1},
            "cer": {"value": 0.03, "low": 0.02, "high": 0.04},
        },
        "normalizer": {"name": "lowercase", "version": "1"},
        "decoding": {"num_beams": 1, "max_new_tokens": 40},
        "rtfx": 120.0,
        "train": {"seconds": 300.0, "steps": 1000, "utterances": 32000, "audio_seconds_per_second": 210.0}
        | {"planned_steps": None, "ended_by": None},
        "skipped": {"too_long": 3},
        "versions": {"python": "3.11.9", "lightning": None},
        "training_normalizer": {"name": "none", "version": "1"},
        "not_scored": {"too long": 4},
        "num_empty": 0,
        "num_cut": 0,
        "signatures": {},
        "resampled": "speaker",
        "num_speakers": 6,
        "num_without_speaker": 0,
        "data": "digits, test",
        "run_dir": "runs/a",
        "checkpoint": None,
        "commit": {"id": "0123456789", "dirty": True},
        "float32": None,
    }


def test_the_scores_of_8_bits_stand_above_those_of_float32():
    rounded = replace(RESULTS, metrics={"wer": Interval(0.09, 0.07, 0.11)}, float32={"wer": Interval(0.08, 0.06, 0.1)})
    assert rounded.rows() == [("WER", "9.00 %", "7.00 to 11.00 %"), ("WER in float32", "8.00 %", "6.00 to 10.00 %")]


def test_the_headline_names_what_was_not_scored():
    assert replace(RESULTS, num_utterances=155).headline == "155 scored, 4 too long"
    assert replace(RESULTS, not_scored={}).headline == "200 scored"
    assert replace(RESULTS, num_empty=5, num_cut=2).headline == (
        "200 scored, 4 too long (of the scored 5 with an empty reference, 2 cut at the limit of tokens)"
    )


def test_a_metric_of_no_utterance_is_null_in_the_file(tmp_path):
    nothing = Interval(math.nan, math.nan, math.nan)
    replace(RESULTS, metrics={"wer": nothing}, rtfx=math.nan).write(tmp_path / "results.json")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert (stored["metrics"]["wer"]["value"], stored["rtfx"]) == (None, None)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    RESULTS.write(path)
    before = path.read_bytes()

    def no_space_left(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space_left)
    with pytest.raises(OSError, match="No space left"):
        replace(RESULTS, split="validation").write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


def test_versions_name_what_decides_a_number():
    versions = installed_versions()
    assert set(versions) >= {"sedtrain", "python", "torch", "transformers", "lightning", "datasets"}
    assert versions["python"] and versions["torch"] and versions["transformers"]


def test_metrics_are_named_with_how_their_texts_were_compared():
    assert RESULTS.scored_as() == ["WER, CER: normalizer lowercase 1"]
    overlap = {"bleu": Interval(0.3, 0.2, 0.4), "chrf": Interval(0.5, 0.4, 0.6)}
    of_both = replace(RESULTS, metrics=overlap, signatures={"bleu": "nrefs:1|tok:zh", "chrf": "nrefs:1|nc:6"})
    assert of_both.scored_as() == ["BLEU: nrefs:1|tok:zh", "chrF: nrefs:1|nc:6"]


def test_intervals_are_titled_by_their_units():
    assert RESULTS.interval_title == "95 % interval, by speaker (only 6 speakers)"
    unknown = replace(RESULTS, resampled="utterance", num_speakers=None)
    assert unknown.interval_title == "95 % interval, by utterance"


def test_hypotheses_are_lines_of_json_with_the_counts_of_the_deciding_metric(tmp_path):
    metric_set = MetricSet(["wer", "cer"])
    hypotheses = [
        Hypothesis("ü\n1", "A b\u2028c", "a x", "s", "de", 1.5, -0.25),
        Hypothesis("2", "a", "", score=math.nan),
    ]
    counts = metric_set.count([each.reference for each in hypotheses], [each.hypothesis for each in hypotheses])
    write_hypotheses(tmp_path / "hypotheses.jsonl", Evaluation({}, hypotheses, counts, 1.0, 1.0), metric_set)
    first, second = (tmp_path / "hypotheses.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert json.loads(first) == {
        **{
            "id": "ü\n1",
            "speaker": "s",
            "language": "de",
            "seconds": 1.5,
            "reference": "A b\u2028c",
            "hypothesis": "a x",
        },
        **{"score": -0.25, "others": [], "errors": {"substitutions": 1, "deletions": 1, "insertions": 0, "hits": 1}},
    }
    assert json.loads(second)["score"] is None and '"ü' in first


FLEURS = "hf://datasets/google/fleurs@refs/convert/parquet/en_us/{split}/*.parquet"


@pytest.mark.parametrize(
    ("data", "dataset"),
    [
        ("openslr/librispeech_asr, clean, test", {"id": "openslr/librispeech_asr", "task_id": "clean"}),
        ("owner/name, test", {"id": "owner/name", "task_id": "default"}),
        ("owner/name@main, test", {"id": "owner/name", "task_id": "default"}),
        (f"{FLEURS}, en_us, test", {"id": "google/fleurs", "task_id": "en_us"}),
        ("owner/name, clean+other", None),
        ("https://host/name/a.parquet, test", None),
        ("digits, test", None),
        ("owner/name, test + owner/other, test", None),
    ],
)
def test_the_hub_reads_the_score_of_a_dataset_that_it_has(tmp_path, data, dataset):
    write_eval_results(tmp_path, replace(RESULTS, data=data))
    files = list(tmp_path.glob(".eval_results/*.yaml"))
    assert len(files) == (dataset is not None)
    for file in files:
        stored = yaml.safe_load(file.read_text())
        [entry] = parse_eval_result_entries(stored)
        assert stored[0]["dataset"] == dataset and entry.value == 8.0
        assert entry.notes.startswith(f"WER in percent, 95 % interval 6.00 to 10.00 %, of {data}; WER, CER: normalizer")
