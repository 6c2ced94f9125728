"""The thread that transcribes what waits."""

import pytest
from services import noise_file, tiny_model, transcriber_of

from sedtrain.decoding import recordings
from sedtrain.decoding.transcribe import Transcriber
from sedtrain.errors import UserError
from sedtrain.serving.worker import Job, Worker


@pytest.fixture(scope="module")
def saved():
    return tiny_model()


def jobs_of(transcriber, *files):
    return [Job(transcriber.recording_of(str(file), None, with_words=False)) for file in files]


def texts_of(found):
    return [(each.text, each.start, each.end) for each in found.segments]


def test_short_recordings_pass_long_ones_and_all_texts_are_those_of_each_alone(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("sedtrain.serving.worker.NUM_HELD", 4)
    transcriber = Transcriber(saved, recordings.DecodingOptions(search="ctc", pauses="energy", window=0.5))
    files = [noise_file(tmp_path, seconds, seed) for seed, seconds in enumerate([3.0, 0.4, 0.4])]
    sizes, jobs = [], jobs_of(transcriber, *files)
    worker, left = Worker(transcriber, sizes.append), jobs
    left = worker.advance(left)
    assert left == jobs[:1] and [each.text.done() for each in jobs] == [False, True, True]
    while left:
        left = worker.advance(left)
    assert sizes[0] == 3 and max(sizes) == 4
    expected = [transcriber.transcription_of(file) for file in files]
    assert [texts_of(each.text.result()) for each in jobs] == [texts_of(each) for each in expected]
    assert len(expected[0].segments) > 4


def test_a_recording_that_cannot_be_read_to_its_end_fails_alone(saved, tmp_path):
    transcriber = transcriber_of(saved)
    good, bad = jobs_of(transcriber, *(noise_file(tmp_path, 0.4, seed) for seed in range(2)))

    def broken():
        raise UserError("audio", "1.wav", "undecodable audio", "write audio=FILE that can be read to its end")
        yield

    bad.recording.windows = broken()
    assert Worker(transcriber, int).advance([good, bad]) == []
    assert good.text.result().seconds == 0.4
    with pytest.raises(UserError, match="undecodable audio"):
        bad.text.result()


def test_a_file_that_is_no_audio_is_refused_at_once(saved, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"this is no audio")
    with pytest.raises(UserError, match="Format not recognised"):
        Worker(transcriber_of(saved), int).submit(str(tmp_path / "bad.wav"), None, with_words=False)


def test_a_window_that_cannot_be_decoded_fails_alone(saved, tmp_path, monkeypatch, caplog):
    transcriber = transcriber_of(saved)
    files = [noise_file(tmp_path, 0.4, seed) for seed in range(3)]
    expected = [transcriber.transcription_of(file).text for file in files]
    decode = Transcriber.decode

    def failing(self, windows):
        if any(recording.name == str(files[1]) for recording, _ in windows):
            raise RuntimeError("out of memory")
        return decode(self, windows)

    monkeypatch.setattr(Transcriber, "decode", failing)
    jobs = jobs_of(transcriber, *files)
    assert Worker(transcriber, int).advance(jobs) == []
    assert [jobs[number].text.result().text for number in (0, 2)] == [expected[0], expected[2]]
    with pytest.raises(RuntimeError, match="out of memory"):
        jobs[1].text.result()
    assert "a recording could not be transcribed" in caplog.text


def test_what_nobody_waits_for_is_not_decoded(saved, tmp_path):
    transcriber, sizes = transcriber_of(saved), []
    jobs = jobs_of(transcriber, noise_file(tmp_path, 0.4))
    jobs[0].text.cancel()
    assert Worker(transcriber, sizes.append).advance(jobs) == [] and sizes == []


def test_a_worker_that_stops_cancels_what_waits(saved, tmp_path):
    worker = Worker(transcriber_of(saved), int)
    text = worker.submit(str(noise_file(tmp_path, 0.4)), None, with_words=False)
    worker.arrivals.put(None)
    worker.run()
    assert text.cancelled()
