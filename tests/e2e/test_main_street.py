"""The main job on the real model, through the programs that a person runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.agents import running_agent, wait_for
from tests.support.broker import listening, running_broker

MODEL = Path(__file__).parents[2] / ".edgellm/models/SmolLM2-135M-Instruct.Q4_1.gguf"
LONG = "The board reports its temperature, its power and its speed once a second. " * 40

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not MODEL.exists(), reason="`make model` fetches the weights"),
]


class Cli:
    """`edgellm` as a program, with a home of its own."""

    def __init__(self, home):
        self.environment = {**os.environ, "EDGELLM_HOME": str(home)}

    def run(self, *arguments, stdin="", code=0):
        result = subprocess.run(
            [Path(sys.executable).parent / "edgellm", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=120,
            check=False,
        )
        assert result.returncode == code, result.stderr
        return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module", params=["int4", "int8"])
def street(request, tmp_path_factory):
    """A built engine, pushed to an agent that reports to a broker."""
    home = tmp_path_factory.mktemp("home")
    root = tmp_path_factory.mktemp("a")
    cli = Cli(home)
    built = json.loads(
        cli.run("build", str(MODEL), "--precision", request.param, "--device", "orin-nano-8gb", "--json")
    )
    with running_broker() as broker, listening(broker) as heard:
        mqtt = (
            f'[mqtt]\nhost = "{broker.host}"\nport = {broker.port}\nprotocol = "{broker.protocols[0]}"\n'
            # Every record: the deadband could hold the last one back for a minute.
            "max_silence_s = 0"
        )
        with running_agent(root, f"drain_s = 2\n{mqtt}") as agent:
            cli.run("device", "add", "jetson-test", agent.target)
            pushed = json.loads(cli.run("push", "engine", "--device", "jetson-test", "--json"))
            assert pushed["digest"] == built["digest"]
            yield cli, agent, heard


def answer(cli, *arguments, stdin=""):
    lines = cli.run(*arguments, "--json", stdin=stdin).splitlines()
    *chunks, summary = [json.loads(line) for line in lines]
    return "".join(c["text"] for c in chunks), summary, chunks


def test_the_model_answers_sensibly_and_token_by_token(street):
    cli, _, _ = street
    prompt = "The capital of France is"
    text, summary, chunks = answer(
        cli, "generate", "--device", "jetson-test", "--prompt", prompt, "--max-tokens", "20"
    )
    assert text.startswith(" Paris")
    assert summary["finish_reason"] == "length"
    assert len(chunks) >= summary["completion_tokens"] // 2


def test_a_chat_ends_where_the_model_ends_it(street):
    cli, _, _ = street
    text, summary, _ = answer(
        cli, "chat", "--device", "jetson-test", "--max-tokens", "200", stdin="Say hello."
    )
    assert text.strip()
    assert summary["finish_reason"] == "stop"


def test_a_prompt_of_several_chunks_is_understood_to_its_beginning(street):
    cli, _, _ = street
    question = f"{LONG}\n\nWhat does the board report?"
    text, summary, _ = answer(cli, "chat", "--device", "jetson-test", "--max-tokens", "60", stdin=question)
    assert summary["prompt_tokens"] > 3 * 128
    assert "temperature" in text.lower()


def test_the_device_reports_over_mqtt_what_it_does(street):
    cli, _, heard = street
    answer(cli, "generate", "--device", "jetson-test", "--prompt", "Once upon a time", "--max-tokens", "100")

    def tells_of_it(message):
        return message.leaf == "runtime" and message.event.telemetry.runtime.generated_tokens_total > 50

    event = heard.wait_for(tells_of_it).event
    runtime = event.telemetry.runtime
    assert event.source == "edgellm/default/default/jetson-test"
    assert runtime.state == "serving"
    assert runtime.kv_bound_bytes > 0
    assert runtime.engine.startswith("sha256:")
    assert event.telemetry.memory.available_bytes > 0


def test_the_worker_stays_within_its_plan(street):
    cli, agent, _ = street
    answer(cli, "generate", "--device", "jetson-test", "--prompt", LONG, "--max-tokens", "200")
    with agent.client() as client:
        plan = client.memory_plan()
        rss = wait_for(lambda: next(client.watch_telemetry(timeout_s=5)).runtime.worker_rss_bytes, "a record")
    assert rss <= plan.weights_bytes + plan.workspace_bytes + plan.kv_bytes


def test_inspect_and_info_tell_what_was_built_and_pushed(street):
    cli, _, _ = street
    info = json.loads(cli.run("device", "info", "jetson-test", "--json"))
    assert info["simulated"]
    assert info["profile"] == "orin-nano-8gb"
    (engine,) = json.loads(cli.run("engine", "list", "--device", "jetson-test", "--json"))["engines"]
    assert engine["active"]
    assert engine["digest"] == info["active_engine"]
