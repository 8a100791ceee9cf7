"""All targets by name: a context manager makes those that are asked for, with what they need."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.fuzz.bundles import bundle, config, graph, manifest, plan
from tests.fuzz.files import mqtt_payload, recording, settings_file, source
from tests.fuzz.live import grpc_message, http_bytes, http_json, write_blob
from tests.fuzz.run import Target
from tests.fuzz.worker import agent_frame, constraint, pattern, request, template, tokenizer, worker_frame

Maker = Callable[[ExitStack, Path], Target]

_MAKERS: dict[str, Maker] = {
    "manifest": manifest,
    "config": config,
    "plan": plan,
    "bundle": bundle,
    "graph": graph,
    "worker-frame": worker_frame,
    "agent-frame": agent_frame,
    "request": request,
    "template": template,
    "tokenizer": tokenizer,
    "pattern": pattern,
    "constraint": constraint,
    "mqtt-payload": mqtt_payload,
    "source": source,
    "settings": settings_file,
    "recording": recording,
    "grpc": grpc_message,
    "write-blob": write_blob,
    "http-bytes": http_bytes,
    "http-json": http_json,
}
NAMES = tuple(_MAKERS)


@contextmanager
def targets(names: Sequence[str]) -> Iterator[list[Target]]:
    """The targets of these names, and what they need, until the block ends."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edf-")))
        chosen = []
        for name in names:
            (root / name).mkdir()
            chosen.append(_MAKERS[name](stack, root / name))
        yield chosen
