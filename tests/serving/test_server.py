"""`task=serve` as a command: what it refuses, and a server of its own process until Ctrl-C."""

import os
import re
import signal
import socket
import sys
import time

import httpx2
import pytest
from forked import Forked
from services import ROUTE, noise_file, tiny_model

from sedtrain import load
from sedtrain.errors import UserError
from sedtrain.serving.options import ServeOptions
from sedtrain.serving.server import listening


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save(folder, {})
    return folder


def served_at(server):
    shown = server.err if server.files[1].exists() else ""
    return re.search(r"tiny is served at (http://127\.0\.0\.1:\d+); Ctrl-C ends it\n", shown)


def test_a_server_transcribes_until_ctrl_c_and_leaves_no_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = noise_file(tmp_path, 0.4)
    decoding = ("decoding=ctc", "decoding.pauses=energy")
    server = Forked(tmp_path, "task=serve", f"checkpoint={folder}", "serve.port=0", *decoding)
    try:
        deadline = time.monotonic() + 100
        while not (found := served_at(server)):
            assert server.poll() is None and time.monotonic() < deadline, server.err
            time.sleep(0.02)
        answer = httpx2.post(found[1] + ROUTE, files={"file": file.read_bytes()}, data={"model": "tiny"}, timeout=100)
        assert answer.json() == {"text": load(folder).transcribe(file, search="ctc", pauses="energy")}
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(30) == 0, server.err
    finally:
        server.kill()
    assert server.err.endswith("ended\n") and not (tmp_path / "runs").exists()


def test_an_address_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as refused:
            listening(ServeOptions(port=port))
    assert refused.value.option == "serve.port"
    assert refused.value.wrong == f"cannot listen at 127.0.0.1, port {port}: Address already in use"


def test_names_with_wildcards_are_refused():
    with pytest.raises(UserError, match="with such a name, any web page could reach the server"):
        ServeOptions(names=["*.org"])


def test_the_hosts_are_loopback_the_address_and_the_names():
    hosts = ServeOptions(host="::", names=["speech.example.org"]).hosts
    assert hosts == ["localhost", "127.0.0.1", "::1", "::", "speech.example.org"]


def test_without_its_packages_the_task_names_the_extra(sedtrain, folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "sedtrain.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = sedtrain("task=serve", f"checkpoint={folder}")
    assert ended.status == 2 and "it needs packages that are not installed" in ended.err
    assert "pip install 'sedtrain[serve]'" in ended.err


def test_a_server_needs_a_model_and_a_port(sedtrain):
    ended = sedtrain("task=serve", "serve.port=70000")
    assert ended.status == 2 and "task=serve needs a trained model" in ended.err
    assert "expected a port from 0 to 65535" in ended.err
