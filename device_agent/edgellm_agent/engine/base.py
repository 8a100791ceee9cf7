"""What everything above sees of an engine, whatever runtime is below."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from edgellm.v1 import inference_pb2, worker_pb2


class TokenStream(Protocol):
    """The answer to one request: deltas, and then how it finished.

    Iterating raises an AgentError if the request fails. `aclose` cancels what has not ended; it is safe to
    call at any time.
    """

    finished: worker_pb2.Finished | None

    def __aiter__(self) -> AsyncIterator[worker_pb2.Delta]: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """Answers requests."""

    def submit(
        self, request: inference_pb2.GenerateRequest, deadline_s: float = 0, client: str = ""
    ) -> TokenStream:
        """Starts a request; raises UnavailableError or BusyError.

        A deadline of 0 s means none. Clients get equal shares of the engine.
        """

    async def drain(self, deadline_s: float) -> bool:
        """Takes no new requests and waits for the running ones; tells whether all ended in time."""

    async def close(self) -> None:
        """Ends the engine and gives its memory back."""
