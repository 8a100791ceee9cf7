"""Entry point of the worker process: `python -m edgellm_agent.worker FD`, where FD is its end of the socket
pair.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import socket
import sys
from pathlib import Path

from edgellm.v1 import worker_pb2
from edgellm_agent.ipc import WorkerChannel
from edgellm_agent.worker import sandbox

log = logging.getLogger("edgellm_agent.worker")

_PR_SET_PDEATHSIG = 1
_LOAD_WAIT_S = 60.0


def main() -> int:
    """Loads one engine and serves it until the agent closes the channel."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _die_with_the_agent()
    _volunteer_for_oom_killer()
    channel = WorkerChannel(socket.socket(fileno=int(sys.argv[1])))
    try:
        first = channel.receive(_LOAD_WAIT_S)
        if not first or first[0].WhichOneof("message") != "load":
            raise ValueError("the first message must be Load")
        load = first[0].load
        _confine(Path(load.directory))
        # Imported here: the libraries that read what strangers wrote start confined, and so do their threads.
        from edgellm_agent.worker.assembly import load_engine  # noqa: PLC0415

        load_engine(load, channel).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:
        log.exception("worker failed")
        fatal = worker_pb2.Fatal(kind=_kind(error), message=str(error) or type(error).__name__)
        with contextlib.suppress(OSError):
            channel.send(worker_pb2.FromWorker(fatal=fatal))
        return 1
    return 0


def _confine(engine: Path) -> None:
    confinement = sandbox.enter(engine)
    level = logging.INFO if confinement.whole else logging.WARNING
    log.log(level, "sandbox: %s", confinement)


def _kind(error: Exception) -> worker_pb2.FailureKind.ValueType:
    return (
        worker_pb2.FAILURE_KIND_TOO_LARGE
        if isinstance(error, MemoryError)
        else worker_pb2.FAILURE_KIND_INTERNAL
    )


def _die_with_the_agent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The agent asks by the channel; a terminal's Ctrl-C is the agent's to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _volunteer_for_oom_killer() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    sys.exit(main())
