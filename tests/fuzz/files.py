"""What comes by MQTT, from settings files and from recordings."""

from __future__ import annotations

import asyncio
import gzip
import io
from contextlib import ExitStack
from pathlib import Path

from edgellm.errors import EdgellmError
from edgellm.fleet.topics import DeviceTopics, decode, encode, telemetry_events
from edgellm.fleet.validate import RejectedError, check
from edgellm.v1 import fleet_pb2
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.config import load_settings
from edgellm_agent.desired.commands import Commands
from edgellm_agent.desired.rules import Desired
from edgellm_agent.desired.settings import CommandSettings
from edgellm_agent.desired.sources import parse_source
from edgellm_agent.mqtt.base import MessageProperties
from edgellm_agent.telemetry import recording as recordings
from edgellm_agent.telemetry.recording import RecordingError
from edgellm_agent.telemetry.replay import write_tree
from tests.fuzz.mutate import changed_bytes, changed_json, changed_message
from tests.fuzz.run import Target
from tests.support.desired_device import FakeUplink
from tests.support.fleet_devices import ENGINE, orin_nano_record

_TOPICS = DeviceTopics("default", "line-1", "jetson-01")
_NOW_NS = 1_800_000_000 * 10**9


def _events() -> list[tuple[str, fleet_pb2.Event]]:
    source = _TOPICS.source
    desired = fleet_pb2.Event(id="d-1", source="edgellm/default/fleet", type="edgellm.desired.v1")
    desired.desired.CopyFrom(
        fleet_pb2.Desired(generation=3, engine=ENGINE, source="https://models.example/tiny")
    )
    command = fleet_pb2.Event(id="c-1", source="edgellm/default/fleet", type="edgellm.command.v1")
    command.command.name = "report"
    command.command.expires.FromSeconds(_NOW_NS // 10**9 + 60)
    worker = fleet_pb2.Event(id="w-1", source=source, type="edgellm.worker.v1", run=1, sequence=2)
    worker.worker.engine = ENGINE
    state = fleet_pb2.Event(id="s-1", source=source, type="edgellm.state.v1")
    state.state.session = 4
    telemetry = [
        (_TOPICS.telemetry(n), e) for n, e in telemetry_events(_TOPICS, 1, orin_nano_record(5, _NOW_NS))
    ]
    return [(_TOPICS.desired, desired), (_TOPICS.command_request, command), (_TOPICS.event("worker"), worker),
            (_TOPICS.state, state), *telemetry]  # fmt: skip


def mqtt_payload(stack: ExitStack, folder: Path) -> Target:
    """A payload on every topic: recorded or rejected by the receiver, obeyed or ignored by the device."""
    topics = [topic for topic, _ in _events()]
    commands = Commands(
        CommandSettings(allow=["report"]),
        {"report": _reported},
        FakeUplink(),
        Fleet("operator"),
        wall_ns=lambda: _NOW_NS,
    )
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)

    def run(data: bytes) -> str:
        outcomes = set()
        for topic in topics:
            try:
                check(topic, data, received_ns=_NOW_NS, retained=False)
                outcomes.add("taken")
            except RejectedError as error:  # noqa: PERF203 - each topic has its own answer
                outcomes.add(error.reason)
        commands.take("", data, MessageProperties(retain=False))
        try:
            Desired.from_proto(decode(data).desired)
        except ValueError:
            outcomes.add("not desired")
        return "taken" if "taken" in outcomes else max(outcomes)

    def mutate(rng, corpus):  # type: ignore[no-untyped-def]
        if rng.random() < 0.5:
            return changed_json(rng, [data for data in corpus if data[:1] == b"{"])
        return changed_message(fleet_pb2.Event)(rng, [data for data in corpus if data[:1] != b"{"])

    corpus = [encode(event, "json") for _, event in _events()]
    corpus += [encode(event, "protobuf") for _, event in _events()]
    return Target("mqtt-payload", corpus, run, mutate, folder)


async def _reported() -> str:
    return "reported"


def source(stack: ExitStack, folder: Path) -> Target:
    """The source that a fleet names."""

    def run(data: bytes) -> str:
        try:
            parsed = parse_source(data.decode(errors="replace"))
        except ValueError:
            return "refused"
        assert not {"", ".", ".."} & set(parsed.segments)
        return "taken"

    corpus = [
        b"https://models.example:8443/a/b",
        b"oci://[::1]:5000/team/tiny",
        b"oci+http://10.0.0.1/x",
        b"http://h/%2e%2e/",
    ]
    return Target("source", corpus, run, folder=folder)


def settings_file(stack: ExitStack, folder: Path) -> Target:
    """The agent's TOML file."""
    shipped = Path(__file__).parents[2] / "deploy" / "agent.toml"
    corpus = [
        shipped.read_bytes(),
        b'device = "jetson-01"\nprofile = "orin-nano-8gb"\n[http]\nlisten = "127.0.0.1:8080"\n',
        b'[mqtt]\nhost = "broker"\ngroup = "line-1"\n[commands]\nallow = ["report"]\n',
        b"[governor]\nenabled = true\n",
    ]

    def run(data: bytes) -> str:
        path = folder / "agent.toml"
        path.write_bytes(data)
        try:
            load_settings(path)
        except EdgellmError as error:
            return "not TOML" if "not TOML" in str(error) else "refused"
        finally:
            path.unlink()
        return "taken"

    return Target("settings", corpus, run, folder=folder, share=0.3)


def recording(stack: ExitStack, folder: Path) -> Target:
    """A recording, plain or zipped, and the tree that is written from it."""
    header = recordings.encoded(recordings.Header(board="b", kernel="k", l4t="36", started="now"))
    first = recordings.Snapshot(
        t_s=0, files={"sys/a/temp": "1\n", "proc/x": recordings.Unreadable(errno="EAGAIN")}
    )
    then = recordings.Snapshot(t_s=1.5, files={"sys/a/temp": "2\n", "proc/x": None})
    plain = header + recordings.encoded(first) + recordings.encoded(then)
    tree = folder / "tree" / "inner"

    def run(data: bytes) -> str:
        stream = io.BytesIO(data)
        zipped = data[:2] == b"\x1f\x8b"
        path = folder / "recording"
        path.write_bytes(data)
        try:
            recorded = recordings.load(path)
        except RecordingError:
            return "refused, zipped" if zipped else "refused"
        finally:
            path.unlink()
            stream.close()
        for snapshot in recorded.snapshots[:20]:
            write_tree(tree, snapshot.files)
        _clear(folder / "tree", tree)
        return "played"

    def mutate(rng, corpus):  # type: ignore[no-untyped-def]
        data = changed_bytes(rng, corpus)
        return gzip.compress(data, 1) if rng.random() < 0.2 else data

    return Target("recording", [plain, gzip.compress(plain)], run, mutate, folder)


def _clear(above: Path, tree: Path) -> None:
    """Removes a tree; all that was written must be in it."""
    for path in sorted(above.rglob("*"), reverse=True):
        assert path == tree or tree in path.parents, f"{path} lies outside of the tree"
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    if above.exists():
        above.rmdir()
