"""Text from audio by a saved model, in Python: `sedtrain.load` and its methods."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from corpora import syllables
from families import TOKENIZER, tiny_decoder, tiny_encoder

import sedtrain as package
from sedtrain.data.audio_paths import stored
from sedtrain.data.buckets import Bounds
from sedtrain.decoding import recordings
from sedtrain.decoding.collator import collator_of, positions_of_audio
from sedtrain.decoding.hypotheses import Hypotheses
from sedtrain.decoding.outputs import show
from sedtrain.decoding.transcriber import Transcriber, decoding_options
from sedtrain.decoding.windows import Window
from sedtrain.errors import UserError
from sedtrain.models import SpeechEncoderDecoder, int8
from sedtrain.models.adapter import QFormerAdapter
from sedtrain.models.saved import join

ROOT = Path(__file__).parents[2]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(trained):
    return package.load(trained)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Half a second of sound and its file, at 16 kHz in 16 bits."""
    file = tmp_path_factory.mktemp("speech") / "a.wav"
    soundfile.write(file, syllables(0.5), 16_000)
    return file, soundfile.read(file, dtype="float32")[0]


def refusal(function, *arguments, **options):
    with pytest.raises(UserError) as raised:
        function(*arguments, **options)
    [error] = raised.value.errors
    return error.option, error.wrong, error.write


def test_the_package_offers_the_model_and_its_use():
    assert package.SpeechEncoderDecoder is SpeechEncoderDecoder
    assert {"load", "SpeechEncoderDecoder", "__version__"} <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = package.lod


@pytest.mark.parametrize("folder", ["", "model"])
def test_files_and_arrays_give_the_text_that_the_command_prints(sedtrain, trained, model, speech, folder):
    file, samples = speech
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={file}", "decoding.max_new_tokens=6")
    text = ended.out.removeprefix(f"{file}\t").removesuffix("\n")
    assert package.load(trained / folder).transcribe(str(file), **SHORT) == text
    assert model.transcribe([file, samples], sampling_rate=16_000, **SHORT) == [text, text]


def test_the_command_writes_files_of_several_formats_and_reads_standard_input(
    sedtrain, trained, model, speech, tmp_path, monkeypatch
):
    command = ["task=transcribe", f"checkpoint={trained}", "decoding.max_new_tokens=6"]
    ended = sedtrain(*command, f"audio={speech[0]}", "format=[json,vtt]", f"out={tmp_path}/texts")
    assert (ended.status, ended.out) == (0, "")
    written = json.loads((tmp_path / "texts/a.json").read_text(encoding="utf-8"))
    found = model.transcription(speech[0], **SHORT)
    assert written["text"] == found.text and written["seconds"] == 0.5
    words = [[word["text"] for word in segment["words"]] for segment in written["segments"]]
    assert words == [[word.text for word in segment.words] for segment in found.segments]
    assert (tmp_path / "texts/a.vtt").read_text(encoding="utf-8").startswith("WEBVTT\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(speech[0].read_bytes())))
    ended = sedtrain(*command, "audio=-")
    assert ended.out == f"-\t{found.text}\n" and "audio=/" not in ended.err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bytes(100))))
    ended = sedtrain(*command, "audio=-")
    assert ended.status == 2 and "audio = '-'" in ended.err and "cat a.wav | sedtrain" in ended.err


def test_more_standard_input_than_a_wav_file_holds_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bytes(20))))
    monkeypatch.setattr("sedtrain.data.audio_paths.MOST_BYTES", 10)
    with pytest.raises(UserError, match="standard input gives more than"), stored("-"):
        pass


def test_without_a_ctc_head_words_are_unknown_and_a_warning_says_so(model, speech, caplog):
    head, model.model.ctc_head = model.model.ctc_head, None
    try:
        found = model.transcription(speech[0], **SHORT)
    finally:
        model.model.ctc_head = head
    assert [segment.words for segment in found.segments] == [None] * len(found.segments)
    assert [
        each for each in warnings_of(caplog) if each.startswith("words have no times: the model was trained without")
    ]


