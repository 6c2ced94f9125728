"""The page of `task=serve` in a browser: a file, the microphone, what is saved, and what is refused."""

import socket
import threading

import pytest
import uvicorn
from chromium import FOUND, Chromium
from services import client_of, noise_file, tiny_model, transcriber_of

pytestmark = pytest.mark.skipif(FOUND is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def transcriber():
    return transcriber_of(tiny_model())


@pytest.fixture(scope="module")
def address(transcriber):
    with socket.create_server(("127.0.0.1", 0)) as open_socket:
        server = uvicorn.Server(uvicorn.Config(client_of(transcriber).app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [open_socket]})
        thread.start()
        yield f"http://127.0.0.1:{open_socket.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return noise_file(tmp_path_factory.mktemp("audio"), 1.0)


@pytest.fixture
def page(address, file):
    with Chromium(file) as page:
        page.send("Page.navigate", url=address)
        page.until("document.readyState == 'complete' && document.getElementById('model').textContent == 'tiny'")
        yield page


def is_done(page):
    page.until("/^Done in/.test(document.getElementById('status').textContent)")


def test_a_file_that_is_chosen_becomes_its_text_and_can_be_saved(page, transcriber, file, tmp_path):
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), eventsEnabled=True)
    page.choose("#file", file)
    is_done(page)
    text = transcriber.transcription_of(file).text
    assert text and page.value("document.getElementById('text').textContent") == text
    cells = page.value("[...document.querySelectorAll('#segments td')].map(each => each.textContent)")
    assert cells == ["0.00", "1.00", text]
    page.until("document.getElementById('player').duration == 1")
    page.value("(document.getElementById('format').value = 'srt', document.getElementById('save').click())")
    while page.received().get("params", {}).get("state") != "completed":
        pass
    assert (tmp_path / "0.srt").read_text().startswith("1\n00:00:0")


def test_what_the_microphone_hears_becomes_a_text(page):
    page.value("document.getElementById('record').click()")
    page.until("/Recording: 1 s/.test(document.getElementById('status').textContent)")
    page.value("document.getElementById('record').click()")
    is_done(page)
    assert page.value("document.getElementById('text').textContent") not in ("", "(no speech)")


def test_a_file_that_is_no_audio_shows_the_reason(page, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"this is no audio")
    page.choose("#file", tmp_path / "a.wav")
    page.until("document.getElementById('status').className == 'bad'")
    assert page.value("document.getElementById('status').textContent") == "unreadable audio: Format not recognised."
    assert page.value("document.getElementById('result').hidden")
