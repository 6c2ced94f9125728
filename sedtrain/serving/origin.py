"""Keeps pages of other sites from using a server through the browser of somebody who visits them."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SameOrigin:
    """Answers 403 to a request whose Origin, which browsers set, is not the host that it is sent to."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        origin, app = headers.get("origin"), self.app
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            app = JSONResponse(failure(403, f"pages of {origin} may not use this server"), 403)
        await app(scope, receive, send)


def failure(status: int, reason: str, field: str | None = None) -> dict[str, object]:
    """The body of an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": field, "code": status}}
