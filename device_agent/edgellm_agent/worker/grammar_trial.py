"""A small process that compiles a grammar on trial: `python -m edgellm_agent.worker.grammar_trial`.

llguidance bounds most of what a grammar costs by its limits, but not all of it: a schema of 40 bytes
(`multipleOf: 999983`) compiled for 11 s and took 370 MB with the default limits, more than 6 s with those
below, and a chain of 4,500 rules overflowed the stack, which ends the process (2 shared x86 cores, llguidance
1.9.1). So each grammar is first compiled in a fork of this process, which may take `CPU_S` of processor time,
`STACK_BYTES` of stack and `COMPILED_BYTES` of memory and no more.

Lines of JSON: a grammar on stdin, the verdict on stdout, which is why the grammar is refused or "". Ends with
stdin.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Processor time, so that a busy machine refuses no more than an idle one.
CPU_S = 0.08
# Half of what the C library gives a thread at least.
STACK_BYTES = 1 << 20
# What one answer's matcher may hold once compiled.
COMPILED_BYTES = 16 << 20
# What a trial may reserve while it compiles.
_TRIAL_BYTES = 256 << 20

_PR_SET_DUMPABLE = 4
_PAGE_BYTES = resource.getpagesize()


def limits() -> LLParserLimits:
    """Bounds of compiling a grammar, and of each step with it.

    `initial_lexer_fuel` bounds the text that is forced at the start, too, but only with
    `precompute_large_lexemes`; a lexer state takes 0.2 to 1.3 kB. Error messages must not show the answer so
    far.
    """
    return LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=50_000,
        step_max_items=10_000,
        max_items_in_row=500,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )


def main() -> None:
    """Answers one grammar after the other until stdin ends."""
    # A grammar that overflows the stack is the client's fault and leaves no core file.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    # Compiling does not depend on the vocabulary; single bytes are one that costs nothing to load.
    tokenizer = LLTokenizer("byte")
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            _say(_try(tokenizer, json.loads(line)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            _say(_reason(status))


def _try(tokenizer: LLTokenizer, grammar: str) -> str:
    reserved, before = _memory_bytes()
    for kind, size in ((resource.RLIMIT_STACK, STACK_BYTES), (resource.RLIMIT_AS, reserved + _TRIAL_BYTES)):
        resource.setrlimit(kind, (size, resource.getrlimit(kind)[1]))
    # SIGPROF ends a process that does not handle it.
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits())
    matcher.compute_ff_bytes()
    matcher.compute_bitmask()
    signal.setitimer(signal.ITIMER_PROF, 0)
    _, after = _memory_bytes()
    if not matcher.is_error() and after - before > COMPILED_BYTES:
        return f"takes {(after - before) >> 20} MiB once compiled, of {COMPILED_BYTES >> 20} MiB allowed"
    return matcher.get_error()


def _memory_bytes() -> tuple[int, int]:
    """Address space, and what of it is anonymous memory in use."""
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123
        reserved, resident, shared = (int(pages) * _PAGE_BYTES for pages in statm.read().split()[:3])
    return reserved, resident - shared


def _reason(status: int) -> str:
    match os.waitstatus_to_exitcode(status):
        case code if code == -signal.SIGPROF:
            return f"takes more than {CPU_S * 1000:.0f} ms to compile; make it smaller or less nested"
        case code if code in {-signal.SIGSEGV, -signal.SIGBUS}:
            return "is nested too deeply"
        case _:
            return "takes too much memory to compile"


def _say(verdict: str) -> None:
    sys.stdout.write(json.dumps(verdict) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
