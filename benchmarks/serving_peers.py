"""Other servers of the same model, each in a process of its own on the loopback interface."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from benchmarks.genai_weights import genai_weights
from benchmarks.graph_model import perplexity
from benchmarks.inputs import Inputs
from benchmarks.llama_graph import LlamaGraph, start_backend
from benchmarks.machine import usable_cores
from benchmarks.openai_target import OpenAITarget
from benchmarks.peer_weights import peer_weights
from edgellm.bench import DeviceTarget, Target
from edgellm.client import AsyncClient
from edgellm_buildhost.recipe import QuantName

CONTEXT_TOKENS = 4096
SEQUENCES = 8
_START_S = 60.0
_STOP_S = 10.0
# The fastest of each precision; a slower 4-bit type of better quality would be an easier opponent.
_GGUF = {QuantName.INT8: "Q8_0", QuantName.INT4: "Q4_0"}
_GENAI = {QuantName.INT8: "int8", QuantName.INT4: "int4"}


@dataclass(frozen=True)
class Weights:
    """A file or folder that a peer serves, made from the same model, and how good it is."""

    name: str
    make: Callable[[Inputs], Path]
    perplexity: Callable[[Path, Sequence[int]], float]


@dataclass(frozen=True)
class Rival:
    """Something that answers; `connect` gives a connection for one event loop."""

    name: str
    connect: Callable[[], AbstractAsyncContextManager[Target]]
    weights: Weights | None = None


@dataclass(frozen=True)
class Peer:
    """A server to start: its name in the table, what it needs, and its command line for a port.

    `extra` are the fields that make a request run to its full length.
    """

    name: str
    absent: Callable[[], str]
    weights: Weights
    command: Callable[[Path, int], Sequence[str]]
    extra: Mapping[str, object] = field(default_factory=dict)

    def missing(self, inputs: Inputs) -> str:
        """Why it cannot run here; empty if it can. Makes its weights, so that nothing else waits for them."""
        if reason := self.absent():
            return reason
        try:
            self.weights.make(inputs)
        except RuntimeError as error:
            return str(error)
        return ""

    @contextlib.contextmanager
    def running(self, inputs: Inputs) -> Iterator[Rival]:
        """The server, for as long as the context lasts; raises RuntimeError if it does not start."""
        path, port = self.weights.make(inputs), _free_port()
        url = f"http://127.0.0.1:{port}/v1"
        with _process(self.command(path, port), f"{url}/models"):
            yield Rival(self.name, lambda: OpenAITarget(url, "model", extra=self.extra), self.weights)


def peers_of(precision: QuantName, end_ids: Sequence[int]) -> list[Peer]:
    """All of a precision, installed or not; `end_ids` are what would end an answer early."""
    gguf, genai = _gguf(_GGUF[precision]), _genai(_GENAI[precision])
    return [
        Peer(
            f"llama-server {gguf.name}",
            _no_llama_server,
            gguf,
            _llama_server,
            {"ignore_eos": True, "cache_prompt": True},
        ),
        Peer(
            f"llama_cpp.server {gguf.name}",
            partial(_no_module, "llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context"),
            gguf,
            _llama_cpp_server,
            {"logit_bias": {str(token): -100 for token in end_ids}},
        ),
        Peer(
            f"onnxruntime-genai {genai.name}",
            partial(_no_module, "onnxruntime_genai", "starlette", "uvicorn"),
            genai,
            _genai_server,
            {"ignore_eos": True},
        ),
    ]


def device(target: str) -> Rival:
    """Our agent."""

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[Target]:
        async with AsyncClient(target) as client:
            await client.info()
            yield DeviceTarget(client)

    return Rival("edgellm", connect)


def _llama_server(model: Path, port: int) -> list[str]:
    """Continuous batching, with as many slots of the same context as the agent has."""
    threads = str(usable_cores())
    command = [_llama_server_path() or "llama-server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--threads", threads, "--threads-batch", threads]
    return [*command, "--parallel", str(SEQUENCES), "--ctx-size", str(SEQUENCES * CONTEXT_TOKENS), "--no-ui"]


def _llama_cpp_server(model: Path, port: int) -> list[str]:
    """One request at a time; by default a new one would end the one that runs."""
    threads = str(usable_cores())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--n_threads", threads, "--n_threads_batch", threads]
    return [*command, "--n_ctx", str(CONTEXT_TOKENS), "--interrupt_requests", "false", "--verbose", "false"]


def _genai_server(model: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.genai_server", str(model), "--port", str(port)]


def _gguf(name: str) -> Weights:
    return Weights(
        name, lambda inputs: peer_weights(inputs.model, [name], inputs.peers)[name], _gguf_perplexity
    )


def _gguf_perplexity(path: Path, text: Sequence[int]) -> float:
    start_backend()
    with contextlib.closing(LlamaGraph(path)) as graph:
        return perplexity(graph, text)


def _genai(name: str) -> Weights:
    return Weights(
        name, lambda inputs: genai_weights(inputs.model, [name], inputs.peers)[name], _genai_perplexity
    )


def _genai_perplexity(path: Path, text: Sequence[int]) -> float:
    # Installed only where the peer is.
    from benchmarks.genai_graph import genai_perplexity  # noqa: PLC0415

    return genai_perplexity(path, text)


def _llama_server_path() -> str | None:
    """Beside this Python, where scripts/bench_env.sh puts it, or on the PATH."""
    return shutil.which("llama-server", path=str(Path(sys.executable).parent)) or shutil.which("llama-server")


def _no_llama_server() -> str:
    return "" if _llama_server_path() else "there is no llama-server beside this Python or on the PATH"


def _no_module(*names: str) -> str:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _process(command: Sequence[str], ready_url: str) -> Iterator[None]:
    """A server that answers at `ready_url`; raises RuntimeError with the end of its log if it does not."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            until = time.monotonic() + _START_S
            while not _answers(ready_url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    end = log.read()[-500:].decode("utf-8", "replace")
                    raise RuntimeError(f"it did not start: {end}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2.0, trust_env=False).is_success
    return False
