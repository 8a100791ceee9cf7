"""Chooses the source: what the machine is, unless the operator says otherwise."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edgellm.errors import EdgellmError
from edgellm_agent.telemetry.base import Clock, Source
from edgellm_agent.telemetry.host import HostSource
from edgellm_agent.telemetry.jtop import JtopSource
from edgellm_agent.telemetry.replay import ReplaySource, load_recording, scenario_names
from edgellm_agent.telemetry.sysfs import SysfsSource, is_tegra

Kind = Literal["auto", "sysfs", "host", "jtop", "replay"]
MAX_SPEED = 1000.0


@dataclass(frozen=True)
class SourceChoice:
    """What `telemetry_source` asks for; `target` and `speed` belong to a replay."""

    kind: Kind
    target: str = ""
    speed: float = 1.0


def parse_source(text: str) -> SourceChoice:
    """Read "auto", "sysfs", "host", "jtop" or "replay:FILE[?speed=N]"; raises ValueError with the rule."""
    for kind in get_args(Kind):
        if text == kind != "replay":
            return SourceChoice(kind)
    scheme, _, rest = text.partition(":")
    if scheme != "replay" or not rest:
        raise ValueError(
            f"{text!r:.80} is none of auto, sysfs, host, jtop, replay:FILE"
            f" and replay:{' replay:'.join(scenario_names())}"
        )
    target, mark, query = rest.rpartition("?speed=")
    if not mark:
        return SourceChoice("replay", rest)
    return SourceChoice("replay", target, _speed(query))


def source_setting(text: str) -> str:
    """Give the text back if it names a source; raises ValueError: a validator of the settings."""
    parse_source(text)
    return text


def open_source(text: str = "auto", root: Path = Path("/"), clock: Clock | None = None) -> Source:
    """Give the source that the text asks for; the caller closes it.

    Raises EdgellmError where it asks for what there is not: a recording that is missing or damaged, or a jtop
    that is not installed.
    """
    try:
        choice = parse_source(text)
    except ValueError as error:
        raise EdgellmError(f"telemetry source: {error}", "correct telemetry_source, or --telemetry") from None
    makers: dict[Kind, Callable[[], Source]] = {
        "auto": lambda: detect_source(root, clock),
        "sysfs": lambda: SysfsSource(root, clock),
        "host": lambda: HostSource(root),
        "jtop": lambda: JtopSource(root, clock),
        "replay": lambda: ReplaySource(load_recording(choice.target), speed=choice.speed, clock=clock),
    }
    return makers[choice.kind]()


def detect_source(root: Path = Path("/"), clock: Clock | None = None) -> Source:
    """Give the kernel's files on a Tegra board, else the host."""
    return SysfsSource(root, clock) if is_tegra(root) else HostSource(root)


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed <= MAX_SPEED:
        raise ValueError(f"the speed of a replay is above 0 and at most {MAX_SPEED:g}, not {text!r:.20}")
    return speed
