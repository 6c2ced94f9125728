"""What the threads of a server do with recordings."""

import pytest
import torch
from services import noise_file, tiny_model, transcriber_of

from sedtrain.decoding import recordings
from sedtrain.decoding.transcriber import Transcriber
from sedtrain.errors import UserError
from sedtrain.serving.workers import Job, Worker, Workers, sharing_weights


@pytest.fixture(scope="module")
def saved():
    return tiny_model()


def jobs_of(transcriber, *files):
    return [Job(transcriber.recording_of(str(file), None, with_words=False)) for file in files]


def texts_of(found):
    return [(each.text, each.start, each.end) for each in found.segments]


def test_short_recordings_pass_long_ones_and_all_texts_are_those_of_each_alone(saved, tmp_path):
    transcriber = Transcriber(saved, recordings.DecodingOptions(search="ctc", pauses="energy", window=0.5))
    files = [noise_file(tmp_path, seconds, seed) for seed, seconds in enumerate([3.0, 0.4, 0.4])]
    sizes, jobs = [], jobs_of(transcriber, *files)
    worker, left = Worker(transcriber, sizes.append, held=4), jobs
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
        Workers(transcriber_of(saved), int).submit(str(tmp_path / "bad.wav"), None, with_words=False)


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


@pytest.fixture
def three(saved, monkeypatch):
    """Three workers, which divide three threads of PyTorch."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    workers, given = Workers(transcriber_of(saved), int), []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return workers, given


def test_each_worker_has_modules_of_its_own_and_the_weights_of_the_first(saved):
    first = transcriber_of(saved)
    model, other = saved.model, sharing_weights(first).saved.model
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))
    pairs = [*zip(model.state_dict().values(), other.state_dict().values(), strict=True)]
    assert len(pairs) > 50 and all(one.data_ptr() == two.data_ptr() for one, two in pairs)


def test_workers_that_compute_at_once_divide_the_threads_of_torch(three):
    workers, given = three
    with workers.busy(), workers.busy(), workers.busy():
        pass
    with workers.busy():
        pass
    assert given == [3, 1, 1, 3]


def test_a_worker_leaves_as_many_for_each_other_one(three):
    workers, _ = three
    for number in range(10):
        workers.arrivals.put(number)
    assert [len(workers.share(most)) for most in (10, 1, 0, 10, 10, 10, 10, 10)] == [4, 1, 0, 2, 1, 1, 1, 0]


def test_workers_at_once_find_the_texts_of_one_recording_after_another(three, saved, tmp_path):
    workers, _ = three
    files = [noise_file(tmp_path, 0.2 + 0.02 * seed, seed) for seed in range(20)]
    expected = [transcriber_of(saved).transcription_of(file).text for file in files]
    texts = [workers.submit(str(file), None, with_words=False) for file in files]
    workers.start()
    assert [each.result(60).text for each in texts] == expected and len(set(expected)) > 5
    workers.stop()
    assert not workers.are_alive


def test_workers_that_stop_cancel_what_waits(three, saved, tmp_path):
    workers, _ = three
    workers.is_ending = True
    texts = [workers.submit(str(noise_file(tmp_path, 0.4)), None, with_words=False) for _ in range(2)]
    workers.start()
    workers.stop()
    assert all(each.cancelled() for each in texts)
