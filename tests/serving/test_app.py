"""The routes of `task=serve`: texts, formats, limits, and who may ask."""

import asyncio
import re
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest
from prometheus_client.parser import text_string_to_metric_families
from services import ROUTE, client_of, noise_file, reason, sent, tiny_model, transcriber_of
from starlette.requests import Request

from sedtrain.decoding.outputs import TRANSCRIPT_WRITERS
from sedtrain.serving import app
from sedtrain.serving.app import CLIENT_LEFT, awaited
from sedtrain.serving.openai_api import Refused


@pytest.fixture(scope="module")
def transcriber():
    return transcriber_of(tiny_model())


@pytest.fixture(scope="module")
def client(transcriber):
    with client_of(transcriber, max_megabytes=0.2, max_seconds=4.0) as client:
        yield client


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return noise_file(tmp_path_factory.mktemp("audio"), 0.5)


def metric(client, name, **labels):
    families = text_string_to_metric_families(client.get("/metrics").text)
    [value] = [
        each.value for family in families for each in family.samples if (each.name, each.labels) == (name, labels)
    ]
    return value


def test_fifty_clients_at_once_get_the_texts_of_one_recording_after_another(transcriber, client, tmp_path):
    files = [noise_file(tmp_path, 0.2 + 0.01 * seed, seed) for seed in range(50)]
    expected = [transcriber.transcription_of(file).text for file in files]
    assert len(set(expected)) > 10
    before = metric(client, "sedtrain_batch_windows_count")
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda file: sent(client, file.read_bytes(), model="tiny"), files))
    assert [each.json() for each in answers] == [{"text": text} for text in expected]
    assert metric(client, "sedtrain_batch_windows_count") - before < 25
    assert metric(client, "sedtrain_requests_active") == 0


@pytest.mark.parametrize(
    ("format", "kind"), [("text", "text/plain"), ("srt", "application/x-subrip"), ("vtt", "text/vtt")]
)
def test_a_format_is_that_of_task_transcribe(transcriber, client, file, format, kind):
    recording = transcriber.recording_of(str(file), None, with_words=format != "text")
    transcriber.add_texts([(recording, window) for window in recording.windows])
    answer = sent(client, file.read_bytes(), response_format=format)
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.text == TRANSCRIPT_WRITERS[format](recording.transcription(), None)


@pytest.mark.parametrize("granularities", [[], ["segment"], ["word"], ["word", "segment"]])
def test_verbose_json_has_the_segments_and_words_that_are_asked_for(transcriber, client, file, granularities):
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": granularities}
    found = sent(client, file.read_bytes(), **fields).json()
    text = transcriber.transcription_of(file).text
    assert {name: found.pop(name) for name in ("task", "language", "duration", "text")} == {
        "task": "transcribe", "language": None, "duration": 0.5, "text": text,
    }  # fmt: skip
    assert set(found) == {f"{each}s" for each in granularities or ["segment"]}
    if "segments" in found:
        [segment] = found["segments"]
        assert (segment["id"], segment["start"], segment["end"], segment["text"]) == (0, 0, 0.5, text)
    if "words" in found:
        assert [each["word"] for each in found["words"]] == text.split()
        assert all(0 <= each["start"] <= each["end"] <= 0.5 for each in found["words"])


@pytest.mark.parametrize(
    ("fields", "status", "field", "wrong"),
    [
        ({"model": "whisper-1"}, 404, "model", "this server has the model 'tiny', and not 'whisper-1'"),
        ({"response_format": "xml"}, 422, "response_format", "there is no format 'xml'; known are json, text, srt,"),
        ({"language": "de"}, 422, "language", "this model was trained without language tags, so it cannot"),
        ({"prompt": "Names: Ada"}, 422, "prompt", "this server takes no prompt; it can be started with"),
        ({"temperature": "0.7"}, 422, "temperature", "temperature is '0.7'; this server takes only 0"),
        ({"temperature": "warm"}, 422, "temperature", "temperature is 'warm'; this server takes only 0"),
        ({"model": ["other", "tiny"]}, 422, "model", "model is given several times"),
        ({"stream": "true"}, 422, "stream", "stream cannot be 'true': this server sends a text once it is whole"),
        ({"include[]": "logprobs"}, 422, "include[]", "include[] cannot be 'logprobs': this server computes no log-prob"),
        ({"chunking_strategy": "{}"}, 422, "chunking_strategy", "chunking_strategy cannot be '{}': this server cuts rec"),
        ({"beams": "4"}, 422, "beams", "there is no field 'beams'; known are file, model,"),
        ({"timestamp_granularities[]": "word"}, 422, "timestamp_granularities[]", "response_format=json has no gran"),
        ({"timestamp_granularities[]": "hour"}, 422, "timestamp_granularities[]", "there is no granularity 'hour'"),
    ],
)  # fmt: skip
def test_what_a_request_cannot_have_is_refused(client, file, fields, status, field, wrong):
    found = reason(sent(client, file.read_bytes(), **fields))
    assert found[:2] == (status, field) and found[2].startswith(wrong)


def test_fields_that_ask_for_what_is_done_anyway_are_taken(client, file):
    fields = {"prompt": "", "temperature": "0.0", "language": "", "stream": "False", "chunking_strategy": "auto"}
    assert sent(client, file.read_bytes(), **fields, **{"include[]": ""}).status_code == 200


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "empty file: a.wav"),
        (b"this is no audio", "unreadable audio: Format not recognised."),
        (None, "truncated audio: 0.25 s are missing"),
    ],
)
def test_an_upload_that_cannot_be_read_is_refused_with_the_reason(client, file, content, wrong):
    content = file.read_bytes()[: 44 + 8000] if content is None else content
    assert reason(sent(client, content)) == (422, "file", wrong)


