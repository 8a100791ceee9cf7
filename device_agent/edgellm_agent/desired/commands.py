"""Commands of the fleet: few, off unless listed, obeyed at most once and only while they are fresh."""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.errors import EdgellmError
from edgellm.fleet.topics import decode
from edgellm.v1 import fleet_pb2
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.desired.settings import CommandName, CommandSettings
from edgellm_agent.errors import AgentError, DeadlineError, DeniedError, EngineError
from edgellm_agent.mqtt.base import MessageProperties, Uplink

log = logging.getLogger(__name__)

Action: TypeAlias = Callable[[], Awaitable[str]]
MAX_OUTPUT_BYTES = 16 << 10
MAX_WAITING = 8
LONGEST_VALID_S = 3600
# Longer than an engine may take to load.
_DEADLINE_S = 600.0
_MAX_PAYLOAD_BYTES = 4 << 10
# What each is in the table of rules.
METHODS: Mapping[str, str] = {
    "report": "DeviceService/GetInfo",
    "restart-engine": "EngineService/Activate",
    "logs": "DeviceService/WatchLogs",
}
# A command is fresh for an hour at most, and eight wait at most: none that is still fresh is forgotten unless
# more than this come in an hour, and all three may be done twice without harm.
_REMEMBERED = 1024
_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class _Order:
    """A command on its way."""

    id: str
    command: fleet_pb2.Command
    # What MQTT 5 wants the answer to carry.
    correlation_data: bytes


class Commands:
    """Takes commands from the fleet, does them one at a time, and answers on this device's own topic.

    Args:
        settings: The names that are allowed.
        actions: What each name does; gives its output.
        uplink: To the fleet.
        fleet: What the fleet may do here at all.
        wall_ns: Wall clock, nanoseconds since 1970.
    """

    def __init__(
        self,
        settings: CommandSettings,
        actions: Mapping[CommandName, Action],
        uplink: Uplink,
        fleet: Fleet,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._fleet = fleet
        self._actions = {str(name): action for name, action in actions.items() if name in settings.allow}
        self._uplink = uplink
        self._wall_ns = wall_ns
        self._waiting: asyncio.Queue[_Order] = asyncio.Queue(MAX_WAITING)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listens; does nothing if no command is allowed."""
        if self._actions:
            self._task = asyncio.create_task(self._work(), name="commands")
            self._uplink.on_message(self._uplink.topics.command_request, self.take)

    async def close(self) -> None:
        """Stops; a command under way is not answered."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def take(self, _topic: str, payload: bytes, properties: MessageProperties) -> None:
        """A payload from the request topic; one that cannot be answered is logged and ignored."""
        try:
            if len(payload) > _MAX_PAYLOAD_BYTES:
                raise ValueError(f"{len(payload)} bytes")
            event = decode(payload)
            if not event.HasField("command") or not _ID.fullmatch(event.id):
                raise ValueError("no `command` or no `id` in the event")
        except ValueError as error:
            log.warning("command.ignored error=%.300s", error)
            return
        if event.id in self._seen:
            log.info("command.duplicate id=%s", event.id)
            return
        self._remember(event.id)
        order = _Order(event.id, event.command, properties.correlation_data or b"")
        if refusal := self._refusal(event.command):
            self._answer(order, error=refusal)
        elif self._waiting.full():
            self._answer(order, error=f"{MAX_WAITING} commands are waiting already")
        else:
            self._waiting.put_nowait(order)

    def _refusal(self, command: fleet_pb2.Command) -> str:
        """Why the command is not obeyed; empty if it is."""
        if command.name not in self._actions:
            allowed = ", ".join(sorted(self._actions))
            return f"the command {command.name!r:.60} is not allowed here; allowed: {allowed}"
        try:
            self._fleet.check(METHODS[command.name])
        except DeniedError as error:
            return str(error)
        if not command.HasField("expires"):
            return f"expires: must be set, at most {LONGEST_VALID_S} s ahead"
        now_ns = self._wall_ns()
        left_s = command.expires.seconds - now_ns // 10**9
        if 0 < left_s <= LONGEST_VALID_S:
            return ""
        when = f"{-left_s} s ago" if left_s <= 0 else f"in {left_s} s, more than {LONGEST_VALID_S} s ahead"
        return f"expires {when}, by this device's clock: {_written(now_ns)}"

    async def _work(self) -> None:
        # The field is asked too: before Python 3.12, `wait_for` can swallow a cancellation.
        while self._task is not None:
            order = await self._waiting.get()
            # It may have waited long.
            if refusal := self._refusal(order.command):
                self._answer(order, error=refusal)
            else:
                await self._obey(order)

    async def _obey(self, order: _Order) -> None:
        name, output = order.command.name, ""
        failure: Exception | None = None
        log.info("command.begins name=%s id=%s", name, order.id)
        try:
            output = await asyncio.wait_for(self._actions[name](), _DEADLINE_S)
        except asyncio.TimeoutError:
            failure = DeadlineError(f"not done within {_DEADLINE_S:g} s")
        except (AgentError, EdgellmError) as error:
            failure = error
        except Exception:
            log.exception("command.failed name=%s id=%s", name, order.id)
            failure = EngineError("the agent failed; its log says more")
        await self._fleet.did(METHODS[name], f"command {name}", failure)
        self._answer(order, output=output, error=str(failure or ""))

    def _remember(self, id_: str) -> None:
        self._seen[id_] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _answer(self, order: _Order, *, output: str = "", error: str = "") -> None:
        name = order.command.name[:60]
        if error:
            log.warning("command.refused name=%r id=%s error=%s", name, order.id, error)
        event = self._uplink.new_event("command.result")
        event.command_result.CopyFrom(
            fleet_pb2.CommandResult(
                command_id=order.id, name=name, ok=not error, error=error, output=last_bytes(output)
            )
        )
        topic = self._uplink.topics.command_response
        self._uplink.publish_event(topic, event, correlation_data=order.correlation_data)


def last_bytes(text: str, limit: int = MAX_OUTPUT_BYTES) -> str:
    """The end of a text, whole characters, at most so many bytes of UTF-8."""
    data = text.encode("utf-8", errors="replace")
    return data[-limit:].decode("utf-8", errors="ignore")


def _written(time_ns: int) -> str:
    return datetime.datetime.fromtimestamp(time_ns // 10**9, datetime.timezone.utc).isoformat()
