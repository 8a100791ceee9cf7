"""Fixtures that many tests share: tiny engines, and agents that run them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from edgellm.bundle import Bundle, BundleWriter, EngineConfig
from edgellm_buildhost.build import build_engine
from edgellm_buildhost.checkpoint import open_checkpoint
from edgellm_buildhost.recipe import QuantName
from tests.support.agents import Agent, running_agent
from tests.support.tiny_models import make_tiny_hf


def make_bundle(
    directory: Path,
    *,
    name: str = "tiny",
    seed: int = 0,
    shape: dict[str, int] | None = None,
    **changes: object,
) -> Bundle:
    """A bundle of a tiny model of some shape; `changes` replace parts of its engine config."""
    files = directory / "files"
    files.mkdir(parents=True)
    checkpoint = open_checkpoint(make_tiny_hf(directory / "hf", seed=seed, **(shape or {})))
    config = build_engine(checkpoint, QuantName.INT8, files, profile="orin-nano-8gb", name=name)
    config = EngineConfig.model_validate(config.model_dump() | changes)
    with BundleWriter(directory / f"{name}.bundle") as writer:
        writer.add(files, config)
    return Bundle.open(directory / f"{name}.bundle")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny engine, 2 layers, byte-level tokens."""
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another one, with other weights."""
    return make_bundle(tmp_path_factory.mktemp("other"), name="other", seed=1)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One that takes about a millisecond a token, so that things can happen while it answers."""
    shape = {"layers": 12, "hidden": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 1024}
    return make_bundle(tmp_path_factory.mktemp("small"), name="small", shape=shape)


@pytest.fixture
def short_dir():
    """A directory with a short path: a socket's may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="eda-") as path:
        yield Path(path)


@pytest.fixture
def agent(short_dir: Path):
    """A running agent without an engine."""
    with running_agent(short_dir) as running:
        yield running


@pytest.fixture
def serving(agent: Agent, tiny: Bundle) -> Agent:
    """A running agent that serves the tiny engine."""
    push(agent, tiny)
    return agent


@pytest.fixture
def busy(agent: Agent, small: Bundle) -> Agent:
    """A running agent whose answers take a while."""
    push(agent, small)
    return agent


def push(agent: Agent, bundle: Bundle) -> str:
    """Pushes and activates the bundle's only engine."""
    (variant,) = bundle.variants
    with agent.client() as client:
        client.push(bundle, variant.digest)
        client.activate(variant.digest)
    return variant.digest
