import math

import numpy as np
import pytest

from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.statistics import Interval, Units, chance, confidence_intervals, paired_test, quantile

WER = MetricSet(["wer"])
WORDS = 10

# speakers (0: unknown), utterances of each, error rate, standard deviation of the speakers' rates as a share of it
CORPORA = {
    "80 independent utterances": (0, 80, 0.2, 0.0),
    "500 independent utterances with rare errors": (0, 500, 0.004, 0.0),
    "250 independent utterances with rare errors": (0, 250, 0.004, 0.0),
    "40 speakers": (40, 12, 0.2, 0.5),
    "40 speakers who differ much": (40, 12, 0.1, 0.9),
    "40 speakers with rare errors": (40, 12, 0.004, 0.5),
    "10 speakers with rare errors": (10, 50, 0.004, 0.5),
    "6 speakers": (6, 80, 0.1, 0.5),
    "4 speakers": (4, 125, 0.2, 0.4),
    "4 speakers with rare errors": (4, 125, 0.004, 0.3),
}


def counts_of(errors, words=WORDS):
    """(N, 5) counts of utterances of ten words, so many of which are substituted."""
    zeros = np.zeros_like(errors)
    return np.stack([zeros + words, errors, zeros, zeros, words - errors], axis=1)


def runs_with_error_rate(generator, rate, num_utterances):
    """(N, 5) counts of utterances of ten words, each word wrong with probability `rate`."""
    return counts_of(generator.binomial(WORDS, rate, size=num_utterances))


