"""llama.cpp through its batch API, with as many threads as cores and everything else as it comes.

Flash attention and repacked weights are then on where llama.cpp finds them of use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import llama_cpp as api  # type: ignore[import-not-found, unused-ignore]

from benchmarks.graph_model import CONTEXT_TOKENS, MAX_STREAMS, Logits
from benchmarks.machine import usable_cores

_BATCH_TOKENS = 512


@api.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
def _silent(_level: int, _text: bytes, _user_data: ctypes.c_void_p) -> None:
    """Its log says every tensor; errors come as return values too."""


def start_backend() -> None:
    """Once a process, before anything else of llama.cpp."""
    api.llama_log_set(_silent, ctypes.c_void_p(0))
    api.llama_backend_init()


class LlamaGraph:
    """A GraphModel."""

    def __init__(self, path: Path) -> None:
        """Loads a GGUF file; raises RuntimeError if llama.cpp refuses it."""
        self.name = f"llama.cpp {path.stem}"
        self.step_bytes = _step_bytes(path)
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = MAX_STREAMS * CONTEXT_TOKENS
        params.n_seq_max = MAX_STREAMS
        params.n_batch = params.n_ubatch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = usable_cores()
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(_BATCH_TOKENS, 0, MAX_STREAMS)

    def prefill(self, stream: int, tokens: Sequence[int], past_len: int, *, every: bool = False) -> Logits:
        """One batch of one sequence."""
        last = len(tokens) - 1
        return self._run((token, past_len + i, stream, every or i == last) for i, token in enumerate(tokens))

    def decode(self, tokens: Sequence[int], past_len: int) -> Logits:
        """One batch with one token of each sequence."""
        return self._run((token, past_len, stream, True) for stream, token in enumerate(tokens))

    def clear(self) -> None:
        """Forgets the sequences; the cache's memory stays."""
        api.llama_memory_clear(api.llama_get_memory(self._context), False)

    def close(self) -> None:
        """Frees batch, context and model."""
        api.llama_batch_free(self._batch)
        api.llama_free(self._context)
        api.llama_model_free(self._model)

    def _run(self, entries: Iterable[tuple[int, int, int, bool]]) -> Logits:
        batch, count, wanted = self._batch, 0, 0
        for token, position, stream, logits in entries:
            batch.token[count] = token
            batch.pos[count] = position
            batch.n_seq_id[count] = 1
            batch.seq_id[count][0] = stream
            batch.logits[count] = logits
            count, wanted = count + 1, wanted + logits
        batch.n_tokens = count
        if status := api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        # Waits for the computation; the array is the context's own memory.
        return np.ctypeslib.as_array(api.llama_get_logits(self._context), (wanted, self._vocab_size))


def _step_bytes(path: Path) -> int:
    """All tensors; the embedding table counts only where it is the head too."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
