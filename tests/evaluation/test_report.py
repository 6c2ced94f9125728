import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import jiwer
import numpy as np
import pytest
import soundfile

from sedtrain.evaluation.attention_picture import Listening
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.evaluation.metrics import METRICS, TRANSCRIPTION, Metric
from sedtrain.evaluation.report import write_report
from sedtrain.evaluation.results import Evaluation, Hypothesis, Results, TrainingTotals
from sedtrain.evaluation.statistics import confidence_intervals

PAIRS = [
    ("one two three", "one two three"),
    ("four five six", "four nine"),
    ("seven", "seven eight zero"),
    ("Two\tTWO two", "zero two two"),
    ("", "one"),
    ("nine nine nine nine", ""),
]
CURVES = """epoch,step,train/loss,train/cross_entropy,val/loss,val/wer
0,49,2.9,2.5,,
0,99,,,2.4,0.9
1,149,2.1,1.8,,
1,199,,,1.7,0.5
"""
VOID = {"meta", "br"}
TRANSLATION = ("bleu", "chrf")


def evaluated(pairs, names=TRANSCRIPTION, more=None):
    """more: the other fields of each hypothesis"""
    metric_set = MetricSet(names)
    counts = metric_set.count([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])
    hypotheses = [Hypothesis(f"utterance-{number}", *pair) for number, pair in enumerate(pairs)]
    if more:
        hypotheses = [replace(each, **fields) for each, fields in zip(hypotheses, more, strict=True)]
    metrics = confidence_intervals(metric_set, counts, [each.speaker for each in hypotheses])
    return Evaluation(metrics, hypotheses, counts, audio_seconds=90.0, rtfx=12.5)


def results_of(evaluation, train=None):
    return Results(
        task="transcription",
        split="test",
        num_utterances=len(evaluation.hypotheses),
        audio_seconds=evaluation.audio_seconds,
        metrics=evaluation.metrics,
        normalizer=MetricSet([]).normalize.label(),
        decoding={"num_beams": 4},
        rtfx=evaluation.rtfx,
        train=train,
        skipped={"too_long": 3},
        versions={"python": "3.11.9", "lightning": None},
    )


@pytest.fixture
def report(tmp_path):
    def write(pairs, names=TRANSCRIPTION, metrics_csv=None, audio_of=None, train=None, more=None, **options):
        evaluation = evaluated(pairs, names, more)
        path = tmp_path / "report.html"
        write_report(path, results_of(evaluation, train), evaluation, metrics_csv, audio_of, **options)
        return path.read_text(encoding="utf-8")

    return write