def test_where_nobody_reads_the_command_ends_quietly(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            show("text\n")
    assert ended.value.code == 141


def test_an_array_is_brought_to_the_rate_of_the_model(model, speech):
    collator = Transcriber(model, decoding_options({})).collator
    assert collator.sampling_rate == 16_000
    high = soxr.resample(speech[1], 16_000, 48_000)
    text = model.transcribe(soxr.resample(high, 48_000, 16_000), sampling_rate=16_000, **SHORT)
    assert model.transcribe(high.astype("float64"), sampling_rate=48_000, **SHORT) == text


def test_no_audio_is_no_text(model):
    assert model.transcribe([]) == []


@pytest.mark.parametrize(
    ("array", "rate", "option", "wrong"),
    [
        (np.zeros(100), None, "sampling_rate", "an array does not say its sampling rate"),
        (np.zeros(100), 0, "sampling_rate", "an array does not say its sampling rate"),
        (np.zeros(100, "int16"), 16_000, "audio", "this has to be one channel of floating-point samples"),
        (np.zeros((100, 2)), 16_000, "audio", "this has to be one channel of floating-point samples"),
        (np.zeros(0), 16_000, "audio", "the audio has no samples"),
        (np.full(100, np.nan), 16_000, "audio", "100 of 100"),
    ],
)
def test_an_array_that_is_no_audio_is_refused(model, array, rate, option, wrong):
    assert refusal(model.transcribe, array, sampling_rate=rate)[:2] == (option, wrong)


def test_a_file_that_cannot_be_read_is_refused(model, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"this is no audio")
    option, _, write = refusal(model.transcribe, [tmp_path / "a.wav"])
    assert (option, write) == ("audio", "write audio=FILE that can be read to its end")


def test_a_recording_that_was_piped_has_the_text_of_the_whole(model, speech, tmp_path):
    file, samples = speech
    soundfile.write(tmp_path / "a.flac", soundfile.read(file, dtype="int16")[0], 16_000)
    for name, content, at, size in (
        ("a.flac", (tmp_path / "a.flac").read_bytes(), 21, 5),
        ("b.wav", file.read_bytes(), 40, 4),
    ):
        kept = content[at] & 0xF0 if name == "a.flac" else 0
        (tmp_path / name).write_bytes(content[:at] + bytes([kept]) + bytes(size - 1) + content[at + size :])
    expected = model.transcribe(samples, sampling_rate=16_000, **SHORT)
    assert model.transcribe([tmp_path / "a.flac", tmp_path / "b.wav"], **SHORT) == [expected] * 2


def test_a_file_that_is_not_as_long_as_it_says_is_refused_with_the_reason(model, speech, tmp_path):
    content = speech[0].read_bytes()
    (tmp_path / "cut.wav").write_bytes(content[:8_044])
    (tmp_path / "more.wav").write_bytes(content[:40] + (8_000).to_bytes(4, "little") + content[44:])
    for name, wrong in (
        ("cut", "truncated audio: 0.25 s are missing"),
        ("more", "more audio than its header says: 0.25 s more"),
    ):
        assert refusal(model.transcribe, tmp_path / f"{name}.wav")[:2] == ("audio", wrong)


def test_a_file_that_does_not_exist_is_named(model, tmp_path):
    refused = refusal(model.transcribe, tmp_path / "nowhere.wav")
    assert refused == ("audio", "there is no such audio file", "write audio=FILE")


@pytest.mark.parametrize(
    ("asked", "wrong", "write"),
    [
        (
            {"lm": "/no/folder"},
            "there is no such folder",
            "write decoding.lm=FOLDER saved by save_pretrained, or a Hub id",
        ),
        ({"hotwords": ["two", "Two"]}, "the decoder's tokenizer cannot write 'Two'", "write words of its characters"),
    ],
)
def test_what_a_search_needs_beside_the_model_is_refused_before_any_audio_is_read(model, asked, wrong, write):
    with pytest.raises(UserError) as refused:
        Transcriber(model, decoding_options(asked))
    [error] = refused.value.errors
    assert (error.option, error.wrong) == (f"decoding.{next(iter(asked))}", wrong)
    assert error.write.startswith(write) and "size=tiny" not in error.write


def test_8_bits_decode_a_copy_of_the_model(model, speech, monkeypatch):
    monkeypatch.setattr(int8, "FOR_FRAMES", 1)
    asked = Transcriber(model, decoding_options({**SHORT, "int8": True}))
    assert any(isinstance(each, int8.Int8Linear) for each in asked.saved.model.modules())
    assert not any(isinstance(each, int8.Int8Linear) for each in model.model.modules())
    assert asked.transcription_of(speech[0]).text == asked.transcription_of(speech[1], 16_000).text


def test_options_that_cannot_be_are_refused(model, speech):
    option, wrong, write = refusal(model.transcribe, speech[0], num_beam=5)
    assert (option, wrong) == ("num_beam", "decoding has no option 'num_beam'")
    assert "num_beams" in write
    assert refusal(model.transcribe, speech[0], target="translate")[0] == "target"
    option, wrong, _ = refusal(model.transcribe, speech[0], language="de")
    assert option == "data.language"
    assert "trained without language tags" in wrong


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("num_beams", 0, "a whole number from 1 to 1,000"),
        ("num_beams", 1.5, "a whole number from 1 to 1,000"),
        ("do_sample", "no", "bool"),
        ("top_k", -1, "a whole number of 0 or more"),
        ("no_repeat_ngram_size", -1, "a whole number of 0 or more"),
        ("temperature", 0, "a number above 0"),
        ("temperature", float("nan"), "a number above 0"),
        ("top_p", 1.5, "a fraction above 0, at most 1"),
        ("top_p", 0, "a fraction above 0, at most 1"),
    ],
)
def test_decoding_options_out_of_range_are_refused_without_a_configuration_too(option, value, wanted):
    refused, wrong, write = refusal(decoding_options, {option: value})
    assert (refused, wrong) == (f"decoding.{option}", f"expected {wanted}")
    assert f" decoding.{option}=" in write


