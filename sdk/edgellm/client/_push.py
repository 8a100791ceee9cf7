"""What a push consists of, calls apart: blobs in pieces, progress, and where to go on after a cut."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from edgellm.bundle.layout import Bundle
from edgellm.client._model import PushProgress, PushResult
from edgellm.client._patience import Patience
from edgellm.client._rate import Meter, RateLimit
from edgellm.errors import BundleError
from edgellm.memory import MemoryPlan
from edgellm.v1 import engines_pb2

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK_BYTES = 1 << 20
_LEAST_CHUNK_BYTES = 4 << 10
# With a bound on the rate, a piece is what goes out in about so long: many streams get on in turn.
_CHUNK_S = 0.1
# A blob's deadline allows for a link as slow as this; then it goes on from where it was.
_SLOWEST_BYTES_PER_S = 100_000

OnPushProgress = Callable[[PushProgress], None]


class _Call(Protocol):
    def cancel(self) -> object: ...


class Push:
    """One engine on its way to a device: what is missing there, and how much was sent.

    Args:
        bundle: Where the engine lies.
        digest: The engine.
        on_progress: Told how far it is.
        rate: Bound on bytes per second, which other pushes may share; None: no bound.
        retry_for_s: How long there may be no progress before a failure counts.
    """

    def __init__(
        self,
        bundle: Bundle,
        digest: str,
        on_progress: OnPushProgress | None = None,
        *,
        rate: RateLimit | None = None,
        retry_for_s: float = 60.0,
    ) -> None:
        self.digest = digest
        self.rate = rate
        self._bundle = bundle
        self._manifest = bundle.manifest(digest)
        self._on_progress = on_progress
        self._retry_for_s = retry_for_s
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._meter = Meter()
        self._sent_bytes = 0
        self._left_bytes: dict[str, int] = {}
        self._skipped_bytes: int | None = None
        self._plan = engines_pb2.PrepareResponse().plan
        self._stopped = threading.Event()
        self._calls: set[_Call] = set()

    def prepare_request(self) -> engines_pb2.PrepareRequest:
        """Manifest, config and what is attached, byte for byte; raises BundleError."""
        config = self._bundle.blob_path(self._manifest.config.digest).read_bytes()
        attestations = self._bundle.attestations(self.digest)
        return engines_pb2.PrepareRequest(
            manifest=self._manifest.to_json(), config=config, attestations=attestations
        )

    def commit_request(self) -> engines_pb2.CommitRequest:
        """Once all blobs are there."""
        return engines_pb2.CommitRequest(digest=self.digest)

    def prepared(self, response: engines_pb2.PrepareResponse) -> list[Upload]:
        """Uploads of all that is missing."""
        self._plan = response.plan
        self._left_bytes = {item.digest: item.size_bytes - item.offset_bytes for item in response.missing}
        self._skipped_bytes = self._manifest.size_bytes - sum(self._left_bytes.values())
        self._report()
        return [
            Upload(self, self._bundle, item, Patience(self._retry_for_s, item.offset_bytes))
            for item in response.missing
        ]

    def patience(self) -> Patience:
        """For a call that brings no bytes."""
        return Patience(self._retry_for_s)

    def resumed(self, cut: Upload, response: engines_pb2.PrepareResponse) -> Upload | None:
        """The same upload from the offset that the device has now; None if it is whole by now."""
        for item in response.missing:
            if item.digest == cut.digest:
                self._set_left(item.digest, item.size_bytes - item.offset_bytes)
                cut.patience.reached(item.offset_bytes)
                return Upload(self, self._bundle, item, cut.patience)
        self._set_left(cut.digest, 0)
        return None

    def count(self, digest: str, sent_bytes: int) -> None:
        """Takes note of bytes of a blob that went out."""
        with self._lock:
            self._meter.count(sent_bytes)
            self._sent_bytes += sent_bytes
            self._left_bytes[digest] -= sent_bytes
        self._report()

    def result(self) -> PushResult:
        """The summary, after Commit."""
        return PushResult(
            digest=self.digest,
            sent_bytes=self._sent_bytes,
            skipped_bytes=self._skipped_bytes or 0,
            elapsed_s=time.monotonic() - self._started_s,
            plan=MemoryPlan.from_proto(self._plan),
        )

    def stop(self) -> None:
        """Ends what runs in other threads."""
        self._stopped.set()
        with self._lock:
            for call in self._calls:
                call.cancel()

    def wait(self, seconds: float) -> bool:
        """Waits, in a thread; whether to go on then, and not stop."""
        return not self._stopped.wait(seconds)

    def begun(self, call: _Call) -> None:
        """A call that `stop` cancels."""
        with self._lock:
            self._calls.add(call)
            if self._stopped.is_set():
                call.cancel()

    def _set_left(self, digest: str, left_bytes: int) -> None:
        with self._lock:
            self._left_bytes[digest] = left_bytes
        self._report()

    def _report(self) -> None:
        if self._on_progress is None:
            return
        with self._lock:
            left_bytes, bytes_per_s = sum(self._left_bytes.values()), self._meter.bytes_per_s()
        total_bytes = self._manifest.size_bytes
        self._on_progress(PushProgress(total_bytes - left_bytes, total_bytes, bytes_per_s))


class Upload:
    """One attempt to send one blob from the offset that the device named; a context manager for the file."""

    def __init__(
        self, push: Push, bundle: Bundle, missing: engines_pb2.MissingBlob, patience: Patience
    ) -> None:
        self.digest = missing.digest
        self.patience = patience
        """Shared by all attempts."""
        self.was_cut = False
        """Where the device stands must be asked anew."""
        self._push = push
        self._missing = missing
        self._left_bytes = missing.size_bytes - missing.offset_bytes
        self._path = bundle.blob_path(missing.digest)
        self._failure: BundleError | None = None

    def __enter__(self) -> Self:
        """Opens the file at the offset; raises OSError."""
        self._file = self._path.open("rb", buffering=0)
        self._file.seek(self._missing.offset_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self._file.close()

    def deadline_s(self, timeout_s: float) -> float:
        """Seconds that the upload may take, if an empty one may take `timeout_s`."""
        return timeout_s + self._left_bytes / _SLOWEST_BYTES_PER_S

    def messages(self) -> Iterator[engines_pb2.WriteBlobRequest]:
        """Header and pieces, for the sync client."""
        yield self._header()
        while self._push.wait(self._delay_s()) and (piece := self._next_piece()):
            yield piece

    async def messages_async(self) -> AsyncIterator[engines_pb2.WriteBlobRequest]:
        """Header and pieces, read in a thread: a slow disk does not hold up the event loop."""
        yield self._header()
        while True:
            await asyncio.sleep(self._delay_s())
            piece = await asyncio.to_thread(self._next_piece)
            if piece is None:
                return
            yield piece

    def check(self) -> None:
        """Raises BundleError if the stream ended early because the file could not be read to its end."""
        if self._failure is not None:
            raise self._failure

    def _header(self) -> engines_pb2.WriteBlobRequest:
        header = engines_pb2.BlobHeader(
            digest=self.digest,
            size_bytes=self._missing.size_bytes,
            offset_bytes=self._missing.offset_bytes,
        )
        return engines_pb2.WriteBlobRequest(header=header)

    def _delay_s(self) -> float:
        """How long the next piece has to wait for the rate."""
        if self._push.rate is None or self._left_bytes == 0:
            return 0.0
        return self._push.rate.take(self._piece_bytes())

    def _piece_bytes(self) -> int:
        most = CHUNK_BYTES
        if self._push.rate is not None:
            most = min(most, max(_LEAST_CHUNK_BYTES, int(self._push.rate.bytes_per_s * _CHUNK_S)))
        return min(most, self._left_bytes)

    def _next_piece(self) -> engines_pb2.WriteBlobRequest | None:
        """The next piece, None at the end; a failure is kept for `check`: gRPC would swallow it."""
        if self._left_bytes == 0:
            return None
        try:
            data = self._file.read(self._piece_bytes())
            if not data:
                raise EOFError(f"{self._left_bytes:,} bytes are missing at its end")
        except (OSError, EOFError) as error:
            self._failure = BundleError(
                f"{self._path.name} cannot be read: {error}", "check the bundle with `edgellm inspect`"
            )
            return None
        self._left_bytes -= len(data)
        self._push.count(self.digest, len(data))
        return engines_pb2.WriteBlobRequest(chunk=data)
