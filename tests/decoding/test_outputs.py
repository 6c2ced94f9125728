"""What `task=transcribe` writes: text, JSON, SubRip and WebVTT, read back by the grammar of each."""

import html
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedtrain.config import rules
from sedtrain.decoding.outputs import LINE, LINES, TRANSCRIPT_WRITERS, Outputs, width
from sedtrain.decoding.transcription import Segment, Transcription, Word
from sedtrain.errors import UserError

TIME = r"(\d\d+):([0-5]\d):([0-5]\d)"
VTT_CUE = re.compile(rf"{TIME}\.(\d\d\d) --> {TIME}\.(\d\d\d)\n((?:(?!.*-->)[^\n<>]+\n)+)")
SRT_CUE = re.compile(rf"(\d+)\n{TIME},(\d\d\d) --> {TIME},(\d\d\d)\n((?:(?!.*-->)[^\n]+\n)+)")


def spoken(text, start=0.0, each=0.4, gap=0.0, **values):
    """A segment of words of `each` seconds, one behind the other."""
    words = [
        Word(word, start + n * (each + gap), start + n * (each + gap) + each, 0.9)
        for n, word in enumerate(text.split())
    ]
    return Segment(text, start, start + 60, words=tuple(words), **values)


def recording(*segments):
    return Transcription("a.wav", 90.0, segments)


def seconds(hours, minutes, rest, thousandths):
    return 3600 * int(hours) + 60 * int(minutes) + int(rest) + int(thousandths) / 1000


def cues_of(found, kind):
    """Start, end and lines of each subtitle; every character belongs to the grammar."""
    content = TRANSCRIPT_WRITERS[kind](found, None)
    if kind == "vtt":
        header, *blocks = content.split("\n\n")
        assert header.strip() == "WEBVTT"
        matches = [VTT_CUE.fullmatch(f"{block.strip()}\n") for block in blocks]
        fields = [match.groups() for match in matches]
    else:
        blocks = content.split("\n\n") if content else []
        matches = [SRT_CUE.fullmatch(f"{block.strip()}\n") for block in blocks]
        assert [int(match[1]) for match in matches] == list(range(1, len(matches) + 1))
        fields = [match.groups()[1:] for match in matches]
    unescape = html.unescape if kind == "vtt" else str
    return [(seconds(*each[:4]), seconds(*each[4:8]), unescape(each[8]).splitlines()) for each in fields]


