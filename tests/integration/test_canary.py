"""A canary that the build host recorded, on a real worker: right engines pass, and wrong ones do not."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager

import numpy as np
import onnx
import pytest

from edgellm.bundle import Bundle, BundleWriter
from edgellm.memory import plan_memory
from edgellm_agent.engine.canary import try_engine
from edgellm_agent.engine.supervisor import EngineSpec, Serving, SupervisedEngine
from edgellm_agent.errors import EngineError


@asynccontextmanager
async def running(bundle, directory, serving=None, **files):
    """An engine of the bundle's and its config, some of whose files are others."""
    (variant,) = bundle.variants
    for layer in variant.manifest.layers:
        (directory / layer.title).hardlink_to(bundle.blob_path(layer.digest))
    config = variant.config.model_copy(update={"files": variant.config.files.model_copy(update=files)})
    plan = plan_memory(config, available_bytes=2 << 30, headroom_bytes=1 << 20)
    spec = EngineSpec(variant.digest, directory, config, serving or Serving(threads=1))
    engine = SupervisedEngine(spec, lambda: plan)
    await engine.start()
    try:
        yield engine, config
    finally:
        await engine.close()


def repacked(bundle, directory, damage):
    """The same engine with the same canary, but for what `damage` does to its files: all digests fit."""
    (variant,) = bundle.variants
    files = directory / "files"
    files.mkdir(parents=True)
    for layer in variant.manifest.layers:
        shutil.copy(bundle.blob_path(layer.digest), files / layer.title)
    damage(files)
    with BundleWriter(directory / "damaged.bundle") as writer:
        writer.add(files, variant.config)
    damaged = Bundle.open(directory / "damaged.bundle")
    damaged.verify()
    return damaged


def scale(part, factor):
    """Multiplies the scales of all weights whose name has `part`, in the shards."""

    def damage(files):
        graph = onnx.load(files / "model.onnx", load_external_data=False).graph
        scaled = 0
        for item in graph.initializer:
            place = {entry.key: entry.value for entry in item.external_data}
            if not place or part not in item.name or not item.name.endswith("scales"):
                continue
            count = int(place["length"]) // 4
            shard = np.memmap(files / place["location"], np.float32, "r+", int(place["offset"]), (count,))
            shard *= factor
            shard.flush()
            scaled += 1
        assert scaled

    return damage


@pytest.mark.parametrize("threads", [1, 2])
async def test_an_engine_passes_its_own_canary_with_any_number_of_threads(small, tmp_path, threads):
    async with running(small, tmp_path, Serving(threads=threads)) as (engine, config):
        assert len(config.canary.token_ids) > 4
        await try_engine(engine, config)


async def test_the_portable_graph_and_single_steps_pass_too(small, tmp_path):
    serving = Serving(threads=1, speculate=False, prefill_tokens=1)
    async with running(small, tmp_path, serving, graph_ragged=None) as (engine, config):
        await try_engine(engine, config)


@pytest.mark.parametrize("part", ["", "down", "embedding"])
async def test_an_engine_whose_scales_were_doubled_is_refused_although_its_digests_fit(small, tmp_path, part):
    damaged = repacked(small, tmp_path / "damaged", scale(part, 2.0))
    async with running(damaged, tmp_path) as (engine, config):
        with pytest.raises(EngineError, match=r"at step \d+ of its canary"):
            await try_engine(engine, config)


async def test_weights_of_another_model_are_refused(tiny, other_tiny, tmp_path):
    async with running(other_tiny, tmp_path) as (engine, _):
        with pytest.raises(EngineError, match="canary"):
            await try_engine(engine, tiny.variants[0].config)
