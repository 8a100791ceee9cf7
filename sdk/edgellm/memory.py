"""The memory plan: how an engine divides what a device really has, as pure functions of integers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from edgellm.bundle.config import EngineConfig
from edgellm.errors import DoesNotFitError
from edgellm.v1 import device_pb2

MINIMAL_CONTEXT_TOKENS = 256
# Prompt tokens of one step, unless the device is told otherwise: a longer step would stall the others.
PREFILL_TOKENS = 128
# A worker without an engine: Python, numpy, the runtime's own memory, a tokenizer of 50,000 tokens. Measured.
WORKER_BYTES = 64 << 20
# The process that renders the engine's chat template. Measured.
TEMPLATE_BYTES = 13 << 20
# Rows of logits that a step may ask for beyond one for each sequence: newest tokens, and guesses behind them.
VERIFIED_TOKENS = 32
_PAGE_BYTES = 4096
_SCORE_BYTES = 4
_LOGIT_BYTES = 4
# What constraints take for each token of the vocabulary once one comes: 17 MB in all for SmolLM2. Measured.
_CONSTRAINT_BYTES = 384


@dataclass(frozen=True)
class MemoryPlan:
    """How a device's memory is divided; weights, workspace, headroom and KV never exceed what is there."""

    available_bytes: int
    weights_bytes: int
    workspace_bytes: int
    headroom_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    max_sequences: int

    def to_proto(self) -> device_pb2.MemoryPlan:
        """The same figures as a protobuf message."""
        return device_pb2.MemoryPlan(**asdict(self))

    @classmethod
    def from_proto(cls, message: device_pb2.MemoryPlan) -> MemoryPlan:
        """The same figures from a protobuf message."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


def workspace_bytes(
    config: EngineConfig, *, step_tokens: int, context_tokens: int, max_sequences: int = 1
) -> int:
    """The worker's own memory and the scratch of a step of `step_tokens` over `context_tokens`, bytes."""
    footprint = config.footprint
    vocabulary_bytes = config.model.vocab_size * _CONSTRAINT_BYTES
    logits_bytes = max(VERIFIED_TOKENS, max_sequences) * config.model.vocab_size * _LOGIT_BYTES
    scores_bytes = config.model.heads * step_tokens * context_tokens * _SCORE_BYTES
    step_bytes = step_tokens * footprint.workspace_bytes_per_token + scores_bytes
    own_bytes = WORKER_BYTES + (TEMPLATE_BYTES if config.files.chat_template is not None else 0)
    return own_bytes + footprint.workspace_base_bytes + vocabulary_bytes + step_bytes + logits_bytes


