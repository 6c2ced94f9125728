import math

import numpy as np
import pytest

from sedtrain.evaluation.intervals import Interval, bootstrap_intervals, paired_test
from sedtrain.evaluation.metrics import MetricSet

WER = MetricSet(["wer"])
WORDS = 10


def runs_with_error_rate(generator, rate, num_utterances):
    """(N, 5) counts of utterances of ten words, each word wrong with probability `rate`."""
    errors = generator.binomial(WORDS, rate, size=num_utterances)
    zeros = np.zeros_like(errors)
    return np.stack([zeros + 1, errors, zeros, zeros, WORDS - errors], axis=1)


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.2, 500)
    interval = bootstrap_intervals(WER, counts, num_resamples=4000)["wer"]
    rates = counts[:, 1] / WORDS
    half_width = 1.96 * rates.std() / math.sqrt(len(rates))
    assert interval.value == pytest.approx(rates.mean())
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.1)
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.1)


def test_the_interval_covers_the_true_rate_about_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        counts = runs_with_error_rate(generator, 0.2, 80)
        interval = bootstrap_intervals(WER, counts, num_resamples=200, seed=seed)["wer"]
        covered += interval.low <= 0.2 <= interval.high
    assert 88 <= covered <= 99


def test_the_same_seed_repeats_the_interval_and_another_does_not():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.3, 50)
    assert bootstrap_intervals(WER, counts) == bootstrap_intervals(WER, counts)
    assert bootstrap_intervals(WER, counts, seed=1) != bootstrap_intervals(WER, counts)


def test_every_metric_gets_an_interval_around_its_corpus_value():
    metric_set = MetricSet(["wer", "cer", "bleu", "chrf"])
    references = [f"the number {n} stands in this sentence" for n in range(40)]
    hypotheses = [text if n % 3 else text.replace("stands", "is found") for n, text in enumerate(references)]
    counts = metric_set.count(references, hypotheses)
    intervals = bootstrap_intervals(metric_set, counts, num_resamples=200)
    for name, value in metric_set.values(counts.sum(axis=0)).items():
        assert intervals[name].value == value
        assert 0 < intervals[name].low < value < intervals[name].high < 1


def test_equal_utterances_leave_no_width():
    counts = np.tile([1, 1, 0, 0, 3], (7, 1))
    assert bootstrap_intervals(WER, counts) == {"wer": Interval(0.25, 0.25, 0.25)}


def test_no_utterance_has_no_interval():
    interval = bootstrap_intervals(WER, WER.count([], []))["wer"]
    assert all(math.isnan(bound) for bound in (interval.value, interval.low, interval.high))


def test_a_run_does_not_differ_from_itself():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.3, 50)
    test = paired_test(WER, counts, counts)["wer"]
    assert (test.difference, test.low, test.high, test.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_clearly_better_run_is_told_apart():
    generator = np.random.default_rng(0)
    worse, better = (runs_with_error_rate(generator, rate, 200) for rate in (0.3, 0.2))
    test = paired_test(WER, worse, better)["wer"]
    assert test.difference == pytest.approx((better[:, 1].sum() - worse[:, 1].sum()) / (WORDS * 200))
    assert test.low < test.difference < test.high < 0
    assert test.p_value == pytest.approx(1 / 1001)


def test_equally_good_runs_seldom_seem_to_differ():
    generator = np.random.default_rng(2)
    num_significant = 0
    for seed in range(100):
        first, second = (runs_with_error_rate(generator, 0.2, 80) for _ in range(2))
        test = paired_test(WER, first, second, num_resamples=200, seed=seed)["wer"]
        num_significant += test.p_value < 0.05
    assert num_significant <= 11


def test_pairing_finds_a_difference_smaller_than_either_interval():
    hard_to_easy = runs_with_error_rate(np.random.default_rng(0), 0.3, 200)
    better = hard_to_easy.copy()
    better[::10, 1] -= np.minimum(better[::10, 1], 1)
    better[:, 4] = WORDS - better[:, 1]
    first, second = (bootstrap_intervals(WER, counts)["wer"] for counts in (hard_to_easy, better))
    assert first.low < second.high
    assert paired_test(WER, hard_to_easy, better)["wer"].p_value < 0.01


def test_runs_over_different_utterances_are_no_pair():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.3, 5)
    with pytest.raises(ValueError, match=r"\(5, 5\) against \(4, 5\)"):
        paired_test(WER, counts, counts[:4])
