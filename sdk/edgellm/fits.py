"""Whether a model fits on a board, before it is built: pure functions of integers."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.bundle.config import EngineConfig
from edgellm.memory import (
    MINIMAL_CONTEXT_TOKENS,
    PREFILL_TOKENS,
    largest_context,
    mem_available_bytes,
    needed_bytes,
    tokens_per_page,
    workspace_bytes,
)
from edgellm.profiles import DeviceProfile, load_profile, profile_names


@dataclass(frozen=True)
class Board:
    """What there is to divide: a kind of board, or a device that was asked.

    `bandwidth_gb_per_s` is the datasheet's, in the fastest power mode; None where it is unknown.
    """

    name: str
    available_bytes: int
    headroom_bytes: int
    bandwidth_gb_per_s: float | None = None

    @classmethod
    def of(cls, profile: DeviceProfile) -> Board:
        """A board of that kind after a fresh boot; a profile without a limit stands for this machine."""
        bandwidths = (profile.bandwidth_gb_per_s, profile.bandwidth_super_gb_per_s)
        return cls(
            name=profile.name,
            available_bytes=profile.usable_bytes or mem_available_bytes(),
            headroom_bytes=profile.headroom_bytes,
            bandwidth_gb_per_s=max((figure for figure in bandwidths if figure is not None), default=None),
        )


@dataclass(frozen=True)
class Estimate:
    """An engine that could be built: how it would be quantized, and the config that its build would write."""

    quantization: str
    config: EngineConfig

    @property
    def label(self) -> str:
        """The precision in a few words, as in `int4` or `int4 KV int8`."""
        return _label(self.quantization, self.config.precision.kv)


@dataclass(frozen=True)
class Fit:
    """How an engine would divide a board's memory among `max_sequences` sequences of `context_tokens`.

    Weights, workspace, headroom and KV cache make `needed_bytes`. `largest_context_tokens` is the longest
    context that so many sequences can have at once. `decode_bound_tokens_per_s` is for one sequence.
    """

    board: str
    engine: str
    quantization: str
    kv: str
    fits: bool
    context_tokens: int
    max_sequences: int
    largest_context_tokens: int
    available_bytes: int
    needed_bytes: int
    weights_bytes: int
    workspace_bytes: int
    headroom_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    decode_bound_tokens_per_s: float | None

    @property
    def label(self) -> str:
        """The precision in a few words, as an `Estimate` has it."""
        return _label(self.quantization, self.kv)


def fit(board: Board, estimate: Estimate, context_tokens: int | None = None, max_sequences: int = 1) -> Fit:
    """How the engine fits on the board.

    Without `context_tokens` the context is the longest that there is room for, and at least the shortest that
    a device accepts. The model's own limit holds in any case.
    """
    config = estimate.config
    largest = largest_context(
        config,
        available_bytes=board.available_bytes,
        headroom_bytes=board.headroom_bytes,
        max_sequences=max_sequences,
    )
    wanted = context_tokens or max(largest, MINIMAL_CONTEXT_TOKENS)
    context = min(config.model.context_length, wanted)
    page = tokens_per_page(config)
    held_tokens = -(-context // page) * page
    return Fit(
        board=board.name,
        engine=config.name,
        quantization=estimate.quantization,
        kv=config.precision.kv,
        fits=largest >= context,
        context_tokens=context,
        max_sequences=max_sequences,
        largest_context_tokens=largest,
        available_bytes=board.available_bytes,
        needed_bytes=needed_bytes(
            config,
            headroom_bytes=board.headroom_bytes,
            context_tokens=context,
            max_sequences=max_sequences,
        ),
        weights_bytes=config.footprint.weights_bytes,
        workspace_bytes=workspace_bytes(
            config,
            step_tokens=max(PREFILL_TOKENS, max_sequences),
            context_tokens=held_tokens,
            max_sequences=max_sequences,
        ),
        headroom_bytes=board.headroom_bytes,
        kv_bytes=held_tokens * max_sequences * config.kv_bytes_per_token,
        kv_bytes_per_token=config.kv_bytes_per_token,
        decode_bound_tokens_per_s=_decode_bound(board, config),
    )


def known_boards() -> list[Board]:
    """Every kind of board that has a memory limit, the smallest first."""
    profiles = (load_profile(name) for name in profile_names())
    boards = [Board.of(profile) for profile in profiles if profile.usable_bytes is not None]
    return sorted(boards, key=lambda board: (board.available_bytes, board.name))


def _label(quantization: str, kv: str) -> str:
    return quantization if kv == "float32" else f"{quantization} KV {kv}"


def _decode_bound(board: Board, config: EngineConfig) -> float | None:
    """Tokens per second if memory did nothing but hand out the weights, which each token reads once."""
    if board.bandwidth_gb_per_s is None:
        return None
    return round(board.bandwidth_gb_per_s * 1e9 / config.footprint.weights_bytes, 1)
