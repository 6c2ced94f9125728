"""A server in this process, and a client of it."""

import soundfile
from corpora import syllables
from families import TOKENIZER, tiny_decoder, tiny_encoder
from starlette.testclient import TestClient

from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.transcriber import Transcriber
from sedtrain.models.saved import join
from sedtrain.serving.app import Service
from sedtrain.serving.options import ServeOptions

ROUTE = "/v1/audio/transcriptions"


def tiny_model():
    """Random weights; its CTC head alone hears what differs between recordings."""
    saved = join(tiny_encoder("wav2vec2"), tiny_decoder("bert"), lambda *widths: None, TOKENIZER)
    saved.model.add_ctc_head(len(TOKENIZER))
    saved.model.eval()
    return saved


def transcriber_of(saved, search="ctc"):
    return Transcriber(saved, DecodingOptions(search=search, pauses="energy"))


def client_of(transcriber, **options):
    """Runs the worker while it is used as a context manager."""
    service = Service(transcriber, ServeOptions(**options), "tiny")
    client = TestClient(service.application(), base_url="http://localhost", raise_server_exceptions=False)
    client.service = service
    return client


def noise_file(folder, seconds, seed=0):
    """A WAV file of noise at 16 kHz that passes for speech."""
    file = folder / f"{seed}.wav"
    soundfile.write(file, syllables(seconds, seed=seed), 16_000)
    return file


def sent(client, content, **fields):
    return client.post(ROUTE, files={"file": ("a.wav", content)}, data=fields)


def reason(answer):
    """Status, field and reason of an error as OpenAI's clients read it."""
    error = answer.json()["error"]
    assert error["code"] == answer.status_code and error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["message"]
