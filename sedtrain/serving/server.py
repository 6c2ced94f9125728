"""Runs the server until Ctrl-C."""

import logging
import signal
import socket

import uvicorn

from sedtrain.data.memory import keep_freed_memory
from sedtrain.decoding.transcriber import Transcriber
from sedtrain.errors import UserError
from sedtrain.serving.app import Service
from sedtrain.serving.options import ServeOptions

GRACE_SECONDS = 10  # for requests that are being answered when the server is asked to end

logger = logging.getLogger(__name__)


def serve(transcriber: Transcriber, options: ServeOptions, model: str) -> None:
    """Serves until SIGINT or SIGTERM. Raises UserError for an address at which it cannot listen."""
    application = Service(transcriber, options, model).application()
    settings = uvicorn.Config(
        application, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS, server_header=False
    )
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # uvicorn sends it again once all requests are answered
    with listening(options) as open_socket:
        open_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
        port = open_socket.getsockname()[1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        logger.info("%s is served at http://%s:%d; Ctrl-C ends it", model, shown, port)
        try:
            uvicorn.Server(settings).run(sockets=[open_socket])
        except KeyboardInterrupt:
            logger.info("ended")


def listening(options: ServeOptions) -> socket.socket:
    """A socket at the address. Raises UserError if the system refuses it."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]
        wrong = f"cannot listen at {options.host}, port {options.port}: {reason}"
        write = "write another serve.port=PORT or serve.host=ADDRESS"
        raise UserError("serve.port", options.port, wrong, write) from error
