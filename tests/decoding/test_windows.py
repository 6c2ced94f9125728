"""Windows of a recording: their plan, their samples, and the texts of those that overlap."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from corpora import syllables
from hypothesis import given
from hypothesis import strategies as st

from sedtrain.data.audio import audio_blocks, read_audio
from sedtrain.decoding import windows as module
from sedtrain.decoding.transcription import Segment, Transcription, Word
from sedtrain.decoding.windows import (
    LONG_PAUSE,
    MIN_SPEECH,
    activity_of,
    by_energy,
    joined,
    planned,
    samples_per_hop,
    windows_of,
)
from sedtrain.errors import UserError

RATE = 16_000
HOP = samples_per_hop(RATE)
runs = st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=12)


def activity(runs):
    """Hops of speech and of pauses; louder and quieter ones of each."""
    signs = np.concatenate([np.full(number, 1.0 if speaks else -1.0) for speaks, number in runs] or [np.zeros(0)])
    return signs * (1 + np.arange(len(signs)) * 7 % 5)


def long_runs(activity):
    """Stretches of at least MIN_SPEECH hops of speech, which no window may miss."""
    bounds = np.flatnonzero(np.diff(np.pad(activity > 0, 1).astype(int)))
    return [range(start, end) for start, end in bounds.reshape(-1, 2) if end - start >= MIN_SPEECH]


def check(windows, heard, limit, length):
    """Every hop that is heard is in one window, or in two that are marked as overlapping; none is longer than the limit."""
    count = np.zeros(length, int)
    for window in windows:
        assert 0 < window.end - window.start <= limit and window.start >= 0 and window.end <= length
        count[window.start : window.end] += 1
    for one, two in pairwise(windows):
        assert one.start < two.start and one.end < two.end
        assert (two.start < one.end) == two.overlaps
        count[two.start : one.end] -= two.overlaps
    assert all(count[hop] == 1 for each in heard for hop in each) and count.max(initial=0) <= 1


@given(runs, st.integers(4, 100))
def test_windows_hold_all_speech_once_in_order_within_the_limit(runs, limit):
    found = activity(runs)
    check(planned(found, limit), long_runs(found), limit, len(found))


@given(runs, st.integers(4, 40))
def test_a_window_ends_at_each_long_pause_and_overlaps_only_where_half_of_it_has_no_pause(runs, limit):
    found = activity(runs)
    for window in planned(found, limit):
        quiet = "".join("1" if value <= 0 else "0" for value in found[window.start : window.end])
        assert "1" * LONG_PAUSE not in quiet
    for one, two in pairwise(planned(found, limit)):
        if two.overlaps:
            assert (found[one.end - limit // 2 : one.end] > 0).all()


@given(runs, st.integers(4, 60), st.data())
def test_windows_of_a_stream_hold_all_speech_once_however_it_is_cut_to_blocks(runs, limit, data):
    found = activity(runs)
    samples = np.repeat(found, HOP).astype(np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=3)))
    before, module.HELD_SECONDS = module.HELD_SECONDS, 1
    try:
        windows = list(windows_of(np.split(samples, cuts), RATE, limit * HOP / RATE, lambda part, _: part[::HOP]))
    finally:
        module.HELD_SECONDS = before
    spans = [
        module.Span(each.start // HOP, each.start // HOP + -(-len(each.samples) // HOP), each.overlaps)
        for each in windows
    ]
    check(spans, long_runs(found), limit, len(found))
    for each in windows:
        np.testing.assert_array_equal(each.samples, samples[each.start : each.start + len(each.samples)])


def found_in(samples, seconds=4.0):
    return [
        (each.start / RATE, (each.start + len(each.samples)) / RATE)
        for each in windows_of([samples], RATE, seconds, by_energy)
    ]


def test_a_recording_that_fits_is_one_window_untouched():
    assert found_in(np.pad(syllables(2), RATE)) == [(0.0, 4.0)]


@pytest.mark.parametrize("level", [1.0, 0.001])
@pytest.mark.parametrize("background", [0.0, 0.05])
def test_speech_between_pauses_is_found_at_any_level_and_above_a_background(level, background):
    parts = [np.zeros(2 * RATE), syllables(2), np.zeros(3 * RATE), syllables(3), np.zeros(2 * RATE)]
    samples = np.concatenate(parts) + background * 0.1 * np.random.default_rng(1).standard_normal(12 * RATE)
    assert np.array(found_in((level * samples).astype(np.float32))) == pytest.approx(
        np.array([(2, 4), (7, 10)]), abs=0.35
    )


def noise(kind, seconds=30):
    times, random = np.arange(seconds * RATE) / RATE, np.random.default_rng(0)
    white = random.standard_normal(len(times))
    spectrum = np.fft.rfft(white)
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), len(times))
    return {
        "zeros": 0 * times, "offset": 0 * times + 0.3, "white": 0.1 * white, "faint": 1e-5 * white,
        "pink": 0.2 * pink / pink.std(),
        "brown": 0.001 * np.cumsum(white), "hum": 0.2 * np.sin(2 * np.pi * 50 * times),
    }[kind].astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("seconds", [4, 60])
@pytest.mark.parametrize("kind", ["zeros", "offset", "white", "faint", "pink", "brown", "hum"])
def test_silence_and_steady_noise_hold_no_speech(kind, seconds):
    assert found_in(noise(kind), seconds) == []


def test_silero_is_refused_where_it_is_not_installed():
    assert activity_of("auto") is activity_of("energy") is by_energy
    with pytest.raises(UserError) as raised:
        activity_of("silero")
    [error] = raised.value.errors
    assert (error.option, error.wrong) == ("decoding.pauses", "silero-vad is not installed")
    assert error.write == "pip install 'sedtrain[vad]', or write decoding.pauses=energy"


def test_recordings_read_in_several_threads_do_not_share_the_state_of_silero(monkeypatch):
    class Counting:
        """Hears as much as it has heard since it was reset."""

        def reset_states(self):
            self.num_hops = 0

        def __call__(self, hop, rate):
            self.num_hops += 1
            time.sleep(0.001)
            return torch.tensor(float(self.num_hops))

    monkeypatch.setattr(module, "silero", cache(Counting))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: module.by_silero(np.zeros(5120, np.float32), RATE), range(4)))
    for each in found:
        np.testing.assert_array_equal(each, np.arange(10) + 0.5)


def test_silero_hears_neither_noise_nor_silence(monkeypatch):
    monkeypatch.delitem(sys.modules, "silero_vad")
    pytest.importorskip("silero_vad")
    before = torch.get_num_threads()
    for kind in ("zeros", "white", "hum"):
        assert (activity_of("silero")(noise(kind, 2), RATE) <= 0).all()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("one", "two", "texts"),
    [
        ("a b c d", "c d e f", ("a b c d", "e f")),
        ("a b c x", "y c d e", ("a b c", "d e")),
        ("a b", "c d", ("a b", "c d")),
        ("", "a", ("", "a")),
        ("a", "a", ("a", "")),
        ("一二三四", "三四五六", ("一二三四", "五六")),
        ("hello", "world", ("hello", "world")),
    ],
)
def test_texts_of_overlapping_windows_have_their_common_words_once(one, two, texts):
    found = joined(Segment(one, 0.0, 4.0), Segment(two, 3.0, 7.0))
    assert tuple(each.text for each in found) == texts
    assert [(each.start, each.end) for each in found] == [(0.0, 3.5), (3.5, 7.0)]


@pytest.mark.parametrize(
    ("one", "two", "words", "text"),
    [
        ("a b c x", "y c d e", (["a", "b", "c"], ["d", "e"]), "a b c d e"),
        ("一 二 三 四", "三 四 五 六", (["一", "二", "三", "四"], ["五", "六"]), "一二三四五六"),
        ("一二 三四", "三 四五 六", (["一二", "三四"], ["五", "六"]), "一二三四五六"),
        ("", "三 四", ([], ["三", "四"]), "三四"),
    ],
)
def test_words_of_overlapping_windows_are_those_of_their_texts(one, two, words, text):
    spaced = " " if one.isascii() and one else ""

    def segment(written, start):
        times = [Word(word, start + n, start + n + 1, 0.9) for n, word in enumerate(written.split())]
        return Segment(spaced.join(written.split()), start, start + 4.0, words=tuple(times))

    found = joined(segment(one, 0.0), segment(two, 3.0))
    assert tuple([word.text for word in each.words] for each in found) == words
    assert Transcription("a.wav", 7.0, found).text == text


def test_words_of_overlapping_windows_follow_each_other_and_stay_in_their_segments():
    one = Segment("a b", 0.0, 4.0, words=(Word("a", 0.0, 1.0, 0.9), Word("b", 3.2, 3.9, 0.9)))
    two = Segment("c d", 3.0, 7.0, words=(Word("c", 3.1, 3.6, 0.9), Word("d", 5.0, 6.0, 0.9)))
    found = joined(one, two)
    assert [(each.start, each.end) for each in found] == [(0.0, 3.5), (3.5, 7.0)]
    times = [(word.start, word.end) for each in found for word in each.words]
    assert times == [(0.0, 1.0), (3.2, 3.5), (3.5, 3.6), (5.0, 6.0)]


@pytest.mark.parametrize(("rate", "suffix"), [(16_000, "flac"), (44_100, "wav"), (8_000, "wav"), (48_000, "mp3")])
def test_blocks_of_a_file_are_its_samples(tmp_path, rate, suffix, monkeypatch):
    monkeypatch.setattr("sedtrain.data.audio.STREAMED", 10_000)
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal((3 * rate, 2)), rate)
    blocks = list(audio_blocks(str(file), RATE))
    assert len(blocks) > 5
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(str(file), RATE).numpy(), atol=1e-6)