def test_decoding_options_that_cannot_be_are_refused_together_and_the_ends_of_ranges_are_in_them():
    with pytest.raises(UserError, match=r"2 problems:\n\n  decoding.num_beams = 0\n"):
        decoding_options({"top_p": 2, "num_beams": 0})
    ends = {"num_beams": 1, "max_new_tokens": 1, "top_k": 0, "top_p": 1, "no_repeat_ngram_size": 0, "temperature": 1e-3}
    assert decoding_options(ends).top_p == 1


INFERENCE = """
import json, sys, time
start = time.perf_counter()
import sedtrain
seconds, before = time.perf_counter() - start, "torch" in sys.modules
text = sedtrain.load(sys.argv[1]).transcribe(sys.argv[2], max_new_tokens=6, pauses="energy")
print(json.dumps([seconds, before, text, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_inference_imports_nothing_that_only_training_needs(trained, model, speech):
    command = [sys.executable, "-c", INFERENCE, str(trained), str(speech[0])]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    seconds, had_torch, text, imported = json.loads(ended.stdout)
    assert (seconds < 0.1, had_torch, text) == (True, False, model.transcribe(speech[0], **SHORT))
    assert "torch" in imported
    training = {
        "lightning",
        "hydra",
        "omegaconf",
        "datasets",
        "pandas",
        "pyarrow",
        "jiwer",
        "sacrebleu",
        "evaluate",
        "wandb",
    }
    assert training & set(imported) == set()


# --- audio that is too long


def test_windows_are_decoded_by_length_within_the_bounds_of_training_batches(model, monkeypatch):
    decoded, seconds = [], [0.5, 2.0, 0.6, 0.7, 1.9, 9.0]

    def decode(model, tokenizer, batch, *_):
        decoded.append(batch.durations)
        return [Hypotheses([[5]], texts=(f"{each:g}",)) for each in batch.durations]

    monkeypatch.setattr(recordings, "decode_batch", decode)
    batches = [{"seconds": 1, "tokens": 9, "utterances": 2}, {"seconds": 3, "tokens": 9, "utterances": 4}]
    decoder = recordings.RecordingDecoder(model, decoding_options({}), bounds=Bounds.of(batches=batches))
    windows = [Window(0, np.zeros(round(each * 16_000), "float32")) for each in seconds]
    two = [recordings.Recording(decoder, name, []) for name in "ab"]
    decoder.add_texts([(two[number % 2], window) for number, window in enumerate(windows)])
    assert [each.transcription().text for each in two] == ["0.5 0.6 1.9", "2 0.7 9"]
    assert decoded == [[9.0], [2.0, 1.9], [0.7, 0.6], [0.5]]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "sedtrain.decoding.transcriber"]


def test_a_long_recording_is_decoded_by_windows_and_texts_that_are_cut_are_told(model, caplog):
    longest = model.model.config.max_training_seconds
    assert 1 < longest < 5
    parts = [syllables(1), np.zeros(32_000, "float32"), syllables(1), np.zeros(32_000, "float32")]
    transcriber = Transcriber(model, decoding_options({"max_new_tokens": 2}), of_decoding="")
    found = transcriber.transcription_of(np.concatenate(parts), 16_000)
    times = [(each.start, each.end) for each in found.segments]
    assert np.array(times) == pytest.approx(np.array([(0, 1.2), (2.8, 4.2)]), abs=0.1) and found.seconds == 6
    assert found.text == " ".join(each.text for each in found.segments)
    [told, *_] = warnings_of(caplog)
    assert told == (
        f"audio=array, {times[0][0]:.2f} to {times[0][1]:.2f} s: the text is cut at 2 tokens; write "
        "max_new_tokens=4, or a smaller window (1 more of its 2 segments too)"
    )
    caplog.clear()
    end = model.model.generation_config.eos_token_id
    with model_that_writes(model, end):
        assert model.transcribe(syllables(1), sampling_rate=16_000, max_new_tokens=2) == ""
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("level", [0, 0.1])
def test_silence_and_noise_of_any_length_have_no_text(model, level):
    for seconds in (1, 30):
        noise = np.random.default_rng(0).normal(0, level, 16_000 * seconds)
        assert model.transcribe(noise, sampling_rate=16_000) == ""


@pytest.mark.parametrize(
    ("positions", "number", "told"),
    [
        (3, 2, "2 tokens; write max_new_tokens=3, or a smaller window"),
        (3, 3, "3 tokens, the last position of the decoder; write a smaller window"),
        (3, 9, "3 tokens, the last position of the decoder; write a smaller window"),
    ],
)
def test_a_text_that_is_cut_names_the_limit_that_cut_it(model, caplog, monkeypatch, positions, number, told):
    monkeypatch.setattr(model.model, "max_tokens", positions)
    with model_that_writes(model, 7):
        model.transcribe(syllables(1), sampling_rate=16_000, max_new_tokens=number)
    assert warnings_of(caplog)[0] == f"audio=array: the text is cut at {told}"


@contextlib.contextmanager
def model_that_writes(model, token):
    """Lets the output layer prefer one token."""
    bias = model.model.decoder.get_output_embeddings().bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias[token] = 1e4
        yield
        bias.copy_(before)


def test_the_command_tells_the_same_of_each_file_with_its_own_options(sedtrain, trained, tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", syllables(9), 16_000)
    ended = sedtrain("task=transcribe", f"checkpoint={trained}", f"audio={tmp_path}", "decoding.max_new_tokens=2")
    assert ended.status == 0 and len(ended.out.splitlines()) == 2
    for name in ("a", "b"):
        assert f"audio={tmp_path}/{name}.wav, 0.00 to " in ended.err
    assert ended.err.count("s: the text is cut at 2 tokens; write decoding.max_new_tokens=4") == 2
    assert "write decoding.max_new_tokens=4" in ended.err


def test_audio_behind_which_no_position_is_left_for_a_text_is_cut_into_windows():
    decoder = tiny_decoder("gpt2", listens="prefix")
    saved = join(tiny_encoder("hubert"), decoder, lambda *widths: QFormerAdapter(*widths), TOKENIZER)
    most, in_front = collator_of(saved).max_seconds, positions_of_audio(saved)
    positions, rate = saved.model.max_tokens, saved.feature_extractor.sampling_rate
    for seconds in (most, 0.7, 3.21):
        frames = saved.model.encode(torch.zeros(1, round(seconds * rate))).last_hidden_state.shape[1]
        assert frames <= in_front(seconds) <= frames + 2 * in_front(0)
    assert in_front(most) + 15 <= positions < in_front(most) + 40
    assert Transcriber(saved, decoding_options({})).window_seconds == min(most, 30)


def test_whisper_takes_30_seconds_at_once_and_longer_recordings_by_windows(caplog):
    saved, other = (
        join(tiny_encoder(name), tiny_decoder("gpt2"), lambda *widths: None, TOKENIZER)
        for name in ("whisper", "hubert")
    )
    assert saved.max_seconds == 30 and other.max_seconds == float("inf")
    for options, whole in (({}, 30), ({"window": 90.0}, 30), ({"window": 20.0}, 20)):
        transcriber = Transcriber(saved, decoding_options({"max_new_tokens": 2, **options}))
        assert transcriber.window_seconds == whole
    segments = transcriber.transcription_of(syllables(45), 16_000).segments
    assert len(segments) == 3 and max(each.end - each.start for each in segments) <= 20
    assert (segments[0].start, segments[-1].end) == (0, 45)


@pytest.mark.parametrize(
    ("text", "support", "doubt"),
    [
        ("one two", None, None),
        ("one two", 0.7, None),
        ("", 0.0, None),
        ("one two", 0.25, "CTC supports it by 0.25 of 1, as in noise or music"),
        ("thanks for watching " * 10, 0.9, "it repeats itself"),
        ("one one one one one one", None, None),
    ],
)
def test_texts_that_ctc_does_not_hear_or_that_repeat_themselves_are_doubtful(text, support, doubt):
    assert recordings.doubt(text, support) == doubt


def test_a_window_in_which_ctc_hears_nothing_is_left_out_where_it_hears_words_in_others(model, monkeypatch):
    def decoded(sureness):
        found = iter(Hypotheses([[5]], texts=(str(each),), confidence=each) for each in sureness)
        monkeypatch.setattr(recordings, "decode_batch", lambda *_, **__: list(found))
        gap = np.zeros(80_000, "float32")
        return model.transcribe(np.concatenate([syllables(1), gap, syllables(1)]), sampling_rate=16_000)

    assert [decoded((0.9, 0.0)), decoded((0.0, 0.0)), decoded((None, None))] == ["0.9", "0.0 0.0", "None None"]
