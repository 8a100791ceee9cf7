"""The `config.pbtxt` of an engine in Triton: pure text.

Fields and their meaning: Triton's user guide, "Model Configuration", "Batchers" and "Decoupled Backends and
Models". The format is protobuf's text format (https://protobuf.dev/reference/protobuf/textformat-spec/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.errors import EdgellmError


@dataclass(frozen=True)
class ServingOptions:
    """How Triton serves the model; one file says it for all versions.

    Raises EdgellmError for what Triton would refuse, or what would have no bound.
    """

    max_batch: int = 4
    """Sequences that one instance computes at once, and the most requests that Triton hands over together."""
    preferred_batches: tuple[int, ...] = ()
    """Sizes that the dynamic batcher sends at once, without waiting for the delay."""
    queue_delay_us: int = 0
    """How long the dynamic batcher may hold a request back so that others join it, microseconds."""
    queue_size: int = 64
    """Requests that may wait for an instance; one more is refused."""
    instances: int = 1
    """Each holds its own copy of the weights and of the KV cache."""
    threads: int = 0
    """CPU threads of one instance; 0: one per core."""
    context_tokens: int = 2048
    """Prompt and answer together; the KV cache of an instance holds `max_batch` times as many."""

    def __post_init__(self) -> None:
        """Checks ranges, and that the preferred sizes can happen."""
        ranges = {
            "max_batch": (1, 1024),
            "queue_delay_us": (0, 60_000_000),
            "queue_size": (1, 1_000_000),
            "instances": (1, 64),
            "threads": (0, 1024),
            "context_tokens": (2, 1 << 24),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise EdgellmError(
                    f"{name} is {getattr(self, name)}, not one of {least} to {most:,}", f"give another {name}"
                )
        if not all(1 <= size <= self.max_batch for size in self.preferred_batches):
            raise EdgellmError(
                f"the preferred batch sizes {list(self.preferred_batches)} are not all within max_batch "
                f"{self.max_batch}",
                "prefer smaller batches, or raise the maximum",
            )


def config_pbtxt(model: str, options: ServingOptions) -> str:
    """The configuration of a decoupled model of Triton's Python backend.

    `model` is the name of the model's directory; Triton insists that both agree.
    """
    parameters = {"threads": options.threads, "context_tokens": options.context_tokens}
    parts = [
        f"name: {_quoted(model)}",
        'backend: "python"',
        f"max_batch_size: {options.max_batch}",
        "# One response per token: over gRPC streaming, or HTTP's generate_stream.",
        "model_transaction_policy { decoupled: true }",
        *(_tensor("input", *tensor) for tensor in _INPUTS),
        *(_tensor("output", *tensor) for tensor in _OUTPUTS),
        _dynamic_batching(options),
        f"instance_group [ {{ count: {options.instances} kind: KIND_CPU }} ]",
        "version_policy { latest { num_versions: 1 } }",
        *(_parameter(key, str(value)) for key, value in parameters.items()),
    ]
    return "\n".join(parts) + "\n"


# Name, type, shape of one sequence, and what is special. A request has `text_input` or `input_ids`.
_INPUTS = (
    ("text_input", "TYPE_STRING", "1", ("optional: true",)),
    # Ragged: requests with prompts of different lengths may be handed over together.
    ("input_ids", "TYPE_INT64", "-1", ("optional: true", "allow_ragged_batch: true")),
    ("max_tokens", "TYPE_INT32", "1", ("optional: true",)),
    ("temperature", "TYPE_FP32", "1", ("optional: true",)),
    ("top_p", "TYPE_FP32", "1", ("optional: true",)),
    ("seed", "TYPE_INT64", "1", ("optional: true",)),
)
_OUTPUTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("text_output", "TYPE_STRING", "1", ()),
    ("token_id", "TYPE_INT64", "1", ()),
    ("finish_reason", "TYPE_STRING", "1", ()),
)


def _tensor(kind: str, name: str, data_type: str, dims: str, more: Sequence[str]) -> str:
    fields = " ".join((f"name: {_quoted(name)}", f"data_type: {data_type}", f"dims: [ {dims} ]", *more))
    return f"{kind} [ {{ {fields} }} ]"


def _dynamic_batching(options: ServingOptions) -> str:
    preferred = ", ".join(str(size) for size in sorted(set(options.preferred_batches)))
    lines = [
        *([f"  preferred_batch_size: [ {preferred} ]"] if preferred else []),
        f"  max_queue_delay_microseconds: {options.queue_delay_us}",
        f"  default_queue_policy {{ max_queue_size: {options.queue_size} }}",
    ]
    return "\n".join(("dynamic_batching {", *lines, "}"))


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    """A string of the text format; other characters than these never come here, see `EngineConfig.name`."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
