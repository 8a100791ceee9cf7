"""A real runner over slots in buckets, against the same over pages."""

import numpy as np
import pytest

from edgellm_agent.runtimes.base import LoadPlan, Row, StepBatch
from edgellm_agent.runtimes.onnxruntime import OnnxRuntimeRunner
from edgellm_agent.worker.kv.base import KvGeometry
from edgellm_agent.worker.kv.buckets import Bucket, HostAllocator, SlotBucketKvMemory
from edgellm_agent.worker.kv.paged import PagedKvMemory
from tests.conftest import make_bundle

PROMPTS = ([5, 40, 41, 42, 43], [5, 60, 61, 62, 63], [5, 90, 91, 92, 93])
CONTEXT = 128


class Decoder:
    """Greedy decoding of sequences that share a step where their memory lets them."""

    def __init__(self, memory, plan):
        self.memory = memory
        self.runner = OnnxRuntimeRunner()
        self.runner.load(plan)
        self.texts = {}
        self.logits = {}
        self.groups = []

    def begin(self, prompt):
        handle = self.memory.allocate(len(prompt))
        self.texts[handle], self.logits[handle] = list(prompt), []
        place = self.memory.place(handle)
        self.step([handle], [Row(place.slot, prompt, 0, (len(prompt) - 1,))], place.space)
        return handle

    def continue_with(self, handles):
        for handle in handles:
            tokens = len(self.texts[handle])
            assert self.memory.extend(handle, tokens - 1, tokens)
        for group in self.memory.arrange(handles):
            places = [self.memory.place(handle) for handle in group]
            rows = [
                Row(place.slot, self.texts[h][-1:], len(self.texts[h]) - 1, (0,))
                for h, place in zip(group, places, strict=True)
            ]
            self.step(group, rows, places[0].space)

    def step(self, handles, rows, space):
        for handle, logits in zip(handles, self.runner.step(StepBatch(tuple(rows), space)), strict=True):
            self.texts[handle].append(int(logits.argmax()))
            self.logits[handle].append(logits.copy())
        self.groups.append((space, len(rows)))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny engine whose embeddings are not tied to its head: one with tied ones repeats the last token."""
    directory = tmp_path_factory.mktemp("untied")
    bundle = make_bundle(directory / "bundle", name="untied", seed=3, shape={"tied": False})
    manifest = bundle.variants[0].manifest
    for layer in manifest.layers:
        (directory / layer.title).hardlink_to(bundle.blob_path(layer.descriptor.digest))
    return directory, bundle.config(manifest)


@pytest.fixture
def new_decoder(engine):
    directory, config = engine
    model = config.model
    geometry = KvGeometry(model.layers, model.kv_heads, model.head_dim, config.kv_item_bytes)
    made = []

    def new(buckets=None):
        memory = (
            SlotBucketKvMemory(geometry, buckets, HostAllocator())
            if buckets
            else PagedKvMemory(geometry, slots=4, context_tokens=CONTEXT)
        )
        made.append(Decoder(memory, LoadPlan(directory, config, memory.spaces, threads=1)))
        return made[-1]

    yield new
    for decoder in made:
        decoder.runner.close()
        decoder.memory.close()


def same_answers(one, other, handles):
    return all(
        one.texts[h] == other.texts[h]
        and all(np.array_equal(a, b) for a, b in zip(one.logits[h], other.logits[h], strict=True))
        for h in handles
    )


def test_sequences_that_climb_by_turns_get_the_same_tokens_as_in_pages(new_decoder):
    climbing = new_decoder([Bucket(8, 2), Bucket(24, 2), Bucket(CONTEXT, 2)])
    paged = new_decoder()
    for decoder in (climbing, paged):
        first, second = decoder.begin(PROMPTS[0]), decoder.begin(PROMPTS[1])
        for _ in range(60):
            decoder.continue_with([first])
            decoder.continue_with([second])
    assert {space for space, _ in climbing.groups} == {0, 1, 2}
    assert len(set(climbing.texts[first])) > 30, "a text that depends on what was before"
    assert same_answers(climbing, paged, [first, second])


def test_a_batch_that_climbs_together_past_another_gets_the_same_tokens_as_in_pages(new_decoder):
    climbing = new_decoder([Bucket(8, 3), Bucket(24, 3), Bucket(CONTEXT, 3)])
    paged = new_decoder()
    for decoder in (climbing, paged):
        first, between, last = (decoder.begin(prompt) for prompt in PROMPTS)
        for _ in range(40):
            decoder.continue_with([first, last])
            decoder.continue_with([between])
    # The prompts alone, then a step for two and a step for one, wherever they are.
    assert [rows for _, rows in climbing.groups] == [1, 1, 1] + 40 * [2, 1]
    assert {space for space, _ in climbing.groups} == {0, 1, 2}
    assert same_answers(climbing, paged, [first, between, last])


def test_rows_in_several_spaces_take_a_step_each_and_keep_their_texts(new_decoder):
    climbing = new_decoder([Bucket(8, 2), Bucket(24, 2), Bucket(CONTEXT, 2)])
    alone = new_decoder()
    ahead = climbing.begin(PROMPTS[0])
    for _ in range(30):
        climbing.continue_with([ahead])
    behind = climbing.begin(PROMPTS[1])
    climbing.continue_with([behind, ahead])
    assert climbing.groups[-2:] == [(0, 1), (2, 1)]
    for prompt, steps in ((PROMPTS[0], 31), (PROMPTS[1], 1)):
        handle = alone.begin(prompt)
        for _ in range(steps):
            alone.continue_with([handle])
    assert same_answers(climbing, alone, [ahead, behind])
