"""Words have the seconds in which they are said."""

import numpy as np
import pytest
import torch
from families import TOKENIZER, tiny_decoder, tiny_encoder
from tones import END, HOP, PAD, SAMPLES, batch_of, drawn_texts, joined, train

from sedtrain.batch import Utterance
from sedtrain.data.collate import Collator
from sedtrain.decoding.alignment import checked_by_ctc
from sedtrain.decoding.collator import frames_per_second
from sedtrain.decoding.ctc import Lattice, lattice_of
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.hypotheses import HeardWord, Hypotheses
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.timestamps import FrameTimes, timed
from sedtrain.decoding.transcription import Word
from sedtrain.models.adapter import QFormerAdapter, StackMLPAdapter
from sedtrain.models.saved import join
from sedtrain.text.tokenizers import train_tokenizer

RATE = 400  # of the tones: a token of 0.4 s, a frame of 50 ms
DIGITS = train_tokenizer(["一二三四五六七八九"], "char", 20)  # each token is a word
CTC = DecodingOptions(search="ctc")


@pytest.fixture(scope="module")
def hearing():
    return train(joined(tiny_decoder("bert", tokenizer=DIGITS)), steps=0)


@pytest.mark.parametrize("name", ["hubert", "moonshine", "parakeet", "sew", "speech_to_text", "whisper"])
def test_a_loud_moment_changes_most_the_frame_at_its_time(name):
    saved = join(tiny_encoder(name), tiny_decoder("bert"), lambda *widths: None, TOKENIZER)
    times, audio = FrameTimes.of(saved), torch.tensor(np.random.default_rng(0).normal(0, 0.01, 20_000)).float()
    louder = audio.clone()
    louder[8_000 - 80 : 8_000 + 80] *= 4
    utterances = [Utterance("", samples, 16_000, "", None, None, 1.25) for samples in (audio, louder)]
    batch = Collator(saved.feature_extractor, TOKENIZER, 1)(utterances)
    with torch.inference_mode():
        before, after = saved.model.eval().encode(batch.inputs, batch.attention_mask).encoder_frames
    loudest = (after - before).norm(dim=1).argmax().item()
    assert times.first + loudest * times.hop == pytest.approx(0.5, abs=times.hop / 2 + 1e-9)


def test_frames_of_pairs_of_features_stand_between_the_two():
    """Kaldi's first two windows have their centres at 12.5 and 22.5 ms."""
    saved = join(tiny_encoder("w2v_bert"), tiny_decoder("bert"), lambda *widths: None, TOKENIZER)
    assert FrameTimes.of(saved) == FrameTimes(0.02, 0.0175)


def test_the_decoder_s_frames_a_second_are_those_of_the_encoder_over_the_stride():
    parts = tiny_encoder("whisper"), tiny_decoder("llama")
    adapters = [StackMLPAdapter, QFormerAdapter, lambda *widths: StackMLPAdapter(*widths, stride=5)]
    assert [frames_per_second(join(*parts, adapter, TOKENIZER)) for adapter in adapters] == [25, 25, 10]


def test_borders_of_words_are_within_two_frames_of_the_known_ones(hearing):
    texts = drawn_texts(24, seed=2)
    batch = batch_of(texts, seed=2)
    said = [Hypotheses([text], texts=(DIGITS.decode(text),)) for text in texts]
    found = checked_by_ctc(DIGITS, lattice_of(hearing, hearing.encode(batch.inputs, batch.attention_mask)), said, True)
    times, errors = FrameTimes(HOP / RATE, 15 / RATE), []
    for text, each, audio, mask in zip(texts, found, batch.inputs, batch.attention_mask, strict=True):
        words = timed(each.words, audio[: mask.sum()], RATE, times)
        assert "".join(word.text for word in words) == DIGITS.decode(text)
        assert all(0.5 < word.confidence <= 1 for word in words)
        known = np.arange(len(text) + 1) * SAMPLES / RATE
        errors += [
            *(np.array([word.start for word in words]) - known[:-1]),
            *([word.end for word in words] - known[1:]),
        ]
    assert len(errors) > 200
    block = 0.01 + 1e-6  # in which times are counted
    assert np.mean(np.abs(errors) <= 2 * HOP / RATE + block) >= 0.95
    assert np.abs(np.median(errors)) <= HOP / RATE  # no pause says where in the two frames of blanks a tone begins


