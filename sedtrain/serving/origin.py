"""Keeps pages of other sites from using a server through the browser of somebody who visits them."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SameOrigin:
    """Answers 400 to a request for another host than `hosts`, and 403 to one of a page, by its Origin, from another host."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, {each.lower() for each in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if host_of(host) not in self.hosts:
                wrong = f"this server is not {host!r}; serve.names lists the names by which it may be reached"
                app = JSONResponse(failure(400, wrong), 400)
            elif origin is not None and urlsplit(origin).netloc != host:
                app = JSONResponse(failure(403, f"pages of {origin} may not use this server"), 403)
        await app(scope, receive, send)


def host_of(header: str) -> str | None:
    """The host of a Host header in lower case, without its port and without the brackets of IPv6."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:  # half of a pair of brackets
        return None


def failure(status: int, reason: str, field: str | None = None) -> dict[str, object]:
    """The body of an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": field, "code": status}}
