"""Refuses requests that pages of other sites make through a visitor's browser."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sedtrain.serving.openai_api import failure


class SameOrigin:
    """Answers 400 to a request whose Host is not in `hosts`, and 403 to one whose Origin is another host."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, {each.lower() for each in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if host_of(host) not in self.hosts:
                wrong = f"this server is not {host!r}; serve.names lists its other names"
                app = JSONResponse(failure(400, wrong), 400)
            elif origin is not None and urlsplit(origin).netloc != host:
                app = JSONResponse(failure(403, f"pages of {origin} may not use this server"), 403)
        await app(scope, receive, send)


def host_of(header: str) -> str | None:
    """The host of a Host header, in lower case, without port and without the brackets of IPv6; None if it has none."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:  # an unpaired bracket
        return None