def test_a_request_without_a_file_is_refused(client):
    wrong = "send one audio file in the field file"
    assert reason(client.post(ROUTE, json={"file": "a.wav"})) == (422, "file", wrong)
    assert reason(client.post(ROUTE, data={"file": "a.wav"})) == (422, "file", "file has to be a file")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert client.post(ROUTE, content=b"no form", headers=form).status_code == 400


def test_bytes_are_counted_as_they_are_read_whatever_the_header_says(client):
    wrong = "the file has more than 0.2 MB, the most that this server takes"
    assert reason(sent(client, bytes(200_001))) == (413, "file", wrong)

    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        yield from [bytes(50_000)] * 20

    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert reason(client.post(ROUTE, content=chunks(), headers=form)) == (413, "file", wrong)


def test_audio_that_is_too_long_is_refused_by_its_header(client, tmp_path):
    wrong = "the audio lasts 4.5 s, and this server takes 4 s at most"
    assert reason(sent(client, noise_file(tmp_path, 4.5).read_bytes())) == (413, "file", wrong)


def test_more_requests_than_the_most_are_told_to_come_back(transcriber, file, monkeypatch):
    began, may_end = Event(), Event()

    def add_texts(windows):
        began.set()
        assert may_end.wait(20)

    monkeypatch.setattr(type(transcriber), "add_texts", lambda self, windows, **options: add_texts(windows))
    with client_of(transcriber, max_requests=1) as client, ThreadPoolExecutor(1) as thread:
        first = thread.submit(sent, client, file.read_bytes())
        assert began.wait(20)
        second = sent(client, file.read_bytes())
        may_end.set()
        assert first.result().status_code == 200
        assert reason(second)[:2] == (429, None) and second.headers["retry-after"] == "1"
        assert sent(client, file.read_bytes()).status_code == 200
        assert metric(client, "sedtrain_requests_total", status="429") == 1


def test_an_upload_that_takes_too_long_is_refused(client, monkeypatch):
    monkeypatch.setattr(app, "UPLOAD_SECONDS", 0.01)
    form = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}

    async def receive():
        await asyncio.sleep(60)

    with pytest.raises(Refused) as refused:
        asyncio.run(client.service.answer(Request(form, receive)))
    assert (refused.value.status_code, refused.value.detail) == (408, "the upload took more than 0.01 s")


def test_a_client_that_leaves_during_its_upload_is_no_fault_of_the_server(client):
    parts = iter([{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}])
    form = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}

    async def receive():
        return next(parts)

    with pytest.raises(Refused) as refused:
        asyncio.run(client.service.answer(Request(form, receive)))
    assert (refused.value.status_code, refused.value.detail) == (CLIENT_LEFT, "the client has left during its upload")


def test_a_client_that_leaves_ends_the_work_on_its_text():
    text = Future()

    async def left():
        return {"type": "http.disconnect"}

    with pytest.raises(Refused) as refused:
        asyncio.run(awaited(text, left))
    assert refused.value.status_code == CLIENT_LEFT and text.cancelled()


def test_no_file_stays_behind(client, file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert sent(client, file.read_bytes()).status_code == 200
    assert sent(client, b"this is no audio").status_code == 422
    assert list(tmp_path.iterdir()) == []


def test_a_language_is_asked_for_where_the_model_learnt_it(file, monkeypatch):
    transcriber = transcriber_of(tiny_model())
    monkeypatch.setattr(type(transcriber), "refuse_unlearnt", lambda self, language: None)
    asked = []
    monkeypatch.setattr(
        type(transcriber),
        "add_texts",
        lambda self, windows, **options: asked.extend(each.language for each, _ in windows),
    )
    with client_of(transcriber) as client:
        verbose = {"response_format": "verbose_json", "language": "de"}
        assert sent(client, file.read_bytes(), **verbose).json()["language"] == "de"
    assert asked == ["de"]


def test_without_a_ctc_head_subtitles_have_segments_and_words_are_refused(file):
    transcriber = transcriber_of(tiny_model(), search="attention")
    transcriber.saved.model.ctc_head = None
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    with client_of(transcriber) as client:
        assert sent(client, file.read_bytes(), response_format="srt").status_code == 200
        wrong = "words have no times: the model was trained without a CTC head"
        assert reason(sent(client, file.read_bytes(), **fields)) == (422, "timestamp_granularities[]", wrong)


# --- who may ask, and what else there is


def test_another_host_and_pages_of_another_origin_are_refused(client, file):
    for host in ("evil.example", "localhost.evil.example:8000", "[::2]", "["):
        wrong = f"this server is not {host!r}; serve.names lists its other names"
        assert reason(client.get("/health", headers={"Host": host})) == (400, None, wrong)
    for host in ("LocalHost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    own = client.get("/v1/models", headers={"Origin": "http://localhost"})
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers
    for origin in ("http://evil.example", "http://localhost:1", "null"):
        answer = client.post(ROUTE, files={"file": file.read_bytes()}, headers={"Origin": origin})
        assert reason(answer) == (403, None, f"pages of {origin} may not use this server")


def test_health_models_and_unknown_paths_answer(client):
    assert client.get("/health").json() == {"status": "ok", "model": "tiny"}
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert reason(client.get("/v2")) == (404, None, "Not Found")
    assert reason(client.get(ROUTE)) == (405, None, "Method Not Allowed")


def test_a_server_whose_thread_has_ended_is_not_healthy(transcriber):
    client = client_of(transcriber)
    assert client.get("/health").status_code == 503


def test_the_page_loads_nothing_else(client):
    answer = client.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert re.findall(r"""(?:src|href)\s*=\s*["'][^"']|url\(|@import|https?://""", answer.text) == []
    assert "prefers-color-scheme: dark" in answer.text and "getUserMedia" in answer.text