def drawn(generator, corpus, num_runs=1, uneven=0.0):
    """Counts of runs over new utterances of a corpus, and their speakers: as difficult for all runs, save for chance."""
    num_speakers, num_utterances, rate, spread = corpus
    sizes = np.full(max(num_speakers, 1), num_utterances)
    if uneven:
        sizes = np.maximum(1, np.round(sizes * generator.lognormal(-(uneven**2) / 2, uneven, len(sizes)))).astype(int)
    speakers = [f"speaker {number}" for number, size in enumerate(sizes) for _ in range(size)] if num_speakers else []
    rates = rate * generator.gamma(1 / spread**2, spread**2, len(sizes)) if spread else np.full(len(sizes), rate)
    rates = np.repeat(np.minimum(rates, 1), sizes)
    return [counts_of(generator.binomial(WORDS, rates)) for _ in range(num_runs)], speakers


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_the_interval_covers_the_true_rate_93_to_97_times_in_100(corpus):
    generator, covered = np.random.default_rng(0), []
    for _ in range(1500):
        [counts], speakers = drawn(generator, corpus)
        interval = confidence_intervals(WER, counts, speakers)["wer"]
        covered.append(interval.low <= corpus[2] <= interval.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_interval_covers_the_true_rate_where_a_few_speakers_say_most():
    generator, covered = np.random.default_rng(0), []
    for _ in range(1500):
        [counts], speakers = drawn(generator, (40, 12, 0.2, 0.4), uneven=1.0)
        interval = confidence_intervals(WER, counts, speakers)["wer"]
        covered.append(interval.low <= 0.2 <= interval.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_utterances_of_speakers_who_differ_do_not_count_as_independent():
    generator, covered = np.random.default_rng(0), []
    for _ in range(300):
        [counts], _ = drawn(generator, CORPORA["40 speakers"])
        interval = confidence_intervals(WER, counts)["wer"]
        covered.append(interval.low <= 0.2 <= interval.high)
    assert np.mean(covered) < 0.7  # what speakers are resampled for


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_equally_good_runs_seem_to_differ_7_times_in_100_at_most(corpus):
    generator, significant = np.random.default_rng(0), []
    for _ in range(1000):
        (first, second), speakers = drawn(generator, corpus, num_runs=2)
        significant.append(paired_test(WER, first, second, speakers)["wer"].p_value < 0.05)
    assert np.mean(significant) <= 0.07


def test_speakers_whom_one_run_suits_better_make_no_significant_difference():
    generator, by_speaker, by_utterance = np.random.default_rng(0), [], []
    for _ in range(500):
        (first, _), speakers = drawn(generator, CORPORA["40 speakers"], num_runs=2)
        (second, _), _ = drawn(generator, CORPORA["40 speakers"], num_runs=2)
        by_speaker.append(paired_test(WER, first, second, speakers)["wer"].p_value < 0.05)
        by_utterance.append(paired_test(WER, first, second)["wer"].p_value < 0.05)
    assert np.mean(by_speaker) <= 0.07 < 0.3 < np.mean(by_utterance)


def test_an_interval_and_its_test_agree():
    generator = np.random.default_rng(0)
    for rate in np.linspace(0.1, 0.3, 21):
        first, second = (runs_with_error_rate(generator, each, 60) for each in (0.2, rate))
        test = paired_test(WER, first, second)["wer"]
        assert (test.p_value < 0.05) == (not test.low <= 0 <= test.high)


def test_without_an_error_the_interval_ends_where_an_error_would_have_been_seen():
    counts = np.tile([WORDS, 0, 0, 0, WORDS], (500, 1))
    [interval] = confidence_intervals(WER, counts).values()
    assert (interval.value, interval.low) == (0, 0)
    assert (1 - interval.high) ** 5000 == pytest.approx(0.025, rel=0.02)
    few = confidence_intervals(WER, counts, [f"speaker {number % 4}" for number in range(500)])["wer"]
    assert few.high > 1.5 * interval.high


def test_one_error_leaves_no_narrower_interval_than_none():
    errors = np.zeros(500, dtype=int)
    none = confidence_intervals(WER, counts_of(errors))["wer"]
    errors[7] = 1
    one = confidence_intervals(WER, counts_of(errors))["wer"]
    # exact limits of a Poisson mean of which 1 was seen: 0.025 and 5.57
    assert one.low <= 0.025 / 5000 and one.high >= max(5.57 / 5000, none.high)


def test_a_perfect_translation_may_have_had_luck():
    translation = MetricSet(["bleu", "chrf"])
    texts = [f"the number {n} stands in this sentence" for n in range(40)]
    for interval in confidence_intervals(translation, translation.count(texts, texts)).values():
        assert interval.value == interval.high == 1
        assert 0.97 < interval.low < 1


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.2, 500)
    interval = confidence_intervals(WER, counts)["wer"]
    rates = counts[:, 1] / WORDS
    half_width = 1.965 * rates.std(ddof=1) / math.sqrt(len(rates))
    assert interval.value == pytest.approx(rates.mean())
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=1e-3)
    assert interval.low * interval.high == pytest.approx(interval.value**2)


@pytest.mark.parametrize("num_speakers", [None, 12])
def test_intervals_of_every_metric_are_as_wide_as_the_spread_of_a_bootstrap(num_speakers):
    metric_set = MetricSet(["wer", "cer", "bleu", "chrf"])
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(list("abcdefgh"), 12)) for _ in range(240)]
    units = np.arange(240) % (num_speakers or 240)
    rates = generator.uniform(0.05, 0.4, num_speakers or 240)
    changed = [
        " ".join("x" if generator.random() < rates[unit] else word for word in text.split())
        for text, unit in zip(texts, units, strict=True)
    ]
    counts = metric_set.count(texts, changed)
    sums = np.stack([counts[units == unit].sum(axis=0) for unit in np.unique(units)])
    weights = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 4000)
    spread = {name: values.std() for name, values in metric_set.values(weights @ sums).items()}
    speakers = [f"speaker {unit}" for unit in units] if num_speakers else ()
    correction = quantile(len(sums) - 1) * math.sqrt(len(sums) / (len(sums) - 1))
    for name, interval in confidence_intervals(metric_set, counts, speakers).items():
        assert interval.high - interval.low == pytest.approx(2 * correction * spread[name], rel=0.08)


