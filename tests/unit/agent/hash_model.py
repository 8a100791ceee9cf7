"""A model for tests that notices every mistake: what it says next depends on all tokens before, as it finds
them in the KV cache.

Each position of the cache holds a hash of the text up to there. A step continues from the hash at `past_len`,
so a row in a wrong slot, a wrong prefix, a lost or a doubled token changes the answer.
"""

import ctypes

import numpy as np

from edgellm_agent.runtimes.base import Capabilities
from edgellm_agent.worker.kv.base import KvGeometry

VOCAB = 61
GEOMETRY = KvGeometry(layers=1, kv_heads=1, head_dim=64, item_bytes=4)


def follow(state, token):
    return (state * 1_103_515_245 + (token + 1) * 2_654_435_761 + 12_345) % (1 << 32)


def likeliest(state, token):
    """Often a function of the last token alone, so that texts repeat themselves and guesses come true."""
    return (token * 7 + 3) % VOCAB if (state >> 7) % 8 else (state >> 3) % VOCAB


def logits_of(state, token):
    noise = (np.arange(VOCAB, dtype=np.uint64) * 2_654_435_761 + state) % 1009
    row = noise.astype(np.float32) / 1009
    row[likeliest(state, token)] += 3
    return row


def alone(tokens, count):
    """The greedy answer to a prompt."""
    state, answer = 0, []
    for token in tokens:
        state = follow(state, token)
    last = tokens[-1]
    for _ in range(count):
        last = likeliest(state, last)
        answer.append(last)
        state = follow(state, last)
    return answer


class HashRunner:
    """A ModelRunner. It counts what it is asked for; nothing that it must refuse gets through."""

    def __init__(self, spaces, *, several_multi_token_rows):
        self._spaces = spaces
        self._several = several_multi_token_rows
        self.steps = 0
        self.tokens = 0

    def capabilities(self):
        return Capabilities(several_multi_token_rows=self._several)

    def step(self, batch):
        slots = [row.slot for row in batch.rows]
        assert slots == list(range(slots[0], slots[0] + len(slots)))
        assert self._several or len(batch.rows) == 1 or all(len(row.tokens) == 1 for row in batch.rows)
        self.steps += 1
        logits = []
        for row in batch.rows:
            held = self._states(batch.space, row.slot)
            state = int(held[row.past_len - 1]) if row.past_len else 0
            self.tokens += len(row.tokens)
            for i, token in enumerate(row.tokens):
                state = follow(state, token)
                held[row.past_len + i] = state
                if i in row.logit_positions:
                    logits.append(logits_of(state, token))
        return np.array(logits, np.float32).reshape(-1, VOCAB)

    def _states(self, space, slot):
        tensor = self._spaces[space].keys[0]
        count = tensor.slot_stride_bytes // 4
        raw = (ctypes.c_uint32 * count).from_address(tensor.address + slot * tensor.slot_stride_bytes)
        return np.ctypeslib.as_array(raw).reshape(tensor.shape[2:])[:, 0]
