"""A small process that renders one chat template: `python -m edgellm_agent.worker.template_process`.

A bundle's template is a program from elsewhere. Jinja's sandbox bounds what it may touch, not what it costs:
`'a' * 10**10`, `10**10**10` or a filter's argument is one call into C, which nothing in the same process can
end. So this process takes the template, and may take `CPU_S` of processor time for each text, `_MORE_BYTES`
of memory, and no file. What exceeds that kills it alone.

Lines of JSON: the template's source on stdin, then the variables of each text; on stdout a line for each,
`{"text": ...}` or `{"refused": why}`. Ends with stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Processor time, so that a busy machine refuses no more than an idle one. The templates of Llama 3, Qwen and
# Gemma take 0.1 ms for a few messages and 20 ms for a thousand.
CPU_S = 0.25
COMPILE_CPU_S = 1.0
# Longer than any context that fits a board, and no more than the agent lets in as a prompt.
MAX_TEXT_BYTES = 4 << 20
# Messages of 4 MiB, as Python objects and as JSON, with room for the text of them.
_MORE_BYTES = 128 << 20
_MAX_MESSAGE = 300

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38

Made = TypeVar("Made")


def main() -> None:
    """Takes the template, then renders one text after the other until stdin ends."""
    environment = _environment()
    _warm_up(environment)
    _confine()
    template: Template | None = None
    for line in sys.stdin.buffer:
        if template is None:
            template, answer = _within(COMPILE_CPU_S, environment.from_string, line)
        else:
            _, answer = _within(CPU_S, partial(_render, template), line)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _warm_up(environment: ImmutableSandboxedEnvironment) -> None:
    """Makes jinja2 and Python import all that they import late: soon no file can be opened."""
    for source in (
        r"{{ lipsum(n=1) | wordwrap }}{{ '\n\u00e9' | upper | tojson }}",
        "{{ raise_exception('no') }}",
        "{% if",
    ):
        with contextlib.suppress(TemplateError):
            environment.from_string(source).render()


def _render(template: Template, variables: dict[str, object]) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        size += len(piece.encode())
        if size > MAX_TEXT_BYTES:
            raise TemplateError(f"it makes more than {MAX_TEXT_BYTES >> 20} MiB of text")
        pieces.append(piece)
    return "".join(pieces)


def _within(cpu_s: float, work: Callable[[Any], Made], line: bytes) -> tuple[Made | None, dict[str, str]]:
    """What the work makes of a line of JSON, and the answer to it.

    SIGPROF ends a process that takes too long.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        made = work(json.loads(line))
    except MemoryError:
        return None, {"refused": "it takes too much memory"}
    except RecursionError:
        return None, {"refused": "it is nested too deeply"}
    except Exception as error:  # noqa: BLE001 - whatever a program from elsewhere raises is its own
        return None, {"refused": str(error)[:_MAX_MESSAGE] or type(error).__name__}
    else:
        return made, {"text": made if isinstance(made, str) else ""}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _confine() -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123
        reserved = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for kind, most in (
        (resource.RLIMIT_AS, reserved + _MORE_BYTES),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
