"""What a push consists of, calls apart: blobs in pieces, progress, and what to try again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from edgellm.bundle.layout import Bundle
from edgellm.client._model import PushProgress, PushResult
from edgellm.errors import BundleError, RemoteError
from edgellm.memory import MemoryPlan
from edgellm.v1 import engines_pb2

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK_BYTES = 1 << 20
_MAX_ATTEMPTS = 3
_LONGEST_PAUSE_S = 5.0
# INTERNAL: what grpc.aio makes of a write that meets a status which the device has already sent.
_RETRIED = {"ABORTED", "DATA_LOSS", "INTERNAL"}
# A blob's deadline allows for a link as slow as this.
_SLOWEST_BYTES_PER_S = 100_000

OnPushProgress = Callable[[PushProgress], None]


class Push:
    """One engine on its way to a device: what is missing there, and how much was sent."""

    def __init__(self, bundle: Bundle, digest: str, on_progress: OnPushProgress | None) -> None:
        self.digest = digest
        self._bundle = bundle
        self._manifest = bundle.manifest(digest)
        self._on_progress = on_progress
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._sent_bytes = 0
        self._left_bytes: dict[str, int] = {}
        self._skipped_bytes: int | None = None
        self._attempts: dict[str, int] = {}
        self._plan = engines_pb2.PrepareResponse().plan

    def prepare_request(self) -> engines_pb2.PrepareRequest:
        """Manifest and config, byte for byte; raises BundleError."""
        config = self._bundle.blob_path(self._manifest.config.digest).read_bytes()
        return engines_pb2.PrepareRequest(manifest=self._manifest.to_json(), config=config)

    def prepared(self, response: engines_pb2.PrepareResponse) -> list[Upload]:
        """Uploads of all that is missing."""
        self._plan = response.plan
        self._left_bytes = {item.digest: item.size_bytes - item.offset_bytes for item in response.missing}
        if self._skipped_bytes is None:
            self._skipped_bytes = self._manifest.size_bytes - sum(self._left_bytes.values())
        self._report()
        return [Upload(self, self._bundle, item) for item in response.missing]

    def retry(self, failed: Upload, error: RemoteError) -> float:
        """Seconds to wait before the upload is tried again after a new Prepare.

        Raises `error` if it is not.
        """
        self._attempts[failed.digest] = self._attempts.get(failed.digest, 1) + 1
        if error.code not in _RETRIED or self._attempts[failed.digest] > _MAX_ATTEMPTS:
            raise error
        return min(error.retry_after_s or 0.0, _LONGEST_PAUSE_S)

    def again(self, failed: Upload, response: engines_pb2.PrepareResponse) -> Upload | None:
        """The same upload from the offset that the device has now; None if it is whole by now."""
        for item in response.missing:
            if item.digest == failed.digest:
                with self._lock:
                    self._left_bytes[item.digest] = item.size_bytes - item.offset_bytes
                return Upload(self, self._bundle, item)
        return None

    def count(self, digest: str, sent_bytes: int) -> None:
        """Takes note of bytes of a blob that went out."""
        with self._lock:
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

    def _report(self) -> None:
        if self._on_progress is not None:
            total_bytes = self._manifest.size_bytes
            self._on_progress(PushProgress(total_bytes - sum(self._left_bytes.values()), total_bytes))


class Upload:
    """One attempt to send one blob from the offset that the device named; a context manager for the file."""

    def __init__(self, push: Push, bundle: Bundle, missing: engines_pb2.MissingBlob) -> None:
        self.digest = missing.digest
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
        while piece := self._next_piece():
            yield piece

    async def messages_async(self) -> AsyncIterator[engines_pb2.WriteBlobRequest]:
        """Header and pieces, read in a thread: a slow disk does not hold up the event loop."""
        yield self._header()
        while piece := await asyncio.to_thread(self._next_piece):
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

    def _next_piece(self) -> engines_pb2.WriteBlobRequest | None:
        """The next piece, None at the end; a failure is kept for `check`: gRPC would swallow it."""
        if self._left_bytes == 0:
            return None
        try:
            data = self._file.read(min(CHUNK_BYTES, self._left_bytes))
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