def test_words_do_not_depend_on_the_utterances_beside_theirs(hearing):
    texts = drawn_texts(6, seed=5)
    batch = batch_of(texts, seed=5)
    said = [Hypotheses([text], texts=(DIGITS.decode(text),)) for text in texts]
    together = checked_by_ctc(
        DIGITS, lattice_of(hearing, hearing.encode(batch.inputs, batch.attention_mask)), said, True
    )
    for number, (audio, mask) in enumerate(zip(batch.inputs, batch.attention_mask, strict=True)):
        lattice = lattice_of(hearing, hearing.encode(audio[None, : mask.sum()]))
        [alone] = checked_by_ctc(DIGITS, lattice, [said[number]], True)
        spans = [[(word.text, word.start, word.end) for word in each.words] for each in (together[number], alone)]
        assert spans[0] == spans[1]


def test_a_border_is_the_quietest_moment_between_what_was_heard_of_two_words():
    audio = torch.full((16_000,), 0.1)
    for start, level in ((0.30, 1e-5), (0.50, 1e-4), (0.70, 1e-5)):  # within a word, between two, within the other
        audio[int(start * 16_000) : int((start + 0.02) * 16_000)] = level
    found = [HeardWord("six", 20, 42, 0.9), HeardWord("two", 60, 80, 0.8)]
    one, two = timed(found, audio, 16_000, FrameTimes(0.01, 0.005))
    assert (one.start, two.end) == (0, 1)
    assert 0.5 <= one.end <= two.start <= 0.53


def test_a_border_is_no_stop_that_would_leave_a_very_short_word():
    audio = torch.full((16_000,), 0.1)
    audio[int(0.40 * 16_000) : int(0.42 * 16_000)] = 0.02  # between the words
    audio[int(0.80 * 16_000) : int(0.86 * 16_000)] = 1e-5  # before the "x", at which CTC hears the word
    found = [HeardWord("nine", 5, 7, 0.9), HeardWord("six", 88, 90, 0.8)]
    one, two = timed(found, audio, 16_000, FrameTimes(0.01, 0.005))
    assert (one.start, two.end) == (0, 1)
    assert 0.4 <= one.end <= two.start <= 0.42


def test_the_silence_behind_a_word_is_no_pause_before_it_where_ctc_hears_it_at_its_end():
    audio = torch.zeros(16_000)
    audio[1_600:11_200] = 0.1
    audio[6_400:6_560] = 0.01
    found = [HeardWord("one", 12, 14, 0.9), HeardWord("eight", 70, 78, 0.8)]
    one, two = timed(found, audio, 16_000, FrameTimes(0.01, 0.005))
    assert (one.start, two.end) == (pytest.approx(0.1, abs=0.011), pytest.approx(0.7, abs=0.011))
    assert 0.4 <= one.end <= two.start <= 0.41


def test_a_pause_parts_words_whose_letters_promise_other_lengths():
    audio = torch.full((16_000,), 0.1)
    audio[2_000:4_000] = 0.0
    audio[7_200:7_360] = 0.01  # half of the sound
    found = [HeardWord("I", 5, 7, 0.9), HeardWord("think", 70, 75, 0.8)]
    one, two = timed(found, audio, 16_000, FrameTimes(0.01, 0.005))
    assert (one.end, two.start) == (pytest.approx(0.125, abs=0.011), pytest.approx(0.25, abs=0.011))


def test_a_word_has_ended_where_its_room_still_sounds():
    audio = torch.zeros(16_000)
    audio[3_200:8_000] = 0.1
    audio[8_000:12_800] = 0.1 * 10 ** (torch.linspace(-32, -36, 4_800) / 20)
    [word] = timed([HeardWord("two", 40, 45, 0.9)], audio, 16_000, FrameTimes(0.01, 0.005))
    assert (word.start, word.end) == (0.2, 0.5)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100])
