"""The process that talks to jtop: `python -m edgellm_agent.telemetry.jtop_helper`.

It prints one line of JSON per sample, in the units of jetson-stats (kHz, mW, mV, mA, °C, percent), or one
line with an `error` before it ends. It is a process of its own because importing jtop changes how its process
starts others, and because its start may hang for good. It ends when its standard input does: with its parent.

Standard library alone here: what is read is bare and in odd shapes, and is checked by the parent.
"""

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

# What can be; a sensor that is offline says -256 °C.
_CELSIUS, _PERCENT, _KHZ, _MILLI = (-60.0, 200.0), (0.0, 100.0), (0.0, 1e7), (-1e6, 1e6)
_MAX_NAME, _MAX_SENSORS = 64, 64
Sample = dict[str, Any]


def main(interval_s: float = 1.0) -> int:
    """Print samples until the service or the parent is gone; gives the exit status."""
    out = _private_stdout()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for sample in _samples(interval_s):
            _print(out, sample)
    except Exception as error:  # noqa: BLE001 - the parent is told, whatever any version of it raises
        _print(out, {"error": f"{type(error).__name__}: {error}"[:500]})
        return 1
    _print(out, {"error": "the jtop service sends nothing any more"})
    return 1


def _private_stdout() -> TextIO:
    """Keep standard output for samples: what the library prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return out


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _print(out: TextIO, line: Sample) -> None:
    out.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
    out.flush()


def _samples(interval_s: float) -> Iterator[Sample]:
    from jtop import jtop  # type: ignore[import-not-found, unused-ignore]  # noqa: PLC0415

    with jtop(interval=interval_s) as board:
        while board.ok():
            yield sample_of(board)


def sample_of(board: Any) -> Sample:
    """Give what a started jtop tells now; what it does not tell is left out."""
    gpu = _integrated(_mapping(board.gpu))
    mode = getattr(board, "nvpmodel", None)
    cpu = _mapping(board.cpu)
    idle = _number(_mapping(cpu.get("total")).get("idle"), _PERCENT)
    sample: Sample = {
        "zones": _bounded(_zones(_mapping(board.temperature))),
        **_power(_mapping(board.power)),
        "mode": str(mode)[:_MAX_NAME] if mode is not None else None,
        "cpu_percent": None if idle is None else 100 - idle,
        "cpu_khz": _mean_khz(cpu.get("cpu")),
        "gpu_percent": _number(_mapping(gpu.get("status")).get("load"), _PERCENT),
        "gpu_khz": _number(_mapping(gpu.get("freq")).get("cur"), _KHZ),
        "gpu_max_khz": _number(_mapping(gpu.get("freq")).get("max"), _KHZ),
    }
    return {name: value for name, value in sample.items() if value is not None}


def _zones(temperature: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, sensor in temperature.items():
        celsius = _number(_mapping(sensor).get("temp"), _CELSIUS)
        if celsius is not None and _mapping(sensor).get("online", True):
            yield name, celsius


def _power(power: Mapping[str, Any]) -> Sample:
    """Give the rails; jtop takes the one that is the module's input out of them, and calls it the total."""
    total = _mapping(power.get("tot"))
    rails = {**_mapping(power.get("rail"))}
    if "name" in total:
        rails[total["name"]] = total
    figures = {
        name: {
            field: value
            for field, key in (("mv", "volt"), ("ma", "curr"), ("mw", "power"))
            if (value := _number(_mapping(rail).get(key), _MILLI)) is not None
        }
        for name, rail in rails.items()
        if _mapping(rail).get("online", True)
    }
    return {
        "rails": _bounded((name, rail) for name, rail in figures.items() if "mw" in rail),
        "total_mw": _number(total.get("power"), _MILLI) if rails else None,
    }


def _integrated(gpus: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the GPU of the module: the first, where none says that it is integrated."""
    found = [_mapping(gpu) for gpu in gpus.values()]
    return next((gpu for gpu in found if gpu.get("type") == "integrated"), found[0] if found else {})


def _mean_khz(cores: Any) -> float | None:
    clocks = [
        khz
        for core in (cores if isinstance(cores, list) else [])
        if _mapping(core).get("online")
        and (khz := _number(_mapping(_mapping(core).get("freq")).get("cur"), _KHZ)) is not None
    ]
    return sum(clocks) / len(clocks) if clocks else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _bounded(named: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """Give what has a name that can be shown, as much of it as the parent takes."""
    usable = [(name, value) for name, value in named if isinstance(name, str) and 0 < len(name) <= _MAX_NAME]
    return dict(usable[:_MAX_SENSORS])


def _number(value: Any, bounds: tuple[float, float]) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return value if usable and bounds[0] <= value <= bounds[1] else None


if __name__ == "__main__":
    # At once: a thread of the library that hangs must not keep the process.
    os._exit(main())
