"""Triton's Python backend runs this file: it answers with the engine beside it, one response per token.

Nothing of edgellm is needed here, only what requirements.txt names. The ONNX graph computes one step of up to
`max_batch_size` sequences; their KV caches lie in memory that it updates in place. A sequence joins between
two steps and leaves as soon as it ends, whenever the others do (continuous batching), so a short answer never
waits for a long one. `execute` returns once all its requests have begun: what waits, waits in Triton's own
queue, which has a bound (`default_queue_policy`).

The prompt is taken as it is: no chat template is applied.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

ENGINE = Path(__file__).resolve().parent / "engine"
DEFAULT_MAX_TOKENS = 128
# Tokens of a prompt in one step: bounds the memory of the step, and how long it holds up the other answers.
PREFILL_TOKENS = 128
MAX_TEXT_BYTES = 1 << 20
_UNLOADED = "the model is being unloaded"

Ids = list[int]


class RefusedError(Exception):
    """A request that cannot be answered; the message names the input."""


class TritonPythonModel:
    """What Triton calls: `initialize` once, `execute` with each batch of requests, `finalize` at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine; Triton marks the model as unavailable if this raises."""
        if args["model_instance_kind"] != "CPU":
            raise ValueError("this engine computes on the CPU: set `kind: KIND_CPU` in config.pbtxt")
        triton = json.loads(args["model_config"])
        parameters = {key: item["string_value"] for key, item in triton.get("parameters", {}).items()}
        self._config = json.loads((ENGINE / "engine.json").read_bytes())
        capacity = min(int(parameters["context_tokens"]), self._config["model"]["context_length"])
        graph = Graph(self._config, max(1, triton["max_batch_size"]), capacity, int(parameters["threads"]))
        self._capacity = capacity
        self._tokenizer = Tokenizer.from_file(str(ENGINE / self._config["files"]["tokenizer"]))
        self._batch = Batch(graph, frozenset(self._config["tokens"]["eos_ids"]))
        self._batch.start()

    def execute(self, requests: list[Any]) -> None:
        """Begins all requests; returns nothing, since responses go out as tokens come (decoupled)."""
        begun = []
        for request in requests:
            sender = request.get_response_sender()
            try:
                begun.append(self._sequence(request, sender))
            except RefusedError as error:
                fail(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        self._batch.submit(begun)

    def finalize(self) -> None:
        """Ends what still runs."""
        self._batch.close()

    def _sequence(self, request: Any, sender: Any) -> Sequence:
        prompt = self._prompt(request)
        room = self._capacity - len(prompt)
        if room < 1:
            raise RefusedError(f"the prompt has {len(prompt)} tokens; there is room for {self._capacity - 1}")
        max_tokens = scalar(request, "max_tokens", DEFAULT_MAX_TOKENS)
        if max_tokens < 1:
            raise RefusedError(f"max_tokens is {max_tokens}, less than 1")
        return Sequence(
            prompt,
            min(int(max_tokens), room),
            Sampler.of(request),
            Answer(self._tokenizer, sender),
        )

    def _prompt(self, request: Any) -> Ids:
        text, ids = (pb_utils.get_input_tensor_by_name(request, name) for name in ("text_input", "input_ids"))
        if (text is None) == (ids is None):
            raise RefusedError("give text_input or input_ids, and not both")
        found = self._encode(text) if ids is None else [int(i) for i in one_row("input_ids", ids)]
        if not found:
            raise RefusedError("the prompt is empty")
        vocabulary = self._config["model"]["vocab_size"]
        if not all(0 <= token < vocabulary for token in found):
            raise RefusedError(f"input_ids: a token is not one of 0 to {vocabulary - 1}")
        return found

    def _encode(self, tensor: Any) -> Ids:
        (raw,) = one_row("text_input", tensor) or [b""]
        data = raw if isinstance(raw, bytes) else str(raw).encode()
        if len(data) > MAX_TEXT_BYTES:
            raise RefusedError(f"text_input has {len(data)} bytes, more than {MAX_TEXT_BYTES}")
        try:
            found: Ids = self._tokenizer.encode(data.decode("utf-8"), add_special_tokens=False).ids
        except UnicodeDecodeError:
            raise RefusedError("text_input is not UTF-8") from None
        bos = self._config["tokens"]["bos_id"]
        return [bos, *found] if self._config["tokens"]["add_bos"] and found[:1] != [bos] else found


def one_row(name: str, tensor: Any) -> list[Any]:
    """The values of an input of one sequence: Triton makes batches itself, of requests of one each."""
    values = tensor.as_numpy()
    if values.ndim != 2 or values.shape[0] != 1:
        raise RefusedError(
            f"{name} has the shape {list(values.shape)}: send one sequence in a request, [1, N]"
        )
    return list(values[0])


def scalar(request: Any, name: str, default: float) -> float:
    """An optional input of one number."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return default
    (value,) = one_row(name, tensor) or [default]
    return float(value) if isinstance(value, np.floating) else int(value)


