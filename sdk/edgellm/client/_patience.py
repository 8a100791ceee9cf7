"""What a push tries again after a failure, how soon, and for how long."""

from __future__ import annotations

import time
from collections.abc import Callable

from edgellm.errors import DeviceUnreachableError, RemoteError

# The link or the agent is gone, or will be back: it is waited for, as long as the patience lasts.
_PASSING = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"})
# Tried again at once. INTERNAL: what grpc.aio makes of a write that meets a status which the device has
# already sent.
_AT_ONCE = frozenset({"ABORTED", "DATA_LOSS", "INTERNAL"})
_MAX_ATTEMPTS = 3
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
# After so long without a byte the device takes a blob away from the push that brings it.
_DEVICE_SILENCE_S = 60.0


class Patience:
    """How long one blob, or one call, is tried again: until there was no progress for so long.

    Args:
        retry_for_s: Seconds without progress; 0 waits for nothing.
        offset_bytes: What the device had at the beginning.
        clock: Seconds that only rise.
    """

    def __init__(
        self, retry_for_s: float, offset_bytes: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._retry_for_s = retry_for_s
        self._offset_bytes = offset_bytes
        self._clock = clock
        self._failing_since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._attempts = 0
        self._losses = 0

    def reached(self, offset_bytes: int) -> None:
        """The device has so much now, whoever brought it: more than before is progress."""
        if offset_bytes > self._offset_bytes:
            self._failing_since_s, self._pause_s, self._attempts = None, _FIRST_PAUSE_S, 0
        self._offset_bytes = offset_bytes

    def pause_s(self, error: RemoteError | DeviceUnreachableError) -> float:
        """Seconds to wait before the next attempt; raises `error` if there is to be none."""
        retry_after_s = getattr(error, "retry_after_s", None)
        code = error.code if isinstance(error, RemoteError) else "UNAVAILABLE"
        if retry_after_s is None and code in _AT_ONCE:
            self._count(code, error)
            return 0.0
        if retry_after_s is None and code not in _PASSING:
            raise error
        now_s = self._clock()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        pause_s = min(max(self._pause_s, retry_after_s or 0.0), _LONGEST_PAUSE_S)
        if now_s + pause_s > self._failing_since_s + self._limit_s(code):
            raise error
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s

    def _limit_s(self, code: str) -> float:
        """Another push of the same blob may have stalled: then the device gives it up first."""
        another = code == "ABORTED" and self._retry_for_s > 0
        return self._retry_for_s + (_DEVICE_SILENCE_S if another else 0.0)

    def _count(self, code: str, error: RemoteError | DeviceUnreachableError) -> None:
        if code == "DATA_LOSS":
            # The device has dropped what it had. That the next try gets on does not make up for it.
            self._losses += 1
            self._offset_bytes = 0
        else:
            self._attempts += 1
        if max(self._losses, self._attempts) >= _MAX_ATTEMPTS:
            raise error
