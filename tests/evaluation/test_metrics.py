import math
import subprocess
import sys
from importlib.metadata import version

import jiwer
import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedtrain.errors import UserError
from sedtrain.evaluation.metric_set import CorpusMetrics, MetricSet
from sedtrain.evaluation.metrics import METRICS, TRANSCRIPTION
from sedtrain.evaluation.metrics_of_run import of_evaluate, of_function
from sedtrain.text.normalizers import normalizer

REFERENCES = ["the cat sat on the mat", "one two three four five", "hello there , my friend", "yes"]
HYPOTHESES = ["the cat sat on mat", "one too three three four five", "hello my friend", "no sir"]
TRANSLATION = ("bleu", "chrf")

words = st.lists(st.sampled_from(["a", "b", "c", "d", "ee"]), max_size=6).map(" ".join)
corpora = st.lists(st.tuples(words.filter(bool), words), min_size=1, max_size=8)


def corpus_metrics(names, references, hypotheses):
    metrics = CorpusMetrics(MetricSet(names))
    metrics.update(references, hypotheses)
    return metrics.compute()


@given(corpora)
@settings(max_examples=30, deadline=None)
def test_error_rates_equal_jiwer_over_the_whole_corpus(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    values = corpus_metrics(["mer", "wer", "wil", "cer"], references, hypotheses)
    words = jiwer.process_words(references, hypotheses)
    direct = {"mer": words.mer, "wer": words.wer, "wil": words.wil, "cer": jiwer.cer(references, hypotheses)}
    assert values == pytest.approx(direct)


@pytest.mark.parametrize(("reference", "hypothesis"), [("", ""), ("", "a b"), ("a b", ""), ("a", "b"), ("a", "a b c")])
def test_error_rates_of_corner_cases_equal_jiwer(reference, hypothesis):
    words = jiwer.process_words([reference], [hypothesis])
    direct = {"wer": words.wer, "mer": words.mer, "wil": words.wil}
    assert corpus_metrics(list(direct), [reference], [hypothesis]) == direct


texts = st.text(st.sampled_from("abé你 🙂ا"), max_size=12)


@given(st.lists(st.tuples(texts, texts), max_size=8))
@settings(max_examples=200, deadline=None)
def test_edits_of_every_utterance_are_those_of_jiwer(pairs):
    exact = MetricSet(TRANSCRIPTION, normalizer("none"))
    for row, texts in zip(exact.count(*map(list, zip(*pairs, strict=True))) if pairs else [], pairs, strict=True):
        reference, hypothesis = (" ".join(text.split()) for text in texts)
        for counts, process in ((row[1:5], jiwer.process_words), (row[5:], jiwer.process_characters)):
            edits = process(reference, hypothesis)
            assert counts.tolist() == [edits.substitutions, edits.deletions, edits.insertions, edits.hits]


@given(corpora)
@settings(max_examples=30, deadline=None)
def test_overlap_scores_equal_sacrebleu_over_the_whole_corpus(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    values = corpus_metrics(["bleu", "chrf", "ter"], references, hypotheses)
    assert values["ter"] == pytest.approx(sacrebleu.corpus_ter(hypotheses, [references]).score / 100)
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score / 100)
    assert values["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score / 100)


def test_counts_added_over_ranks_give_the_metrics_of_the_whole():
    names = list(METRICS)
    ranks = [CorpusMetrics(MetricSet(names)) for _ in range(2)]
    for rank, metrics in enumerate(ranks):
        metrics.update(REFERENCES[rank::2], HYPOTHESES[rank::2])
    ranks[0].counts = (torch.from_numpy(ranks[0].counts) + torch.from_numpy(ranks[1].counts)).numpy()
    assert ranks[0].compute() == corpus_metrics(names, REFERENCES, HYPOTHESES)


def test_the_counts_are_a_copy_of_whole_numbers_and_do_not_grow():
    metrics = CorpusMetrics(MetricSet(["wer"]))
    before = metrics.counts
    metrics.update(REFERENCES, HYPOTHESES)
    assert before.dtype == np.int64 and before.sum() == 0
    assert metrics.counts.shape == before.shape == (5,)


def test_update_returns_the_counts_of_each_utterance():
    rows = CorpusMetrics(MetricSet(["wer"])).update(["a b c", "a"], ["a x", "a b c d"])
    # words of the reference, substitutions, deletions, insertions, hits
    assert rows.tolist() == [[3, 1, 1, 0, 1], [1, 0, 0, 3, 1]]


def test_reset_forgets_every_utterance():
    metrics = CorpusMetrics(MetricSet(["wer"]))
    metrics.update(["a"], ["b"])
    metrics.reset()
    metrics.update(["a"], ["a"])
    assert metrics.compute() == {"wer": 0.0}


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer"),
    [("a", "a b c d", 3.0), ("a b", "", 1.0), ("", "", 0.0), ("", "a b", 2.0), ("a\t b ", "\na b", 0.0)],
)
def test_wer_of_corner_cases(reference, hypothesis, wer):
    assert corpus_metrics(["wer"], [reference], [hypothesis]) == {"wer": wer}


def test_insertions_against_an_empty_reference_count_in_the_corpus():
    assert corpus_metrics(["wer"], ["a b c d", ""], ["a b c d", "uh"]) == {"wer": 0.25}


@pytest.mark.parametrize("pair", [("", ""), ("", "a b"), ("a b", "")])
def test_overlap_with_an_empty_side_is_zero(pair):
    assert corpus_metrics(TRANSLATION, [pair[0]], [pair[1]]) == {"bleu": 0.0, "chrf": 0.0}


def test_a_perfect_translation_scores_exactly_one():
    assert corpus_metrics(TRANSLATION, REFERENCES, REFERENCES) == {"bleu": 1.0, "chrf": 1.0}


def test_no_utterance_has_no_error_rate():
    values = CorpusMetrics(MetricSet(TRANSCRIPTION + TRANSLATION)).compute()
    assert all(math.isnan(value) for value in values.values())
    assert MetricSet(["wer"]).count([], []).shape == (0, 5)


def test_the_normalizer_applies_to_both_sides():
    assert corpus_metrics(["wer"], ["One  TWO"], ["one two"]) == {"wer": 0.0}
    exact = CorpusMetrics(MetricSet(["wer"], normalizer("none")))
    exact.update(["One  TWO"], ["one two"])
    assert exact.compute() == {"wer": 1.0}


def test_values_of_many_sums_at_once_equal_values_of_each():
    metric_set = MetricSet(TRANSCRIPTION + TRANSLATION)
    rows = metric_set.count(REFERENCES, HYPOTHESES)
    for name, values in metric_set.values(rows).items():
        assert values.tolist() == [metric_set.values(row)[name] for row in rows]


def test_texts_without_partner_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        MetricSet(["wer"]).count(["a", "b"], ["a"])


def test_an_unknown_metric_is_named_with_the_closest_one():
    with pytest.raises(UserError, match="no metric called 'were': did you mean 'wer'") as error:
        MetricSet(["were"])
    assert error.value.write == "write one of wer, cer, mer, wil, bleu, chrf, ter"


def test_error_rates_fall_and_overlaps_rise_when_a_model_improves():
    assert [name for name, metric in METRICS.items() if metric.higher_is_better] == ["bleu", "chrf"]


def length_ratio(references, hypotheses, power=1):
    return (sum(map(len, hypotheses)) / sum(map(len, references))) ** power


def test_a_function_of_the_user_gets_all_texts_as_they_are_in_an_order_that_no_rank_changes():
    seen = []

    def function(references, hypotheses):
        seen.append((references, hypotheses))
        return length_ratio(references, hypotheses)

    metrics = CorpusMetrics(MetricSet(["wer"], own=[of_function("ratio", function, "here.ratio", None)]))
    metrics.update(["B b", "a  A"], ["b", "A"])
    assert metrics.compute() == {"wer": 0.5, "ratio": 2 / 7}
    assert seen[1:] == [(["B b", "a  A"], ["b", "A"])]
    assert metrics.metric_set.signatures() == {"ratio": "here.ratio"}
    metrics.reset()
    assert metrics.texts == []


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (lambda texts: 1.0, "it fails with TypeError: "),
        (lambda references, hypotheses: {"f1": 1.0}, "it fails with TypeError: float() argument"),
        (lambda references, hypotheses: 1 / 0, "it fails with ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_gives_no_number_is_refused_before_it_is_needed(function, wrong):
    with pytest.raises(UserError) as error:
        of_function("mine", function, "here.mine", True)
    assert (error.value.option, error.value.value) == ("metrics.mine", "here.mine")
    assert error.value.wrong.startswith(wrong)
    assert error.value.write == "it takes a list of references and a list of hypotheses, and returns a number"


def test_a_function_that_fails_later_has_no_value_and_ends_nothing(caplog):
    own = of_function("mine", lambda references, hypotheses: 1 / (2 - len(references)), "here.mine", True)
    metrics = CorpusMetrics(MetricSet(["wer"], own=[own]))
    metrics.update(["a", "b"], ["a", "b"])
    assert math.isnan(metrics.compute()["mine"])
    assert "metrics.mine has no value: it fails with ZeroDivisionError" in caplog.text


SCRIPT = """
import datasets
import evaluate
class Same(evaluate.Metric):
    def _info(self):
        texts = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(texts))
    def _compute(self, predictions, references, add=0):
        same = sum(map(str.__eq__, predictions, references)) / len(references)
        return {"same": same + add, "number": len(references), "all": predictions}
"""


@pytest.fixture
def same(tmp_path):
    (tmp_path / "same").mkdir()
    (tmp_path / "same/same.py").write_text(SCRIPT)
    return str(tmp_path / "same")


def test_a_metric_of_evaluate_is_loaded_from_its_folder(same):
    metric = of_evaluate("same", same, True, None, add=1)
    assert metric.value(REFERENCES, [REFERENCES[0], *HYPOTHESES[1:]]) == 1.25
    assert metric.signature == f"evaluate {version('evaluate')}: {same}"
    assert of_evaluate("mine", same, True, "number").value(REFERENCES, HYPOTHESES) == 4


def test_a_metric_of_evaluate_says_which_numbers_it_gives_and_what_cannot_be_loaded(same, tmp_path):
    with pytest.raises(UserError, match=r"write \+metrics.mine.key=NAME of a number among them"):
        of_evaluate("mine", same, True, "all")
    (tmp_path / "same/same.py").write_text("raise ValueError('broken')")
    with pytest.raises(UserError) as error:
        of_evaluate("mine", same, True, None)
    assert error.value.wrong == "it cannot be loaded: ValueError: broken"
    assert error.value.option == "metrics.mine.evaluate"


def test_packages_of_single_metrics_are_imported_when_these_are_counted():
    script = (
        "import sys, sedtrain.evaluation.metric_set as metrics\n"
        "print({'torch', 'jiwer', 'sacrebleu', 'pandas', 'datasets', 'evaluate', 'wandb'} & {*sys.modules})\n"
        "metrics.MetricSet(['bleu']).count(['a'], ['b']); print('sacrebleu' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == ["set()", "True"]
