"""The log of a real agent, its engine's included, read from afar."""

from __future__ import annotations

import json
import os
import shutil
import signal

from typer.testing import CliRunner

from edgellm.cli.main import app
from tests.support.agents import Agent, gone, running_agent, wait_for


def logs(agent: Agent, *args: str) -> list[str]:
    result = CliRunner().invoke(app, ["device", "logs", agent.target, "--json", *args])
    assert result.exit_code == 0, result.stderr
    return [json.loads(line)["text"] for line in result.stdout.splitlines()]


def test_what_the_agent_does_is_in_its_log(serving):
    text = "\n".join(logs(serving))
    assert "listening on" in text
    assert "loaded in" in text


def test_the_trace_of_a_worker_that_failed_is_in_the_log(serving):
    # Whatever it was loaded from is no more; the next worker cannot begin.
    shutil.rmtree(serving.state)
    pid = serving.worker_pid()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: gone(pid), "the end of the worker")
    text = wait_for(
        lambda: (found := "\n".join(logs(serving, "--level", "error"))) and "Traceback" in found and found,
        "the trace",
    )
    assert "died" in text
    assert "worker failed" in text
    assert "Traceback (most recent call last):" in serving.log


def test_a_prompt_is_never_in_the_log(serving):
    with serving.client() as client:
        client.generate("the secret prompt", max_tokens=2).read()
    assert "secret" not in "\n".join(logs(serving, "--level", "debug"))


def test_an_agent_that_ends_does_not_wait_for_who_follows_its_log(short_dir):
    with running_agent(short_dir, "drain_s = 100") as agent, agent.client() as client:
        followed = client.watch_logs(1, follow=True)
        next(followed)
        assert agent.stop(timeout_s=20) == 0
