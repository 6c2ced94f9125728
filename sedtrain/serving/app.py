"""The HTTP routes of `task=serve`."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from shutil import copyfileobj
from tempfile import NamedTemporaryFile
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

from sedtrain.decoding.transcriber import Transcriber, seconds_of
from sedtrain.decoding.transcription import Transcription
from sedtrain.errors import UserError
from sedtrain.serving.metrics import Metrics
from sedtrain.serving.openai_api import FIELDS, Asked, Refused, failure, reply
from sedtrain.serving.options import ServeOptions
from sedtrain.serving.same_origin import SameOrigin
from sedtrain.serving.workers import Workers

UPLOAD_SECONDS = 300.0
AROUND_FILE = 100_000  # bytes of a form besides its file
CLIENT_LEFT = 499  # nginx's status for a client that did not wait
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Service:
    """The routes, with threads that transcribe while the application runs; model: its name in requests."""

    def __init__(self, transcriber: Transcriber, options: ServeOptions, model: str) -> None:
        self.transcriber, self.options, self.model = transcriber, options, model
        self.num_active, self.created = 0, int(time.time())
        self.metrics = Metrics(lambda: self.num_active)
        self.workers = Workers(transcriber, self.metrics.windows.observe)
        self.page = files("sedtrain.serving").joinpath("page.html").read_text(encoding="utf-8")

    def application(self) -> Starlette:
        routes = [
            Route("/", self.show_page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(SameOrigin, hosts=self.options.hosts)],
            exception_handlers={HTTPException: refusal},
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, application: Starlette) -> AsyncIterator[None]:
        self.workers.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.workers.stop)

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        is_alive = self.workers.are_alive
        return JSONResponse({"status": "ok" if is_alive else "stopped", "model": self.model}, 200 if is_alive else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        only = {"id": self.model, "object": "model", "created": self.created, "owned_by": "sedtrain"}
        return JSONResponse({"object": "list", "data": [only]})

    async def transcriptions(self, request: Request) -> Response:
        start, status = time.perf_counter(), 500
        try:
            with self.place():
                response = await self.answer(request)
            status = response.status_code
            return response
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.metrics.requests.labels(status).inc()
            self.metrics.seconds.observe(time.perf_counter() - start)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that are answered at once. Raises Refused if all are taken."""
        if self.num_active >= self.options.max_requests:
            wrong = f"{self.num_active} requests are being answered, the most that this server takes; come back later"
            raise Refused(429, wrong, headers={"Retry-After": "1"})
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1

    async def answer(self, request: Request) -> Response:
        """Reads the form, transcribes its file and makes the reply. Raises Refused."""
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                form = await counted(request, self.options.max_bytes + AROUND_FILE).form(
                    max_files=1, max_fields=2 * len(FIELDS)
                )
        except TimeoutError as error:
            raise Refused(408, f"the upload took more than {UPLOAD_SECONDS:g} s") from error
        except ClientDisconnect as error:
            raise Refused(CLIENT_LEFT, "the client has left during its upload") from error
        try:
            asked = Asked.of(form, self.model)
            self.refuse_impossible(asked)
            with NamedTemporaryFile(prefix="sedtrain-") as file:
                try:
                    text = await run_in_threadpool(self.begin, asked, file)
                    found = await awaited(text, request.receive)
                except UserError as error:
                    reason = error.wrong.replace(file.name, asked.file.filename or "the file")
                    raise Refused(422, reason, "file") from error
        finally:
            await form.close()
        self.metrics.audio.inc(found.seconds)
        return reply(found, asked, self.transcriber.target)

    def refuse_impossible(self, asked: Asked) -> None:
        """Raises Refused for a file that is too large, a language that the model never learnt, and words without CTC."""
        if (asked.file.size or 0) > self.options.max_bytes:
            raise too_large(self.options.max_bytes)
        try:
            self.transcriber.refuse_unlearnt(asked.language or self.transcriber.language)
        except UserError as error:
            raise Refused(422, error.wrong, "language") from error
        if "word" in asked.granularities and self.transcriber.saved.model.ctc_head is None:
            wrong = "words have no times: the model was trained without a CTC head"
            raise Refused(422, wrong, "timestamp_granularities[]")

    def begin(self, asked: Asked, file: Any) -> Future[Transcription]:
        """Copies the upload to the named `file` and submits it to the workers; blocks for some milliseconds.

        Raises Refused for audio that is too long, UserError for a file that is no audio.
        """
        copyfileobj(asked.file.file, file)
        file.flush()
        if (seconds := seconds_of(file.name)) > self.options.max_seconds:
            wrong = f"the audio lasts {seconds:.1f} s, and this server takes {self.options.max_seconds:g} s at most"
            raise Refused(413, wrong, "file")
        has_words = asked.with_words and self.transcriber.saved.model.ctc_head is not None
        return self.workers.submit(file.name, asked.language or self.transcriber.language, has_words)


def counted(request: Request, most: int) -> Request:
    """The request; reading its body raises Refused after `most` bytes, whatever its header says."""
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > most:
            raise too_large(most - AROUND_FILE)
        return message

    return Request(request.scope, receive)


def too_large(most: int) -> Refused:
    return Refused(413, f"the file has more than {most / 1_000_000:g} MB, the most that this server takes", "file")


async def awaited(text: Future[Transcription], receive: Receive) -> Transcription:
    """Waits for the text. If the client leaves before, the text is cancelled and Refused is raised."""
    found, gone = asyncio.wrap_future(text), asyncio.ensure_future(disconnected(receive))
    either: set[asyncio.Future[Any]] = {found, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            raise Refused(CLIENT_LEFT, "the client has left")
        return found.result()
    finally:
        found.cancel()
        gone.cancel()


async def disconnected(receive: Receive) -> None:
    """Returns once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def refusal(request: Request, error: Exception) -> Response:
    """The answer to a request that this server or Starlette refuses, such as one for an unknown path."""
    assert isinstance(error, HTTPException)
    body = failure(error.status_code, error.detail, getattr(error, "field", None))
    return JSONResponse(body, error.status_code, error.headers)
