"""The worker's loop with everything real but the model, the text, the channel and the clock."""

from edgellm.v1 import device_pb2, worker_pb2
from edgellm_agent.worker.kv.buckets import HostAllocator, SlotBucketKvMemory
from edgellm_agent.worker.kv.paged import PagedKvMemory
from edgellm_agent.worker.kv.pool import KvPool
from edgellm_agent.worker.loop import EngineLoop, LoadedEngine
from edgellm_agent.worker.prefill import PrefillBudget
from edgellm_agent.worker.scheduler import Limits, Scheduler
from edgellm_agent.worker.speculation import StepTimes
from edgellm_agent.worker.stepper import Stepper
from edgellm_agent.worker.waiting import WaitingQueue
from tests.unit.agent import sequences
from tests.unit.agent.hash_model import GEOMETRY, HashRunner, alone

PAGE_TOKENS = 16
CONTEXT = 12 * PAGE_TOKENS
PAGE_BYTES = PAGE_TOKENS * GEOMETRY.bytes_per_token
SEQUENCES = 4
PAGES = 24
PLAN = device_pb2.MemoryPlan(kv_bytes=PAGES * PAGE_BYTES, max_sequences=SEQUENCES, context_tokens=CONTEXT)


class Channel:
    """What the agent sends and gets."""

    def __init__(self):
        self.inbox = []
        self.sent = []
        self.runnable = bool

    def receive(self, timeout_s, wake_fd=None):
        assert timeout_s == 0 or self.inbox or not self.runnable(), "sleeps with work left"
        taken, self.inbox = self.inbox, []
        return taken

    def send(self, message):
        self.sent.append(message)


class Intake:
    """Prepares at once."""

    wake_fd = -1

    def __init__(self):
        self._ready = []
        self.requests = {}
        self.pending = 0

    def submit(self, submit, arrived):
        self._ready.append((submit, self.requests[submit.id]))

    def take(self):
        taken, self._ready = self._ready, []
        return taken

    def cancel(self, request_id):
        return False

    def expired(self, now):
        return []

    def next_deadline(self):
        return None


class Clock:
    """A step takes 3 ms, and half a millisecond for each of its tokens."""

    def __init__(self):
        self.now = 1.0
        self.runner = None

    def __call__(self):
        steps, tokens = (self.runner.steps, self.runner.tokens) if self.runner else (0, 0)
        return self.now + 0.003 * steps + 0.0005 * tokens


class Engine:
    """A loop and its agent's end."""

    def __init__(self, *, several=False, max_waiting=16, speculate=True, pages=PAGES, buckets=()):
        self.clock = Clock()
        if buckets:
            memory = SlotBucketKvMemory(GEOMETRY, buckets, HostAllocator())
        else:
            memory = PagedKvMemory(GEOMETRY, 2 * SEQUENCES, CONTEXT)
        self.pool = KvPool(memory, pages * PAGE_BYTES)
        self.runner = self.clock.runner = HashRunner(memory.spaces, several_multi_token_rows=several)
        budget, times = PrefillBudget(0.03, 128), StepTimes()
        limits = Limits(SEQUENCES, speculate=speculate, several_multi_token_rows=several)
        self.scheduler = Scheduler(self.pool, WaitingQueue(max_waiting), budget, times, limits)
        self.channel, self.intake = Channel(), Intake()
        stepper = Stepper(self.runner, self.pool, budget, {}, times, self.clock)
        self.loop = EngineLoop(
            LoadedEngine(PLAN, self.intake, self.scheduler, stepper), self.channel, self.clock
        )
        self.channel.runnable = self.runnable
        self.next_id = 0
        self.granted = {}
        self.prompts = {}
        self.answers = {}
        self.ended = {}

    def submit(self, tokens, max_tokens, *, credit=10_000, client="", deadline=None):
        self.next_id += 1
        self.prompts[self.next_id] = (list(tokens), max_tokens)
        self.answers[self.next_id] = []
        self.granted[self.next_id] = credit
        self.intake.requests[self.next_id] = sequences.make(
            self.next_id,
            tokens=tokens,
            max_tokens=max_tokens,
            credit=credit,
            client=client,
            deadline=deadline,
            arrived=self.clock(),
        )
        self.channel.inbox.append(worker_pb2.ToWorker(submit=worker_pb2.Submit(id=self.next_id)))
        return self.next_id

    def runnable(self):
        """Whether something runs whose reader waits for it."""
        return any(s.credit > 0 for s in self.scheduler._running.values())

    def read(self, request, tokens):
        self.granted[request] += tokens
        self.send(credit=worker_pb2.Credit(id=request, tokens=tokens))

    def send(self, **message):
        self.channel.inbox.append(worker_pb2.ToWorker(**message))

    def turn(self):
        self.loop.turn()
        for message in self.channel.sent:
            for delta in message.step.deltas:
                assert delta.id not in self.ended
                self.answers[delta.id].extend(delta.token_ids)
            if message.HasField("ended"):
                assert message.ended.id not in self.ended, "ended twice"
                self.ended[message.ended.id] = message.ended
        self.channel.sent.clear()

    def finish(self, turns=5000, but=None):
        for _ in range(turns):
            if {*self.prompts} - {*self.ended, but} == set():
                return
            self.turn()
        raise AssertionError(f"{self.next_id - len(self.ended)} requests never ended")

    def reason(self, request):
        return worker_pb2.FailureKind.Name(self.ended[request].failure.kind).removeprefix("FAILURE_KIND_")

    def check(self, request):
        prompt, max_tokens = self.prompts[request]
        answer = self.answers[request]
        assert answer == alone(prompt, max_tokens)[: len(answer)]
        assert len(answer) <= self.granted[request]
        if request in self.ended and self.ended[request].HasField("finished"):
            usage = self.ended[request].finished.usage
            assert len(answer) == max_tokens == usage.completion_tokens
            assert usage.prompt_tokens == len(prompt)
            assert usage.accepted_draft_tokens <= usage.draft_tokens