def test_times_do_not_drift_at_any_sampling_rate(rate):
    audio = torch.zeros(60 * rate)
    audio[round(59.0 * rate) : round(59.5 * rate)] = 0.1
    [word] = timed([HeardWord("six", 59_100, 59_200, 0.9)], audio, rate, FrameTimes(0.001, 0.0005))
    assert (word.start, word.end) == (pytest.approx(59.0, abs=0.011), pytest.approx(59.5, abs=0.011))  # a block


def test_a_word_ends_where_a_pause_begins_and_its_parts_may_be_apart():
    audio = torch.zeros(16_000)
    for start, end in ((0.10, 0.20), (0.25, 0.30), (0.60, 0.70)):  # the first two are one word, with a stop in it
        audio[int(start * 16_000) : int(end * 16_000)] = 0.1
    found = [HeardWord("eight", 11, 13, 0.9), HeardWord("two", 61, 62, 0.8)]
    words = timed(found, audio, 16_000, FrameTimes(0.01, 0.005))
    assert words == (Word("eight", 0.1, 0.3, 0.9), Word("two", 0.6, 0.7, 0.8))
    assert timed([], audio, 16_000, FrameTimes(0.01, 0.005)) == ()


@pytest.mark.parametrize("audio", [torch.zeros(800), torch.zeros(90), torch.ones(1)])
def test_words_heard_in_nothing_stay_in_their_audio(audio):
    found = [HeardWord("a", 0, 1, 0.1), HeardWord("b", 1, 2, 0.1), HeardWord("c", 2, 9, 0.1)]
    words = timed(found, audio, 16_000, FrameTimes(0.01, 0.005))
    assert [word.text for word in words] == ["a", "b", "c"]
    assert all(0 <= word.start <= word.end <= len(audio) / 16_000 for word in words)


def test_a_text_that_has_no_path_has_no_words_and_an_empty_one_has_none(hearing):
    batch = batch_of([[5, 6, 7], [6]], seed=3)
    encoded = hearing.encode(batch.inputs, batch.attention_mask)
    found = [Hypotheses([[5] * 200], texts=("一" * 200,)), Hypotheses([[]], texts=("",))]
    assert [each.words for each in checked_by_ctc(DIGITS, lattice_of(hearing, encoded), found, True)] == [None, ()]


def test_ctc_supports_a_text_as_far_as_it_hears_the_same_tokens():
    logits = 10 * torch.eye(len(DIGITS))[[5, PAD, 6, PAD, 7, PAD, 8]]
    lattice = Lattice.of(logits[None], torch.tensor([7]), PAD, END)
    found = [
        checked_by_ctc(DIGITS, lattice, [Hypotheses([text], texts=("",))], False)[0]
        for text in ([5, 6, 7, 8], [5, 6, 6, 5], [5, 6], [])
    ]
    assert [each.agreement for each in found] == [1, 0.5, 0.5, 0]
    assert [each.support for each in found] == [each.confidence * each.agreement for each in found]
    assert found[0].support > 0.99 and found[1].support < 0.5 and Hypotheses([[]]).support is None


def test_words_are_looked_for_by_ctc_whatever_search_wrote_the_text(hearing):
    batch = batch_of(drawn_texts(2, seed=4), seed=4)
    found = decode_batch(hearing, DIGITS, batch, DecodingOptions(max_new_tokens=5), with_words=True)
    assert all("".join(word.text for word in each.words) == each.texts[0] for each in found)
    assert decode_batch(hearing, DIGITS, batch, CTC)[0].words is None
    head, hearing.ctc_head = hearing.ctc_head, None
    try:
        assert decode_batch(hearing, DIGITS, batch, DecodingOptions(max_new_tokens=5), with_words=True)[0].words is None
    finally:
        hearing.ctc_head = head