def fail(sender: Any, message: str, code: Any) -> None:
    """Ends an answer with an error."""
    error = pb_utils.TritonError(message, code)
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(pb_utils.InferenceResponse(error=error), flags=final)


class Sampler:
    """Chooses the next token; temperature 0 takes the likeliest one."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.default_rng(seed)

    @classmethod
    def of(cls, request: Any) -> Sampler:
        """From the inputs of a request."""
        temperature, top_p = scalar(request, "temperature", 0.0), scalar(request, "top_p", 1.0)
        seed = scalar(request, "seed", -1)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RefusedError(f"temperature is {temperature}, not a number of 0 or more")
        if not 0 < top_p <= 1:
            raise RefusedError(f"top_p is {top_p}, not above 0 and at most 1")
        return cls(temperature, top_p, int(seed) if seed >= 0 else None)

    def choose(self, logits: np.ndarray[Any, Any]) -> int:
        """The next token for the logits [vocab] of one sequence; raises FloatingPointError if one is NaN."""
        if not np.isfinite(logits).all():
            raise FloatingPointError("the engine computed logits that are not finite")
        if self._temperature == 0:
            return int(logits.argmax())
        # The largest is taken off first: so no temperature overflows.
        weights = np.exp((logits.astype(np.float64) - logits.max()) / max(self._temperature, 1e-6))
        order = np.argsort(-weights, kind="stable")
        sums = weights[order].cumsum()
        kept = int(np.searchsorted(sums, self._top_p * sums[-1])) + 1
        drawn = self._random.random() * sums[min(kept, len(sums)) - 1]
        return int(order[min(int(np.searchsorted(sums, drawn, side="right")), kept - 1)])


class Answer:
    """Sends tokens to one client, their text in whole characters."""

    def __init__(self, tokenizer: Tokenizer, sender: Any) -> None:
        self._tokenizer, self._sender = tokenizer, sender
        self._decoder = DecodeStream(skip_special_tokens=True)

    @property
    def cancelled(self) -> bool:
        """Whether the client wants no more."""
        return bool(self._sender.is_cancelled())

    def send(self, token: int, reason: str) -> None:
        """One token; a reason ("stop", "length") makes it the last one."""
        tensors = [
            pb_utils.Tensor("text_output", np.array([[self._text(token).encode()]], np.object_)),
            pb_utils.Tensor("token_id", np.array([[token]], np.int64)),
            pb_utils.Tensor("finish_reason", np.array([[reason.encode()]], np.object_)),
        ]
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if reason else 0
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)

    def give_up(self, message: str, code: Any) -> None:
        """Ends it with an error; what a client that is gone makes of that does not matter any more."""
        try:
            fail(self._sender, message, code)
        except Exception as error:  # noqa: BLE001 - Triton's sender raises several kinds
            pb_utils.Logger.log_warn(f"an answer could not be ended: {error}")

    def _text(self, token: int) -> str:
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the library raises nothing more exact
            # Bytes that make no character confuse it for good.
            self._decoder = DecodeStream(skip_special_tokens=True)
            return ""


@dataclass
class Sequence:
    """One request under way: what was asked, and what the cache holds of it."""

    prompt: Ids
    tokens_left: int
    sampler: Sampler
    answer: Answer
    cached: int = 0
    next_token: int = -1


class Graph:
    """The ONNX graph with the KV caches of `rows` sequences of up to `capacity` tokens."""

    def __init__(self, config: dict[str, Any], rows: int, capacity: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        path = str(ENGINE / config["files"]["graph"])
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        model = config["model"]
        dtype = {"float32": np.float32, "int8": np.int8}[config["precision"]["kv"]]
        # Zeros that nobody has written take no memory.
        self._caches = {
            f"kv_{kind}_{layer}": np.zeros((rows, model["kv_heads"], capacity, model["head_dim"]), dtype)
            for layer in range(model["layers"])
            for kind in ("key", "value")
        }
        self.rows, self.capacity = rows, capacity

    def step(self, first: int, tokens: list[Ids], past: list[int]) -> np.ndarray[Any, Any]:
        """Logits [rows, vocab] behind the tokens of rows `first` and following, all of one length."""
        rows, length = len(tokens), len(tokens[0])
        binding = self._session.io_binding()
        feeds = {
            "input_ids": np.array(tokens, np.int64),
            "past_len": np.array(past, np.int32),
            "query_len": np.full(rows, length, np.int32),
            "logit_index": np.arange(1, rows + 1, dtype=np.int64) * length - 1,
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        # Outputs come back in the order of their binding.
        binding.bind_output("logits")
        for name, cache in self._caches.items():
            # Input and output are the same memory: the graph appends to it in place.
            part = cache[first : first + rows]
            place = ("cpu", 0, part.dtype, part.shape, part.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(f"{name}_out", *place)
        self._session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[0].numpy())

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies what a row has cached to another one: rows of a step must lie side by side."""
        for cache in self._caches.values():
            cache[target, :, :tokens] = cache[source, :, :tokens]


