"""Lengths in headers are only claims: audio is what decodes, and a surplus or a lack is a fault of the file."""

import contextlib
import io
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpora import data_module, listed
from hypothesis import given, settings
from hypothesis import strategies as st

from sedtrain.data.audio import Content, read_audio, seconds_between
from sedtrain.data.headers import RefusedAudio, claim_of, crc8, mp3_frame
from sedtrain.errors import UserError

RATE = 16_000
NOISE = np.random.default_rng(0).normal(0, 0.1, 3 * RATE)


def encoded(container, subtype=None, samples=NOISE):
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=container, subtype=subtype)
    return file.getvalue()


def changed(content, at, form, number):
    return content[:at] + struct.pack(form, number) + content[at + struct.calcsize(form) :]


def flac(num_samples, content=None):
    """FLAC whose header claims a number of samples, of at most 36 bits."""
    content = content or encoded("FLAC")
    [fields] = struct.unpack(">Q", content[18:26])
    return changed(content, 18, ">Q", fields >> 36 << 36 | num_samples)


def without_xing(content):
    return content[mp3_frame(content[:4]).size :]


def nist(num_samples):
    return encoded("NIST", "PCM_16").replace(b"sample_count -i 48000", b"sample_count -i %05d" % num_samples)


def reason(call, *arguments):
    with pytest.raises(RefusedAudio) as raised:
        call(*arguments)
    return raised.value.reason


