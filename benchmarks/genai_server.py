"""onnxruntime-genai behind OpenAI's API: the smallest server that is fair to it.

`python -m benchmarks.genai_server FOLDER --port PORT`. The runtime's own engine makes the
batches, static ones on CPUs: requests that wait run together to the end, and who comes meanwhile waits. A
request that ran alone is kept open, so that the next turn of a chat computes only what is new.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found, unused-ignore]
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.genai_graph import load_model

_CONTEXT_TOKENS = 4096
_SEQUENCES = 8
# A session's KV memory is taken at its start: a completion needs its own length, a chat has turns to come.
_CHAT_SESSION_TOKENS = 2048
_EVENTS = 64
_LOAD_S = 60.0


@dataclass(eq=False)
class _Job:
    """One answer; `put` gets each token, and None at the end."""

    tokens: list[int]
    max_tokens: int
    min_tokens: int
    session_tokens: int
    put: Callable[[int | None], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    alone: bool = True


@dataclass
class _Session:
    """A request of the engine, and the tokens that its KV cache stands for."""

    request: Any
    tokens: list[int]
    room: int
    turn: int = 0


class Batcher:
    """The engine, and the one thread that may touch it."""

    def __init__(self, path: Path) -> None:
        """Loads a model folder; raises RuntimeError if that takes too long."""
        self._path = path
        self._arrived: queue.Queue[_Job] = queue.Queue()
        self._running: dict[Any, tuple[_Job, _Session]] = {}
        self._kept: _Session | None = None
        self._ready = threading.Event()
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        if not self._ready.wait(_LOAD_S):
            raise RuntimeError(f"{path} was not loaded in {_LOAD_S:g} s")

    def submit(self, job: _Job) -> None:
        """Queues an answer."""
        self._arrived.put(job)

    def _run(self) -> None:
        model = load_model(self._path, _CONTEXT_TOKENS, _SEQUENCES)
        self.tokenizer = og.Tokenizer(model)
        self._engine = og.Engine(model)
        events = self._engine.create_event_buffer(_EVENTS)
        self._ready.set()
        while True:
            self._take()
            for event in self._engine.run(events):
                self._deliver(event)

    def _take(self) -> None:
        """Begins what has come, and waits for it if there is nothing to compute."""
        if not self._running:
            self._begin(self._arrived.get())
        while not self._arrived.empty():
            self._begin(self._arrived.get())
        for job, session in self._running.values():
            if job.cancelled.is_set():
                job.cancelled.clear()
                session.request.cancel_turn(session.turn)

    def _begin(self, job: _Job) -> None:
        session, new = self._session(job)
        options = og.TurnOptions(session.request)
        options.set_do_sample(False)
        options.set_max_generated_tokens(job.max_tokens)
        options.set_min_generated_tokens(job.min_tokens)
        session.turn = session.request.begin_turn(np.asarray(new, np.int32), options)
        self._running[session.request] = job, session
        if len(self._running) > 1:
            for other, _ in self._running.values():
                other.alone = False

    def _session(self, job: _Job) -> tuple[_Session, list[int]]:
        """Where the job runs, and those of its tokens that are new there."""
        kept, self._kept = self._kept, None
        if kept is not None:
            known, longest = len(kept.tokens), len(job.tokens) + job.max_tokens
            if not self._running and job.tokens[:known] == kept.tokens and longest <= kept.room:
                new = job.tokens[known:]
                kept.tokens += new
                return kept, new
            kept.request.close()
        options = og.RequestOptions()
        options.set_max_session_tokens(job.session_tokens)
        request = self._engine.create_request(options=options)
        return _Session(request, list(job.tokens), job.session_tokens), job.tokens

    def _deliver(self, event: Any) -> None:
        job, session = self._running[event.request]
        if event.flags & og.EngineEventFlags.TOKEN:
            session.tokens.append(event.token)
            job.put(event.token)
        if event.finish_reason == og.FinishReason.NONE:
            return
        del self._running[event.request]
        job.put(None)
        if job.alone:
            self._kept = session
        else:
            session.request.close()


class _Api:
    """OpenAI's two ways to ask, streamed, as far as the load generator uses them."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "genai", "object": "model"}]})

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        tokens = self._batcher.tokenizer.encode(body["prompt"]).tolist()
        return self._answer(body, tokens, len(tokens) + body["max_tokens"])

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        tokenizer = self._batcher.tokenizer
        text = tokenizer.apply_chat_template(json.dumps(body["messages"]), add_generation_prompt=True)
        tokens = tokenizer.encode(text).tolist()
        longest = len(tokens) + body["max_tokens"]
        return self._answer(body, tokens, max(longest, _CHAT_SESSION_TOKENS))

    def _answer(self, body: dict[str, Any], tokens: list[int], session_tokens: int) -> Response:
        loop, arrivals = asyncio.get_running_loop(), asyncio.Queue[int | None]()

        def put(token: int | None) -> None:
            loop.call_soon_threadsafe(arrivals.put_nowait, token)

        longest = body["max_tokens"]
        job = _Job(tokens, longest, longest if body.get("ignore_eos") else 0, session_tokens, put)
        self._batcher.submit(job)
        return StreamingResponse(self._events(job, arrivals), media_type="text/event-stream")

    async def _events(self, job: _Job, arrivals: asyncio.Queue[int | None]) -> AsyncIterator[str]:
        stream, generated = self._batcher.tokenizer.create_stream(), 0
        try:
            while (token := await arrivals.get()) is not None:
                generated += 1
                text = stream.decode(token)
                yield _event(choices=[{"index": 0, "text": text, "delta": {"content": text}}])
            usage = {"prompt_tokens": len(job.tokens), "completion_tokens": generated}
            yield _event(choices=[], usage=usage)
            yield "data: [DONE]\n\n"
        finally:
            job.cancelled.set()


def _event(**fields: object) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def main() -> None:
    """Serves until it is ended by a signal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.genai_server", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder of onnxruntime-genai")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    api = _Api(Batcher(options.folder))
    routes = [
        Route("/v1/models", api.models),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