class Batch(threading.Thread):
    """Computes all sequences that run, a step at a time, in a thread of its own."""

    def __init__(self, graph: Graph, eos_ids: frozenset[int]) -> None:
        super().__init__(name="edgellm-batch", daemon=True)
        self._graph, self._eos_ids = graph, eos_ids
        # By row of the caches; only this thread touches them.
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, sequences: list[Sequence]) -> None:
        """Returns once all of them have begun, or the model is being unloaded."""
        with self._changed:
            self._waiting.extend(sequences)
            self._changed.notify_all()
            # It ends, since each answer has a last token.
            self._changed.wait_for(lambda: self._closed or not self._waiting)
            if self._closed:
                self._refuse_waiting()

    def close(self) -> None:
        """Ends the thread, and what it computed with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.join()

    def run(self) -> None:
        """Until it is closed, or cannot go on; then nobody is left without an answer."""
        try:
            while not self._closed:
                for sequence in self._begin():
                    self._prefill(sequence)
                self._decode()
        finally:
            with self._changed:
                self._closed = True
                self._refuse_waiting()
                self._changed.notify_all()
            for sequence in self._running:
                sequence.answer.give_up(_UNLOADED, pb_utils.TritonError.UNAVAILABLE)

    def _begin(self) -> list[Sequence]:
        """Those for whom there is a row now; waits while there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
            room = 0 if self._closed else self._graph.rows - len(self._running)
            begun = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._changed.notify_all()
            return begun

    def _prefill(self, sequence: Sequence) -> None:
        """Computes a prompt in the next free row, and its first token."""
        row, logits = len(self._running), None
        try:
            for start in range(0, len(sequence.prompt), PREFILL_TOKENS):
                if sequence.answer.cancelled:
                    break
                chunk = sequence.prompt[start : start + PREFILL_TOKENS]
                logits = self._graph.step(row, [chunk], [start])
        except Exception as error:  # noqa: BLE001 - ONNX Runtime raises several kinds; the others go on
            sequence.answer.give_up(f"the prompt failed: {error}", pb_utils.TritonError.INTERNAL)
            return
        sequence.cached = len(sequence.prompt)
        if self._advance(sequence, None if logits is None else logits[0]):
            self._running.append(sequence)

    def _decode(self) -> None:
        """One more token of every sequence that runs."""
        running = self._running
        if not running:
            return
        try:
            logits = self._graph.step(0, [[s.next_token] for s in running], [s.cached for s in running])
        except Exception as error:  # noqa: BLE001 - as above
            for sequence in running:
                sequence.answer.give_up(f"a step failed: {error}", pb_utils.TritonError.INTERNAL)
            running.clear()
            return
        for sequence in running:
            sequence.cached += 1
        ended = [row for row, sequence in enumerate(running) if not self._advance(sequence, logits[row])]
        for row in reversed(ended):
            self._leave(row)

    def _advance(self, sequence: Sequence, logits: np.ndarray[Any, Any] | None) -> bool:
        """Chooses and sends the next token; whether the sequence goes on."""
        answer = sequence.answer
        try:
            if logits is None or answer.cancelled:
                answer.give_up("the client cancelled the request", pb_utils.TritonError.CANCELLED)
                return False
            token = sequence.sampler.choose(logits)
            sequence.tokens_left -= 1
            reason = "stop" if token in self._eos_ids else "" if sequence.tokens_left else "length"
            answer.send(token, reason)
        except Exception as error:  # noqa: BLE001 - one client must not end the answers of the others
            answer.give_up(str(error), pb_utils.TritonError.INTERNAL)
            return False
        sequence.next_token = token
        return not reason

    def _leave(self, row: int) -> None:
        """Frees a row; the last one takes its place."""
        last = self._running.pop()
        if row < len(self._running):
            self._graph.move(len(self._running), row, last.cached)
            self._running[row] = last

    def _refuse_waiting(self) -> None:
        while self._waiting:
            self._waiting.popleft().answer.give_up(_UNLOADED, pb_utils.TritonError.UNAVAILABLE)