WAV, AIFF, AU, W64, CAF, RF64 = (encoded(name, "PCM_16") for name in ("WAV", "AIFF", "AU", "W64", "CAF", "RF64"))
SIZES = {  # where the size of the audio stands, how it is written, and what it counts beside the audio
    "wav": (WAV, 40, "<I", 0),
    "aiff": (AIFF, AIFF.find(b"SSND") + 4, ">I", 8),
    "au": (AU, 8, ">I", 0),
    "w64": (W64, W64.find(b"data") + 16, "<q", 24),
    "caf": (CAF, CAF.find(b"data") + 4, ">q", 4),
    "rf64": (RF64, RF64.find(b"ds64") + 16, "<q", 0),
}
UNKNOWN = {
    f"{name} {number}": changed(content, at, form, 2**32 - 1 if number and form[1] == "I" else number)
    for name, (content, at, form, _) in SIZES.items()
    for number in (0, -1)
} | {
    "wav sox": changed(WAV, 40, "<I", 0x7FFFF024),
    "flac": flac(0),
    "flac behind a tag": b"ID3\x04\0\0\0\0\x01\0" + bytes(128) + flac(0),
    "nist": nist(0),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_audio_of_unknown_length_is_decoded_to_its_end(name, tmp_path):
    (tmp_path / "a").write_bytes(UNKNOWN[name])
    for cell in (UNKNOWN[name], str(tmp_path / "a")):
        assert seconds_between(cell, None) == 3.0
        np.testing.assert_allclose(read_audio(cell, RATE), NOISE, atol=1e-4)
        np.testing.assert_allclose(read_audio(cell, RATE, None, 1.0, 2.5), NOISE[RATE : 5 * RATE // 2], atol=1e-4)


MORE = {
    f"{name} {seconds}": changed(content, at, form, round(seconds * 2 * RATE) + extra)
    for name, (content, at, form, extra) in SIZES.items()
    for seconds in (1, 2.5)
} | {
    "flac": flac(RATE),
    "nist": nist(RATE),
    "two of mp3": encoded("MP3") * 2,
    "two of au": AU * 2,
    "two of caf": CAF * 2,
}  # fmt: skip


@pytest.mark.parametrize("content", MORE.values(), ids=MORE)
def test_audio_behind_the_length_of_the_header_is_a_fault_and_no_loss(content):
    for call in (lambda: seconds_between(content, None), lambda: read_audio(content, RATE)):
        assert reason(call) == "more audio than its header says"


@pytest.mark.parametrize("first", ["VORBIS", "OPUS"])
def test_ogg_of_several_streams_is_told_as_what_it_is_since_libsndfile_reads_the_first_alone(first):
    content = encoded("OGG", first)
    with soundfile.SoundFile(io.BytesIO(content + encoded("OGG", "VORBIS"))) as whole:
        assert len(whole.read()) == len(soundfile.read(io.BytesIO(content))[0])
    for call in (lambda part: seconds_between(part, None), lambda part: read_audio(part, RATE)):
        assert reason(call, content + encoded("OGG", "VORBIS")) == "several streams in one file"


CUT = {name: encoded(name) for name in ("WAV", "AIFF", "FLAC", "MP3", "OGG", "NIST", "RF64")} | {
    "OPUS": encoded("OGG", "OPUS"),
    "AU": AU,
    "W64": W64,
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_off_is_a_fault_before_it_is_decoded(name):
    half = CUT[name][: len(CUT[name]) // 2]
    assert reason(seconds_between, half, None) == reason(read_audio, half, RATE) == "truncated audio"


def test_a_claim_of_any_length_is_a_fault_and_no_wish_of_the_user():
    for content in (flac(2**36 - 1), changed(WAV, 40, "<I", 0x7FFEFFFE)):
        assert reason(seconds_between, content, None) == "truncated audio"
    assert reason(seconds_between, changed(WAV[:44], 40, "<I", 0), None) == "no samples"


@pytest.mark.parametrize(
    "tail", [b"LIST\x04\0\0\0abcd" * 2000, b"id3 " + bytes(9000), bytes(20_000)], ids=["list", "id3", "zeros"]
)
@pytest.mark.parametrize("odd", [0, 1])
def test_what_stands_behind_the_audio_is_no_audio(tail, odd):
    eight_bit = encoded("WAV", "PCM_U8", NOISE[: RATE + odd])
    assert seconds_between(eight_bit[: 44 + RATE + odd] + b"\0" * odd + tail, None) == pytest.approx(1.0, abs=1e-3)
    assert len(read_audio(WAV + tail, RATE)) == 3 * RATE


def test_silence_at_the_beginning_is_audio_where_the_length_is_unknown():
    content = encoded("WAV", None, np.concatenate([np.zeros(6 * RATE), NOISE]))
    assert seconds_between(changed(content, 40, "<I", 0), None) == 9.0


def test_mp3_of_varying_bit_rate_is_whole_without_a_xing_header(tmp_path):
    whole = encoded("MP3")
    bare = without_xing(whole)
    id3 = b"ID3\x04\0\0\0\0\x01\0" + bytes(128)
    (tmp_path / "a.mp3").write_bytes(bare)
    for cell in (bare, bare[9:], id3 + bare + b"TAG" + bytes(125), str(tmp_path / "a.mp3")):
        assert seconds_between(cell, None) == pytest.approx(3.0, abs=0.1)
        found = read_audio(cell, RATE).numpy()
        last = [power[-RATE:].std() for power in (found[: 3 * RATE], NOISE)]
        assert last[0] == pytest.approx(last[1], rel=0.2)
    assert seconds_between(bare * 2, None) == pytest.approx(6.1, abs=0.1)
    assert seconds_between(id3 + whole + b"TAG" + bytes(125), None) == 3.0


@settings(max_examples=60)
@given(st.integers(1, 40_000), st.integers(1, 2), st.sampled_from(["PCM_16", "PCM_24", "PCM_S8"]))
def test_the_samples_of_flac_are_found_by_its_last_frame(number, channels, subtype):
    samples = np.random.default_rng(number).normal(0, 0.1, (number, channels))
    content = encoded("FLAC", subtype, samples)
    assert seconds_between(flac(0, content), None) == number / RATE
    assert claim_of(Content(content), len(content)).missing == 0


def test_the_checksum_is_that_of_flac():
    assert crc8(b"123456789") == 0xF4  # the check value of CRC-8 with the polynomial 7


@settings(max_examples=300)
@given(
    st.sampled_from(
        [b"RIFF", b"FORM", b"caff", b"riff", b".snd", b"NIST", b"fLaC", b"OggS", b"\xff\xfb\x90\0", b"ID3"]
    ),
    st.binary(max_size=200),
)
def test_broken_headers_claim_nothing_that_fails(first, rest):
    content = first + rest
    with contextlib.suppress(RefusedAudio):
        claim_of(Content(content), len(content))


SHORT = [
    encoded(container, subtype, NOISE[:2000])
    for container, subtype in [
        *((name, "PCM_16") for name in ("WAV", "AIFF", "AU", "W64", "CAF", "RF64", "FLAC")),
        *(("WAV", "MS_ADPCM"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    ]
]


def heard(cell):
    try:
        return read_audio(cell, RATE).tolist()
    except RefusedAudio as error:
        return error.reason


@settings(max_examples=200)
@given(
    st.sampled_from(SHORT),
    st.lists(st.tuples(st.integers(0, 150), st.binary(min_size=1, max_size=4) | st.just(b"\xff" * 8)), max_size=3),
    st.integers(0, 8000),
)
def test_broken_audio_is_the_same_or_refused_alike_as_bytes_a_file_and_a_part_of_one(content, changes, length):
    for at, others in changes:
        content = content[:at] + others + content[at + len(others) :]
    content = content[:length]
    with tempfile.TemporaryDirectory() as folder:
        alone, within = Path(folder, "alone.raw"), Path(folder, "within")
        alone.write_bytes(content)
        within.write_bytes(b"before" + content + b"behind")
        part = {"path": str(within), "offset": 6, "size": len(content)}
        assert heard(content) == heard(str(alone)) == heard(part)


def test_what_a_limit_leaves_out_really_is_too_long_or_too_short(tmp_path):
    """No row is left out for a limit of the user's that its header alone would break."""
    contents = {"piped": flac(0), "claims hours": flac(2**34), "claims nothing": flac(10), "long": encoded("FLAC")}
    (tmp_path / "data").mkdir()
    for name, content in contents.items():
        (tmp_path / f"data/{name}.flac").write_bytes(content)
    rows = [json.dumps({"id": name, "audio": f"{name}.flac", "text": "one"}) for name in contents]
    (tmp_path / "data/train.jsonl").write_text("\n".join(rows))
    columns = {"audio": "audio", "transcription": "text", "translation": None, "id": "id"}
    for most, reasons in ((30, {}), (2.5, {"piped": "too long", "long": "too long"})):
        folder = tmp_path / str(most)
        data = data_module(tmp_path / "data", folder, columns, max_seconds=most, max_bad_fraction=1)
        with contextlib.suppress(UserError):
            data.corpus.kept("train")
        faults = {"claims hours": "truncated audio", "claims nothing": "more audio than its header says"}
        assert {line["id"]: line["reason"] for line in listed(folder)} == faults | reasons