def plan_memory(
    config: EngineConfig,
    *,
    available_bytes: int,
    headroom_bytes: int,
    context_tokens: int | None = None,
    max_sequences: int = 1,
    prefill_tokens: int = PREFILL_TOKENS,
) -> MemoryPlan:
    """Divides `available_bytes` among weights, workspace, headroom and KV cache.

    The context is the longest that one sequence can have: the model's, the one asked for, or what the memory
    holds, if that is less. Workspace grows with the context, so both are found together. The KV cache gets
    what is left, but not more than `max_sequences` sequences of that context can use.

    Args:
        config: The engine.
        available_bytes: What the device has for it: MemAvailable, or a simulated limit if that is less.
        headroom_bytes: Left to everybody else on the board.
        context_tokens: Longest sequence asked for; None means the model's.
        max_sequences: Most sequences that run at once.
        prefill_tokens: Most prompt tokens of one step.

    Raises:
        DoesNotFitError: Not even one sequence of 256 tokens fits.
        ValueError: An argument is out of range.
    """
    if min(max_sequences, prefill_tokens) < 1 or min(available_bytes, headroom_bytes) < 0:
        raise ValueError("max_sequences and prefill_tokens are at least 1, bytes at least 0")
    if context_tokens is not None and context_tokens < 1:
        raise ValueError("context_tokens is at least 1")
    step_tokens = max(prefill_tokens, max_sequences)
    longest = min(config.model.context_length, context_tokens or config.model.context_length)
    fixed_bytes = _fixed_bytes(config, headroom_bytes, step_tokens, max_sequences)
    token_bytes = _token_bytes(config, step_tokens, sequences=1)
    page = tokens_per_page(config)
    fitting = max(0, available_bytes - fixed_bytes) // token_bytes // page * page
    context = min(longest, fitting)
    minimal = min(longest, MINIMAL_CONTEXT_TOKENS)
    if context < minimal:
        needed_bytes = fixed_bytes + -(-minimal // page) * page * token_bytes
        raise DoesNotFitError(
            f"engine {config.name} needs {needed_bytes:,} bytes for one sequence of {minimal} tokens; "
            f"{available_bytes:,} bytes are available",
            needed_bytes=needed_bytes,
            available_bytes=available_bytes,
            hint="free memory on the device, lower its headroom, or build a smaller engine",
        )
    workspace = workspace_bytes(
        config, step_tokens=step_tokens, context_tokens=context, max_sequences=max_sequences
    )
    left_bytes = available_bytes - headroom_bytes - config.footprint.weights_bytes - workspace
    return MemoryPlan(
        available_bytes=available_bytes,
        weights_bytes=config.footprint.weights_bytes,
        workspace_bytes=workspace,
        headroom_bytes=headroom_bytes,
        kv_bytes=min(left_bytes, -(-context // page) * page * max_sequences * config.kv_bytes_per_token),
        kv_bytes_per_token=config.kv_bytes_per_token,
        context_tokens=context,
        max_sequences=max_sequences,
    )


def needed_bytes(
    config: EngineConfig,
    *,
    headroom_bytes: int,
    context_tokens: int,
    max_sequences: int = 1,
    prefill_tokens: int = PREFILL_TOKENS,
) -> int:
    """What `max_sequences` sequences take, headroom included, when all have `context_tokens` at once.

    With so many bytes `plan_memory` grants them a KV cache for all; with one less it does not promise that.
    """
    step_tokens, page = max(prefill_tokens, max_sequences), tokens_per_page(config)
    held_tokens = -(-context_tokens // page) * page
    fixed_bytes = _fixed_bytes(config, headroom_bytes, step_tokens, max_sequences)
    return fixed_bytes + held_tokens * _token_bytes(config, step_tokens, max_sequences)


def largest_context(
    config: EngineConfig,
    *,
    available_bytes: int,
    headroom_bytes: int,
    max_sequences: int = 1,
    prefill_tokens: int = PREFILL_TOKENS,
) -> int:
    """The longest context, tokens, that `max_sequences` sequences can all have at once; 0 if none.

    `plan_memory` promises a context to one sequence, and the others share what is left; this is for all.
    """
    step_tokens, page = max(prefill_tokens, max_sequences), tokens_per_page(config)
    left_bytes = available_bytes - _fixed_bytes(config, headroom_bytes, step_tokens, max_sequences)
    fitting = max(0, left_bytes) // _token_bytes(config, step_tokens, max_sequences) // page * page
    return min(config.model.context_length, fitting)


def _fixed_bytes(config: EngineConfig, headroom_bytes: int, step_tokens: int, max_sequences: int) -> int:
    """What is taken before the first token: weights, headroom, and a workspace without attention scores."""
    workspace = workspace_bytes(
        config, step_tokens=step_tokens, context_tokens=0, max_sequences=max_sequences
    )
    return config.footprint.weights_bytes + headroom_bytes + workspace


def _token_bytes(config: EngineConfig, step_tokens: int, sequences: int) -> int:
    """What one more token of context takes: its keys and values in each sequence, and a column of scores."""
    return sequences * config.kv_bytes_per_token + config.model.heads * step_tokens * _SCORE_BYTES


def tokens_per_page(config: EngineConfig) -> int:
    """Tokens that fill whole pages of the KV cache, which takes memory in pages, for each head apart."""
    return _PAGE_BYTES // math.gcd(_PAGE_BYTES, config.model.head_dim * config.kv_item_bytes)


def mem_available_bytes(root: Path = Path("/")) -> int:
    """The kernel's estimate of what can be had without swapping.

    Free memory alone leaves out the page cache.
    """
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