def test_json_is_one_line_with_all_that_is_known():
    words = (Word("ein", 0.1, 0.25, 0.98765), Word("„Ei“", 0.3, 0.5, 1.0))
    others = ("kein Ei", -1.75), ("", -math.inf)
    found = recording(Segment("ein „Ei“", 0.0, 0.61254, -1.5, words, others), Segment("", 1.0, 2.0, -math.inf))
    written = TRANSCRIPT_WRITERS["json"](found, "de")
    assert written.count("\n") == 1 and "„Ei“" in written
    assert json.loads(written) == {
        "audio": "a.wav", "seconds": 90.0, "language": "de", "text": "ein „Ei“",
        "segments": [
            {
                "start": 0.0, "end": 0.613, "text": "ein „Ei“", "score": -1.5, "doubt": None,
                "others": [{"text": "kein Ei", "score": -1.75}, {"text": "", "score": None}],
                "words": [
                    {"text": "ein", "start": 0.1, "end": 0.25, "confidence": 0.9877},
                    {"text": "„Ei“", "start": 0.3, "end": 0.5, "confidence": 1.0},
                ],
            },
            {"start": 1.0, "end": 2.0, "text": "", "score": None, "others": [], "doubt": None, "words": None},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["srt", "vtt"])
@settings(max_examples=40)
@given(
    texts=st.lists(
        st.text("ab今天 &<>-\n", max_size=40).filter(lambda text: kind_is_plain(text)) | st.just("word " * 30),
        max_size=3,
    ),
    gap=st.sampled_from([0.0, 0.3, 2.0]),
    known=st.booleans(),
)
def test_subtitles_follow_the_grammar_and_hold_the_whole_text(kind, texts, gap, known):
    segments = [spoken(text, 100.0 * n, gap=gap) for n, text in enumerate(texts)]
    segments = segments if known else [Segment(each.text, each.start, each.end) for each in segments]
    cues = cues_of(recording(*segments), kind)
    assert "".join("".join(lines) for *_, lines in cues).replace(" ", "") == "".join("".join(texts).split())
    assert all(start < end for start, end, _ in cues)
    assert [start for start, *_ in cues] == sorted(start for start, *_ in cues)
    for _, _, lines in cues:
        assert all(width(line) <= LINE or " " not in line for line in lines)
        assert len(lines) <= LINES or not known


def kind_is_plain(text):
    """SubRip cannot write an arrow; it is tested below."""
    return "-->" not in text


def test_a_subtitle_ends_at_a_pause_after_two_lines_and_after_seven_seconds():
    assert [lines for *_, lines in cues_of(recording(spoken("one two", gap=1.5)), "srt")] == [["one"], ["two"]]
    long = cues_of(recording(spoken("twenty-four characters..", each=0.1), spoken("word " * 40, 5, each=0.1)), "vtt")
    assert [[len(line) for line in lines] for *_, lines in long] == [[24], [39, 39], [39, 39], [39]]
    assert [end - start for start, end, _ in cues_of(recording(spoken("slow " * 6, each=2.0)), "vtt")] == [6.0, 6.0]


def test_times_of_hours_and_arrows_and_marks_of_markup_are_written_as_each_format_has_them():
    found = recording(Segment("a --> <b> & c", 3_661.0005, 36_000.9996))
    assert TRANSCRIPT_WRITERS["srt"](found, None) == "1\n01:01:01,000 --> 10:00:01,000\na -> <b> & c\n"
    vtt = "WEBVTT\n\n01:01:01.000 --> 10:00:01.000\na --&gt; &lt;b&gt; &amp; c\n"
    assert TRANSCRIPT_WRITERS["vtt"](found, None) == vtt
    srt, vtt = (TRANSCRIPT_WRITERS[kind] for kind in ("srt", "vtt"))
    assert (srt(recording(), None), vtt(recording(Segment("", 0, 1)), None)) == ("", "WEBVTT\n")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x.wav", "/a/b/x.wav"], ["x", "b/x"]),
        (["/a/x.wav", "/a/X.flac"], ["x.wav", "X.flac"]),
        (["/a/b/c.d.wav"], ["c.d"]),
        (["-"], ["stdin"]),
    ],
)
def test_names_of_files_do_not_collide_and_lie_as_the_recordings_do(tmp_path, paths, names):
    assert list(Outputs(("srt",), tmp_path, None).names(paths).values()) == names


def test_each_format_is_a_file_and_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    Outputs(tuple(TRANSCRIPT_WRITERS), tmp_path / "out", "de").write(recording(spoken("ä b")), "c/x")
    files = {file.name for file in (tmp_path / "out/c").iterdir()}
    assert files == {"x.txt", "x.json", "x.srt", "x.vtt"}
    assert (tmp_path / "out/c/x.txt").read_text(encoding="utf-8") == "ä b\n"
    assert json.loads((tmp_path / "out/c/x.json").read_text(encoding="utf-8"))["language"] == "de"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to: .*\n    write out=FOLDER that you may write to"):
        Outputs(("srt",), tmp_path / "file", None).write(recording(), "x")


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_transcribed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to: .*\n    write out=FOLDER that you may write to"):
        Outputs(("srt",), tmp_path / "file", None).names(["a.wav"])


def test_the_formats_are_those_of_the_schema():
    assert tuple(TRANSCRIPT_WRITERS) == rules.TRANSCRIPT_FORMATS


def test_subtitles_of_several_recordings_need_a_folder():
    with pytest.raises(UserError) as refused:
        Outputs(("srt",), None, None).names(["a.wav", "b.wav"])
    assert (refused.value.option, refused.value.write) == ("out", "write out=FOLDER")
    assert Outputs(("srt",), None, None).names(["a.wav"]) == Outputs(("json",), None, None).names(["a", "b"]) == {}
