from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from edgellm_agent.worker.kv_memory import KvGeometry, KvMemory
from edgellm_agent.worker.kv_pool import KvPool
from tests.unit.agent.test_kv_memory import slot_view

GEOMETRY = KvGeometry(layers=1, kv_heads=1, head_dim=64, item_bytes=4)
SLOTS = 5
BOUND = GEOMETRY.bytes_for(16 * 12)


class PoolMachine(RuleBasedStateMachine):
    """Whatever is done to it: content stays with its sequence, and promises within the bound."""

    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.memory = KvMemory(GEOMETRY, SLOTS, 16 * 12)
        self.pool = KvPool(self.memory, BOUND)
        self.promised: dict[int, int] = {}
        self.held: dict[int, int] = {}
        self.next_id = 0

    def teardown(self):
        self.pool.close()

    @rule(target=sequences, tokens=st.integers(1, 16 * 12))
    def attach(self, tokens):
        self.next_id += 1
        promised = sum(GEOMETRY.bytes_for(t) for t in self.promised.values())
        fits = promised + GEOMETRY.bytes_for(tokens) <= BOUND and len(self.promised) < SLOTS - 1
        assert self.pool.can_attach(tokens) == fits
        if not fits:
            return 0
        self.pool.attach(self.next_id, tokens)
        self.promised[self.next_id] = tokens
        self.held[self.next_id] = 0
        return self.next_id

    @rule(sequence=sequences, share=st.floats(0, 1))
    def grow(self, sequence, share):
        if sequence not in self.promised:
            return
        tokens = max(self.held[sequence], int(self.promised[sequence] * share))
        slot_view(self.memory.keys[0], self.pool.slot(sequence))[:, :tokens] = sequence
        self.pool.grow(sequence, tokens)
        self.held[sequence] = tokens

    @rule(sequence=consumes(sequences))
    def release(self, sequence):
        if sequence in self.promised:
            assert self.pool.release(sequence) == GEOMETRY.bytes_for(self.held.pop(sequence))
            del self.promised[sequence]

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def arrange(self, data):
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.promised)), unique=True))
        order = self.pool.arrange(wanted)
        assert sorted(order) == sorted(wanted)
        assert [self.pool.slot(s) for s in order] == list(range(len(wanted)))

    @invariant()
    def content_follows_its_sequence(self):
        slots = [self.pool.slot(s) for s in self.promised]
        assert len(set(slots)) == len(slots)
        for sequence, tokens in self.held.items():
            view = slot_view(self.memory.keys[0], self.pool.slot(sequence))
            assert (view[:, :tokens] == sequence).all()
            assert not view[:, tokens:].any()

    @invariant()
    def the_books_agree_with_the_model(self):
        stats = self.pool.stats()
        assert stats.used_bytes == sum(GEOMETRY.bytes_for(t) for t in self.held.values())
        assert stats.promised_bytes == sum(GEOMETRY.bytes_for(t) for t in self.promised.values())
        assert stats.used_bytes <= stats.promised_bytes <= stats.bound_bytes


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
