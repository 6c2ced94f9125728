"""The options of `task=serve`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from sedtrain.annotations import refuse_misfits
from sedtrain.errors import UserError
from sedtrain.ranges import Count, Positive, Range

Port = Annotated[int, Range("a port from 0 to 65535", low=0, high=65_535)]
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """The address and the limits of a server.

    host, port: where it listens; port 0 takes any free port
    names: host names of the server in requests, in addition to LOOPBACK and `host`
    model: name of the model in requests; None: the name of the checkpoint's folder
    max_megabytes: largest upload, in 10^6 bytes
    max_seconds: longest audio
    max_requests: requests answered at once

    Raises UserError for a name with wildcards.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    names: Sequence[str] = ()
    model: str | None = None
    max_megabytes: Positive = 25.0
    max_seconds: Positive = 3600.0
    max_requests: Count = 64

    def __post_init__(self) -> None:
        refuse_misfits("serve.", type(self), vars(self))
        for name in self.names:
            if "*" in name:
                wrong = "with such a name, any web page could reach the server"
                raise UserError("serve.names", name, wrong, "write 'serve.names=[speech.example.org]'")

    @property
    def hosts(self) -> list[str]:
        """Names that the Host header of a request may have."""
        return [*LOOPBACK, self.host, *self.names]

    @property
    def max_bytes(self) -> int:
        return int(self.max_megabytes * 1_000_000)
