"""One worker process: started by exec, spoken to over a socket pair, ended by closing it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import cast

from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent import errors, ipc
from edgellm_agent.engine.figures import AnswerWatch, EngineFigures
from edgellm_agent.engine.watchdog import Watchdog
from edgellm_agent.engine.worker_output import WorkerOutput
from edgellm_agent.engine.worker_stream import CREDIT_TOKENS, WorkerStream

log = logging.getLogger(__name__)

_SLACK_STREAMS = 16
_CLOSE_S = 5.0
_OUTPUT_CLOSE_S = 2.0
# A worker that has closed its channel is about to exit; its status says why, unless it is killed before.
_EXIT_S = 1.0
_KILL_S = 5.0


class WorkerProcess:
    """A started and loaded worker.

    `dead` is set, with `death` telling why, once nothing more comes from it. One that hangs is killed: a ping
    (`stats`) starts the watchdog's time, and whatever comes ends it.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        client_streams: int,
        *,
        figures: EngineFigures,
        hang_s: float,
        output: WorkerOutput,
    ) -> None:
        self._process = process
        self._output = output
        self._reader = reader
        self._writer = writer
        # The worker refuses, and fairly; here is only what one client, and all of them, may have under way.
        self._client_streams = client_streams
        self._figures = figures
        self._streams: dict[int, WorkerStream] = {}
        self._next_id = 0
        self._stats_waiters: list[asyncio.Future[worker_pb2.Stats]] = []
        self._drained = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.ready = worker_pb2.Ready()
        self.dead = asyncio.Event()
        self.death = ""
        self.hung = False
        self._watchdog = Watchdog(hang_s, asyncio.get_running_loop().time)
        self._watching: asyncio.Task[None] | None = None
        self._asked_to_end = False
        self._killed = False
        self._oom_kills = _oom_kills()

    @classmethod
    async def start(
        cls,
        load: worker_pb2.Load,
        timeout_s: float,
        figures: EngineFigures | None = None,
        *,
        hang_s: float = 30.0,
    ) -> WorkerProcess:
        """Starts a worker and loads an engine; what its clients see is counted in `figures`.

        It may take `timeout_s` to load, and after that be silent for `hang_s`, seconds. Raises TooLargeError
        or EngineError, and leaves no process behind.
        """
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(ours.close)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "edgellm_agent.worker",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                # An arena for each thread keeps what another could use: 6 MB of a plan that counts every one.
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            )
            undo.pop_all()
        output = WorkerOutput(cast("asyncio.StreamReader", process.stderr), process.pid)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        streams = load.plan.max_sequences + load.max_waiting
        figures = figures or EngineFigures()
        worker = cls(process, reader, writer, streams, figures=figures, hang_s=hang_s, output=output)
        try:
            await asyncio.wait_for(worker._load(load), timeout_s)
        except BaseException as error:
            await worker.close()
            if isinstance(error, asyncio.TimeoutError):
                raise errors.EngineError(f"the engine did not load within {timeout_s:.0f} s") from None
            raise
        return worker

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def submit(
        self, request: inference_pb2.GenerateRequest, deadline_s: float = 0, client: str = ""
    ) -> WorkerStream:
        """Starts a request; raises UnavailableError or BusyError."""
        if self.dead.is_set():
            raise errors.UnavailableError("the engine has just stopped")
        of_client = sum(stream.client == client for stream in self._streams.values())
        if (
            of_client >= self._client_streams
            or len(self._streams) >= 2 * self._client_streams + _SLACK_STREAMS
        ):
            raise errors.BusyError(f"{len(self._streams)} requests are running or waiting")
        self._next_id += 1
        submit = worker_pb2.Submit(
            id=self._next_id,
            request=request,
            credit_tokens=CREDIT_TOKENS,
            deadline_s=deadline_s,
            client=client,
        )
        self._send(worker_pb2.ToWorker(submit=submit))
        watch = AnswerWatch(self._figures, CREDIT_TOKENS)
        stream = self._streams[self._next_id] = WorkerStream(self, self._next_id, client, watch)
        return stream

    async def stats(self, timeout_s: float = 5.0) -> worker_pb2.Stats:
        """What the worker does now; raises EngineError if it does not answer in time."""
        waiter: asyncio.Future[worker_pb2.Stats] = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(waiter)
        self._send(worker_pb2.ToWorker(ping=worker_pb2.Ping()))
        self._watchdog.asked()
        try:
            stats = await asyncio.wait_for(waiter, timeout_s)
        except asyncio.TimeoutError:
            raise errors.EngineError(f"the engine did not answer within {timeout_s:.0f} s") from None
        finally:
            if waiter in self._stats_waiters:
                self._stats_waiters.remove(waiter)
        self._oom_kills = _oom_kills()
        return stats

    def rss_bytes(self) -> int | None:
        """Anonymous and shared memory of the process (RssAnon + RssShmem)."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        kib = {
            k: v.split()[0]
            for k, _, v in (line.partition(":") for line in lines)
            if k in ("RssAnon", "RssShmem")
        }
        return 1024 * sum(int(v) for v in kib.values()) if kib else None

    async def drain(self, deadline_s: float) -> bool:
        """No new requests; waits for the running ones. Tells whether all ended in time."""
        self._send(worker_pb2.ToWorker(drain=worker_pb2.Drain()))
        try:
            await asyncio.wait_for(self._drained.wait(), deadline_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends the process: it exits by itself when the channel closes; if not, it is killed."""
        self._asked_to_end = True
        self._writer.close()
        if await self._exit_status(_CLOSE_S) is None:
            log.warning("worker %d did not end by itself, killed", self.pid)
            await self._end()
        for task in (self._reading, self._watching):
            if task is not None:
                await task
        await self._output.close(_OUTPUT_CLOSE_S)

    def cancel(self, stream_id: int) -> None:
        """Asks the worker to end a request."""
        self._send(worker_pb2.ToWorker(cancel=worker_pb2.Cancel(id=stream_id)))

    def credit(self, stream_id: int, tokens: int) -> None:
        """Lets the worker send so many more tokens."""
        self._send(worker_pb2.ToWorker(credit=worker_pb2.Credit(id=stream_id, tokens=tokens)))

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed it for memory.

        By SIGKILL and not by us, while the kernel's count of such kills rose since the last `stats`.
        """
        if self._process.returncode != -signal.SIGKILL or self._killed:
            return False
        now = _oom_kills()
        return now is None or self._oom_kills is None or now > self._oom_kills

    def set_limits(self, kv_bytes: int, max_sequences: int, pace: float = 1.0) -> None:
        """Sets what the worker may take from now on; `pace` is a share of time."""
        limits = worker_pb2.SetLimits(kv_bytes=kv_bytes, max_sequences=max_sequences, pace=pace)
        self._send(worker_pb2.ToWorker(set_limits=limits))

    async def _load(self, load: worker_pb2.Load) -> None:
        self._send(worker_pb2.ToWorker(load=load))
        try:
            first = await ipc.read_from_worker(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            why = _why(await self._ended())
            raise errors.EngineError(f"the worker ended while loading the engine ({why})") from None
        if first.WhichOneof("message") == "fatal":
            fatal = first.fatal
            if fatal.kind == worker_pb2.FAILURE_KIND_TOO_LARGE:
                raise errors.TooLargeError(fatal.message, fatal.needed_bytes, fatal.available_bytes)
            raise errors.EngineError(fatal.message)
        self.ready = first.ready
        self._reading = asyncio.create_task(self._read(), name=f"worker-{self.pid}")
        self._watching = asyncio.create_task(self._watch(), name=f"worker-{self.pid}-watchdog")

    def _send(self, message: worker_pb2.ToWorker) -> None:
        # What may wait here is bounded: requests by what may be under way, credits by tokens sent, and pings,
        # one every few seconds, by the watchdog.
        if not self._writer.is_closing():
            self._writer.write(ipc.encode(message))

    async def _read(self) -> None:
        try:
            while True:
                message = await ipc.read_from_worker(self._reader)
                self._watchdog.heard()
                self._take(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except _WorkerFailedError as failure:
            self.death = str(failure)
        except Exception:
            log.exception("worker %d sent what makes no sense, killed", self.pid)
            self._kill()
        self.death = self.death or _why(await self._ended())
        self.dead.set()
        self._drained.set()
        for waiter in self._stats_waiters:
            if not waiter.done():
                waiter.set_exception(errors.EngineError(f"the engine stopped ({self.death})"))
        for stream in list(self._streams.values()):
            error = errors.UnavailableError(f"the engine stopped ({self.death})")
            stream.fail(error, by_engine=not self._asked_to_end)
        self._streams.clear()

    async def _watch(self) -> None:
        """Kills the process once it hangs; its requests do not wait until it is really gone."""
        hung = asyncio.create_task(self._watchdog.until_hung())
        dead = asyncio.create_task(self.dead.wait())
        try:
            await asyncio.wait({hung, dead}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hung.cancel()
            dead.cancel()
        if not self.dead.is_set() and not self._asked_to_end:
            self.hung = True
            self.death = f"it hung: no answer within {self._watchdog.hang_s:g} s"
            self._kill()
            self._writer.transport.abort()

    async def _ended(self) -> int | None:
        """The exit status of a process whose channel is closed; one that lingers is killed."""
        status = await self._exit_status(_EXIT_S)
        return await self._end() if status is None else status

    async def _end(self) -> int | None:
        """Kills the process. One that waits in the kernel, for a device say, dies only when that lets it."""
        self._kill()
        status = await self._exit_status(_KILL_S)
        if status is None:
            log.error("worker %d was killed and is still there: the kernel does not let it go", self.pid)
        return status

    async def _exit_status(self, timeout_s: float) -> int | None:
        """How it ended, or None if it does not within so many seconds."""
        try:
            return await asyncio.wait_for(self._process.wait(), timeout_s)
        except asyncio.TimeoutError:
            return None

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._killed = True
            # Not `process.kill()`: it polls, and may take the exit status away from asyncio.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _take(self, message: worker_pb2.FromWorker) -> None:
        match message.WhichOneof("message"):
            case "step":
                for delta in message.step.deltas:
                    if delta.id in self._streams:
                        self._streams[delta.id].put(delta)
            case "ended":
                stream = self._streams.pop(message.ended.id, None)
                if stream is not None:
                    stream.end(message.ended)
            case "stats":
                if self._stats_waiters:
                    waiter = self._stats_waiters.pop(0)
                    if not waiter.done():
                        waiter.set_result(message.stats)
            case "drained":
                self._drained.set()
            case "fatal":
                log.error("worker %d: %s", self.pid, message.fatal.message)
                raise _WorkerFailedError(message.fatal.message)
            case other:
                raise ipc.FrameError(f"message {other} makes no sense here")


class _WorkerFailedError(Exception):
    """The worker's last word."""


def _oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since boot; None where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _why(status: int | None) -> str:
    if status is None:
        return "killed, but not gone"
    return f"signal {-status}" if status < 0 else f"exit status {status}"
