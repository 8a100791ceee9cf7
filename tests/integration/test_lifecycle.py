"""Engines that follow each other on a real agent, with real workers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.bundle import Bundle
from edgellm.errors import RemoteError
from tests.conftest import push
from tests.support.agents import Agent, running_agent, wait_for

HOLDING = """
import sys
from edgellm.client import Client
with Client(sys.argv[1]) as client, client.hold("docking"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def watching(short_dir: Path) -> Iterator[Agent]:
    """An agent that keeps a new engine on probation for longer than any test."""
    with running_agent(short_dir, probation_s=600) as agent:
        yield agent


def kill_worker(agent: Agent) -> None:
    pid = agent.worker_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: agent.worker_pid() != pid, "another worker")


def answers(agent: Agent, model: str = "") -> bool:
    try:
        with agent.client() as client:
            client.generate("Hello", model=model, max_tokens=2, ignore_eos=True).read()
    except RemoteError:
        return False
    return True


def states(agent: Agent) -> dict[str, str]:
    with agent.client() as client:
        return {engine.name: engine.state for engine in client.engines()}


def story(agent: Agent) -> list[tuple[str, str]]:
    with agent.client() as client:
        return [(entry.what, entry.engine) for entry in reversed(client.history())]


def commit(agent: Agent, bundle: Bundle) -> str:
    """Has an engine proven, whatever the agent's probation is: the agent is started with none."""
    agent.stop()
    agent.probation_s, before = 0, agent.probation_s
    agent.start()
    digest = push(agent, bundle)
    agent.stop()
    agent.probation_s = before
    agent.start()
    wait_for(lambda: answers(agent), "the engine")
    return digest


def test_an_engine_whose_worker_dies_twice_on_probation_is_rolled_back(
    watching: Agent, tiny: Bundle, other_tiny: Bundle
) -> None:
    first = commit(watching, tiny)
    (variant,) = other_tiny.variants
    with watching.client() as client:
        client.push(other_tiny, variant.digest)
        steps: list[str] = []
        client.activate(variant.digest, lambda step: steps.append(step.phase))
        assert steps == ["verifying", "loading", "canary", "probation"]
        done = [(record.method, record.outcome) for record in client.audit(10)]
        assert done[-1] == ("EngineService/Activate", "OK")
        assert states(watching) == {"tiny": "STORED", "other": "PROBATION"}
        kill_worker(watching)
        os.kill(watching.worker_pid(), signal.SIGKILL)
        wait_for(lambda: client.info().active_engine == first, "the first engine")
        wait_for(lambda: answers(watching), "an answer")
        assert states(watching) == {"tiny": "COMMITTED", "other": "STORED"}
        last = client.history(1)[0]
    assert (last.what, last.engine, last.previous) == ("ROLLED_BACK", variant.digest, first)
    assert "died 2 times" in last.error


def test_an_agent_that_is_killed_keeps_the_engine_that_it_had_promised(
    watching: Agent, tiny: Bundle, other_tiny: Bundle
) -> None:
    commit(watching, tiny)
    second = push(watching, other_tiny)
    watching.stop(signal.SIGKILL)
    watching.start()
    wait_for(lambda: answers(watching), "an answer")
    assert states(watching) == {"tiny": "STORED", "other": "PROBATION"}
    assert story(watching)[-1] == ("ACTIVATED", second)


def test_an_operator_goes_back_to_the_engine_before(serving: Agent, tiny: Bundle, other_tiny: Bundle) -> None:
    first = tiny.variants[0].digest
    push(serving, other_tiny)
    with serving.client() as client:
        steps: list[str] = []
        client.roll_back(lambda step: steps.append(step.phase))
        assert steps == ["verifying", "loading", "canary", "committed"]
        assert client.info().active_engine == first
        with client.hold("docking"), pytest.raises(RemoteError, match="docking"):
            client.roll_back()


def test_a_client_may_wait_until_an_engine_is_committed(short_dir: Path, tiny: Bundle) -> None:
    with running_agent(short_dir, probation_s=0.3) as agent, agent.client() as client:
        (variant,) = tiny.variants
        client.push(tiny, variant.digest)
        steps: list[str] = []
        client.activate(variant.digest, lambda step: steps.append(step.phase), until_committed=True)
        assert steps[-2:] == ["probation", "committed"]
        assert states(agent) == {"tiny": "COMMITTED"}


def test_two_engines_answer_by_name_and_both_come_back_after_a_restart(
    serving: Agent, other_tiny: Bundle
) -> None:
    (variant,) = other_tiny.variants
    with serving.client() as client:
        client.push(other_tiny, variant.digest)
        client.activate(variant.digest, beside=True)
        assert states(serving) == {"tiny": "COMMITTED", "other": "BESIDE"}
    serving.stop()
    serving.start()
    for model in ("", "tiny", "other"):
        wait_for(lambda model=model: answers(serving, model), model)
    with serving.client() as client:
        client.deactivate("other")
    assert not answers(serving, "other")
    assert answers(serving)


def test_a_hold_ends_with_the_program_that_holds(serving: Agent, other_tiny: Bundle) -> None:
    (variant,) = other_tiny.variants
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, serving.target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with serving.client() as client:
            client.push(other_tiny, variant.digest)
            with pytest.raises(RemoteError, match="docking") as refused:
                client.activate(variant.digest)
            assert refused.value.code == "FAILED_PRECONDITION"
            holder.kill()
            holder.wait()

            def activated() -> bool:
                try:
                    client.activate(variant.digest)
                except RemoteError:
                    return False
                return True

            wait_for(activated, "the end of the hold")
    finally:
        holder.kill()
        holder.communicate()


def test_an_agent_stops_in_time_though_a_program_holds_its_engines(serving: Agent) -> None:
    with serving.client() as client, client.hold("docking"):
        assert serving.stop(timeout_s=10) == 0