def test_every_metric_gets_an_interval_around_its_corpus_value():
    metric_set = MetricSet(["wer", "cer", "bleu", "chrf"])
    references = [f"the number {n} stands in this sentence" for n in range(40)]
    hypotheses = [text if n % 3 else text.replace("stands", "is found") for n, text in enumerate(references)]
    counts = metric_set.count(references, hypotheses)
    intervals = confidence_intervals(metric_set, counts)
    for name, value in metric_set.values(counts.sum(axis=0)).items():
        assert intervals[name].value == value
        assert 0 < intervals[name].low < value < intervals[name].high < 1


def test_an_utterance_without_a_speaker_is_a_unit_of_its_own():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.2, 60)
    speakers = ["a"] * 20 + ["b"] * 20 + [None] * 20
    apart = ["a"] * 20 + ["b"] * 20 + [f"other {n}" for n in range(20)]
    assert confidence_intervals(WER, counts, speakers) == confidence_intervals(WER, counts, apart)


def test_the_order_of_utterances_changes_no_interval():
    generator = np.random.default_rng(0)
    [counts], speakers = drawn(generator, CORPORA["6 speakers"])
    order = generator.permutation(len(counts))
    shuffled = confidence_intervals(WER, counts[order], [speakers[each] for each in order])["wer"]
    interval = confidence_intervals(WER, counts, speakers)["wer"]
    assert (shuffled.low, shuffled.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("speakers", "fields", "text"),
    [
        ([], ("utterance", None, 0), "by utterance"),
        ([None] * 9, ("utterance", None, 0), "by utterance"),
        (["a"] * 9, ("utterance", 1, 0), "by utterance (only 1 speaker)"),
        (["a", "b"] * 9, ("speaker", 2, 0), "by speaker (only 2 speakers)"),
        ([str(n % 12) for n in range(99)], ("speaker", 12, 0), "by speaker (12 speakers)"),
        (["a", "b", None, None], ("speaker", 2, 2), "by speaker (only 2 speakers, 2 utterances of unknown speakers)"),
    ],
)
def test_units_are_named_and_few_speakers_are_said(speakers, fields, text):
    assert Units.of(speakers) == fields
    assert str(Units.of(speakers)) == text


def test_two_speakers_end_no_interval_beyond_everything_wrong():
    counts = counts_of(np.repeat([1, 4], 50))
    interval = confidence_intervals(WER, counts, ["a"] * 50 + ["b"] * 50)["wer"]
    assert interval.low < 0.05 and 0.9 < interval.high < 3


@pytest.mark.parametrize("references", [[], ["a b"]])
def test_no_utterance_and_a_single_one_have_no_interval(references):
    interval = confidence_intervals(WER, WER.count(references, references))["wer"]
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert interval.ends == "unknown"
    assert Interval(0.1, 0.05, 0.2).ends == "5.00 to 20.00 %"


# of tables of Student's t
@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (30, 2.042), (120, 1.980), (50_000, 1.960)]
)
def test_quantiles_and_chances_are_those_of_student(freedom, t):
    assert quantile(freedom) == pytest.approx(t, abs=6e-4)
    assert chance(t, freedom) == pytest.approx(0.05, abs=1e-4)


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
    assert test.p_value < 1e-6


def test_pairing_finds_a_difference_smaller_than_either_interval():
    hard_to_easy = runs_with_error_rate(np.random.default_rng(0), 0.3, 200)
    better = hard_to_easy.copy()
    better[::10, 1] -= np.minimum(better[::10, 1], 1)
    better[:, 4] = WORDS - better[:, 1]
    first, second = (confidence_intervals(WER, counts)["wer"] for counts in (hard_to_easy, better))
    assert first.low < second.high
    assert paired_test(WER, hard_to_easy, better)["wer"].p_value < 0.01


def test_runs_over_different_utterances_are_no_pair():
    counts = runs_with_error_rate(np.random.default_rng(0), 0.3, 5)
    with pytest.raises(ValueError, match=r"\(5, 5\) against \(4, 5\)"):
        paired_test(WER, counts, counts[:4])