class Page(HTMLParser):
    """Attributes by tag, and the tags that were not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.crossed = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open.pop() != tag:
            self.crossed.append(tag)


def tone(identity):
    return np.sin(np.linspace(0, 400, 8000)).astype(np.float32) * 0.5, 8000


def test_every_tag_is_closed_in_order(report, tmp_path):
    (tmp_path / "metrics.csv").write_text(CURVES)
    page = Page(report(PAIRS, metrics_csv=tmp_path / "metrics.csv", audio_of=tone))
    assert page.crossed == []
    assert page.open == []


@pytest.mark.parametrize("name", [*METRICS, "length"])
def test_any_metric_alone_ranks_the_utterances(report, monkeypatch, name):
    """`length` is a new row of METRICS."""

    def count(reference, hypothesis):
        return [abs(len(reference) - len(hypothesis)), len(reference)]

    def value(counts):
        return counts[..., 0] / np.maximum(counts[..., 1], 1)

    monkeypatch.setitem(METRICS, "length", Metric("Length", ("apart", "letters"), False, count, value))
    html = report(PAIRS, [name])
    assert f"worst utterances, by {METRICS[name].title}" in html and "utterance-5" in html


def test_text_of_others_is_escaped(report):
    script = "<script>alert('1')</script>"
    for names in (TRANSCRIPTION, TRANSLATION):
        html = report([(f"a & b {script}", f'"{script}" & c')], names, model=script)
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert "& " not in html.split("</style>")[1]
        assert "&amp;" in html


def test_the_page_links_to_nothing_outside_it(report, tmp_path):
    (tmp_path / "metrics.csv").write_text(CURVES)
    html = report(PAIRS, metrics_csv=tmp_path / "metrics.csv", audio_of=tone)
    elements = Page(html).elements
    links = [a[key] for _, a in elements for key in ("src", "href", "xlink:href", "srcset", "data") if key in a]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "img", "object"}
    assert "@import" not in html
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))


def test_the_audio_is_in_the_page(report):
    html = report(PAIRS, audio_of=tone)
    players = [attributes for tag, attributes in Page(html).elements if tag == "audio"]
    assert len(players) == 5
    assert all("controls" in player for player in players)
    encoded = players[0]["src"].removeprefix("data:audio/flac;base64,")
    samples, sampling_rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)), dtype="float32")
    assert sampling_rate == 8000
    np.testing.assert_allclose(samples, tone("")[0], atol=1 / 2**15)


def test_audio_is_asked_for_only_where_it_is_shown(report):
    asked = []

    def audio_of(identity):
        asked.append(identity)
        return tone(identity)

    report([("one", "one")] + [("one two", "one nine")] * 30, audio_of=audio_of)
    assert len(asked) == 20
    assert "utterance-0" not in asked


def test_without_audio_there_is_no_player(report):
    assert "<audio" not in report(PAIRS)


def test_curves_are_drawn_where_the_log_is(report, tmp_path):
    (tmp_path / "metrics.csv").write_text(CURVES)
    html = report(PAIRS, metrics_csv=tmp_path / "metrics.csv")
    assert "Learning curves" in html
    figures = re.findall(r"<figure><figcaption>([^<]*)(.*?)</figure>", html, re.DOTALL)
    drawn = {caption: set(re.findall(r"(?:train|val)/[a-z_]+", svg)) for caption, svg in figures}
    assert drawn.pop("Cross-entropy without label smoothing, nats per token") == {"train/cross_entropy", "val/loss"}
    assert {"train/loss"} in drawn.values()
    assert drawn["Scores of the validation split"] == {"val/wer"}


@pytest.mark.parametrize("log", [None, "", "epoch,step,lr\n0,49,0.1\n"])
def test_without_a_log_of_losses_there_are_no_curves(report, tmp_path, log):
    path = tmp_path / "metrics.csv"
    if log is not None:
        path.write_text(log)
    assert "Learning curves" not in report(PAIRS, metrics_csv=path)
    assert "Learning curves" not in report(PAIRS, metrics_csv=None)


def test_coloured_words_are_as_many_as_jiwer_counts(report):
    html = report(PAIRS)
    edits = jiwer.process_words([" ".join(r.lower().split()) for r, _ in PAIRS], [h.lower() for _, h in PAIRS])
    counted = {"substitution": edits.substitutions, "deletion": edits.deletions, "insertion": edits.insertions}
    assert min(counted.values()) > 0
    assert {name: html.count(f'class="pair {name}"') for name in counted} == counted
    for name, count in counted.items():
        assert f'<td dir="auto">{name}s</td><td class="number">{count}</td>' in html


def cells(html, heading):
    """The cells of the rows of the table under a heading."""
    listed = html.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    rows = (re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in listed.split("<tr>"))
    return [row for row in rows if row]


def test_the_most_frequent_errors_of_each_kind_are_told_apart(report):
    html = report(
        [("one two", "one nine")] * 9 + [("one", "")] * 2 + [("one", "one six")] + [("a b", "c b"), ("a", "d")]
    )
    assert cells(html, "Most frequent errors") == [
        ["substitution", "two", "nine", "9"],
        ["substitution", "a", "c", "1"],
        ["substitution", "a", "d", "1"],
        ["deletion", "one", "–", "2"],
        ["insertion", "–", "six", "1"],
    ]


def test_the_worst_speakers_are_named_and_the_others_are_one_group(report):
    pairs = [("one two", "one two" if number < 990 else "one nine") for number in range(1000)]
    html = report(pairs * 2, more=[{"speaker": f"s{number}"} for number in range(1000)] * 2)
    rows = cells(html, "WER by speaker")
    assert {row[0] for row in rows[:-1]} == {f"s{number}" for number in range(990, 1000)}
    assert {tuple(row[1:3]) for row in rows[:-1]} == {("2", "50.00 %")}
    assert rows[-1][:3] == ["the 990 others", "1,980", "0.00 %"]
    assert html.count("<tr>") < 50


def test_groups_have_the_scores_and_intervals_of_their_utterances(report):
    pairs = [("one two", "one two"), ("one two", "one"), ("one two", "nine"), ("one two", "one two")]
    more = [{"language": language, "seconds": 1.0} for language in ("en", "de", "de", None)]
    html = report(pairs, more=more)
    own = evaluated(pairs[1:3]).metrics["wer"]
    assert cells(html, "WER by language")[0] == ["de", "2", f"{100 * own.value:.2f} %", own.ends]
    assert [row[:2] for row in cells(html, "WER by language")[1:]] == [["en", "1"], ["unknown", "1"]]
    assert "duration" not in html.split("</style>")[1]  # all are of one length, one speaker and one dataset
    assert "by speaker" not in html and "by dataset" not in html


def test_ids_name_the_dataset_of_a_mix(report):
    more = [{"id": f"{name}/clip/{number}"} for number, name in enumerate(["books", "news", "news", "talks"])]
    pairs = [("one two", "one two"), ("one two", "one"), ("one two", "nine"), ("one two", "one two")]
    assert [row[:2] for row in cells(report(pairs, more=more, labels=["books", "news", "talks"]), "WER by dataset")] == [
        ["news", "2"], ["books", "1"], ["talks", "1"],
    ]  # fmt: skip
    assert "by dataset" not in report(pairs, more=more, labels=[""])


@pytest.mark.parametrize("names", [TRANSCRIPTION, TRANSLATION])
def test_numbers_are_drawn_in_ranges_of_about_equal_size(report, names):
    more = [{"seconds": 1.0 + number} for number in range(61)]
    html = report([("one two", "one nine")] * 61, names, more=more)
    title = "WER" if "wer" in names else "chrF"
    figure = html.split(f"<h2>{title} by duration in seconds</h2>")[1].split("</figure>")[0]
    assert re.findall(r">([\d.]+–[\d.]+)<", figure) == ["1–11", "12–21", "22–31", "32–41", "42–51", "52–61"]


def test_other_texts_of_the_worst_are_listed_with_scores(report):
    html = report([("one", "nine")], more=[{"score": -0.25, "others": (("<b>", -1.5), ("", None))}])
    assert re.search("3-best.*<tr><td[^>]*>nine<.*-0.250.*&lt;b&gt;<.*-1.500.*–.*none", html)
    assert "-best" not in report([("one", "nine")])


def heard(attention=None, spans=None):
    return lambda utterance: Listening(2.0, ["$a", "<b>", "七"], attention, spans)


def test_the_worst_and_two_others_are_pictured_with_what_is_known(report):
    pairs = [("one two", "one two"), ("one two", "one six"), ("one two", "nine six"), ("one", ""), ("one", "x y z")]
    more = [{"seconds": seconds} for seconds in (1.0, 2.0, 3.0, 4.0, 31.0)]
    html = report(pairs, more=more, listen_to=heard(np.ones((3, 9)), [(0.1, 0.5), (0.6, 0.7), (0.7, 1.9)]))
    shown = html.split("Where the decoder listens")[1].split("<h2>")[0]
    assert re.findall("<figcaption>(.*?)</figcaption>", shown) == ["utterance-2", "utterance-1", "utterance-0"]
    assert all(
        text in shown for text in ("$a", "&lt;b&gt;", "七", "cross-attention", "where CTC hears", "data:image/png")
    )
    assert len(shown) < 3 * 30_000
    assert "no attention weights" in report(pairs, listen_to=heard())
    assert "without a CTC head" in report(pairs, listen_to=heard())


def test_a_decoder_that_fails_under_observation_costs_the_picture_alone(report, caplog):
    def fail(utterance):
        raise RuntimeError("no weights here")

    html = report([("one", "nine")], listen_to=fail)
    assert "utterance-0" in html and "listens" not in html
    assert "the report has no picture of the attention: RuntimeError: no weights here" in caplog.text


def test_the_worst_come_first_and_those_without_fault_not_at_all(report):
    html = report([("one two", "one two"), ("one two", "one nine"), ("one", ""), ("one two", "")])
    assert re.findall(r"<b>(utterance-\d)</b>", html) == ["utterance-3", "utterance-2", "utterance-1"]


def test_a_translation_is_ranked_by_chrf_and_has_no_kinds_of_error(report):
    html = report([("ein Hund", "ein Hund"), ("eine Katze", "eine Tatze"), ("drei Vögel", "x")], TRANSLATION)
    assert re.findall(r"<b>(utterance-\d)</b>", html) == ["utterance-2", "utterance-1"]
    assert "by chrF" in html
    assert "Errors by kind" not in html
    assert "WER" not in html
    assert "BLEU" in html
    assert "Tatze" in html


def test_scores_and_facts_are_those_of_the_results(report):
    train = TrainingTotals(seconds=300.0, steps=1234, utterances=32000, audio_seconds_per_second=210.0)
    evaluation = evaluated(PAIRS)
    html = report(PAIRS, train=train, model="hubert + bert")
    assert "<title>hubert + bert: transcription</title>" in html
    for fact in (
        "test",
        "1.5 min",
        "12.5",
        "5.0 min",
        "1,234 steps",
        "lowercase",
        "num_beams 4",
        "3 too_long",
        "3.11.9",
    ):
        assert fact in html
    assert f"{100 * evaluation.metrics['wer'].value:.2f} %" in html


def test_the_page_names_data_split_run_commit_and_version(tmp_path):
    evaluation = evaluated(PAIRS)
    results = replace(
        results_of(evaluation),
        data="openslr/librispeech_asr, clean, test.clean",
        run_dir="runs/2026-01-01_train",
        commit={"id": "89abcdef" * 5, "dirty": True},
        versions={"sedtrain": "0.1.7"},
    )
    write_report(tmp_path / "report.html", results, evaluation, None, None)
    html = (tmp_path / "report.html").read_text()
    for name, fact in {
        "data": results.data,
        "split": "test",
        "model": "trained in this run",
        "run folder": results.run_dir,
        "commit": "89abcdef89ab, with changed files",
        "sedtrain": "0.1.7",
    }.items():
        assert f'<dt>{name}</dt><dd dir="auto">{fact}</dd>' in html


def test_intervals_stand_beside_their_units_and_metrics_beside_their_normalizer(report):
    html = report(PAIRS)
    assert '<th class="number">95 % interval, by utterance</th>' in html
    assert "WER, CER: normalizer lowercase" in html
    assert "with 95 % intervals, by utterance" in html


@pytest.mark.parametrize("names", [TRANSCRIPTION, TRANSLATION])
@pytest.mark.parametrize("pairs", [[], [("one two", "one two")]])
def test_nothing_wrong_and_nothing_at_all_give_a_page_without_worst_utterances(report, pairs, names):
    assert "worst" not in report(pairs, names)
