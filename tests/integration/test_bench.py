"""A real agent under load: figures agree with its own clock, and a benchmark ends well however it ends."""

import json
import signal
import subprocess
import sys

import pytest

from tests.support.agents import wait_for


def command(agent, *options):
    program = [sys.executable, "-c", "from edgellm.cli.main import main; main()", "bench"]
    return [*program, "--device", agent.target, "--json", *options]


def results(agent, *options):
    done = subprocess.run(command(agent, *options), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["results"]


def test_a_sweep_measures_each_load_with_answers_of_the_exact_length(serving):
    found = results(serving, "--input-tokens", "96", "--output-tokens", "12", "--concurrency", "1,4")
    assert [item["settings"]["concurrency"] for item in found] == [1, 4]
    for item in found:
        metrics = item["metrics"]
        assert metrics["errors"] == {}
        assert metrics["avg_output_tokens"] == 12
        assert metrics["inter_token_latency_ms"]["count"] == metrics["requests"] * 11
        # The prompt's length is estimated; this tokenizer merges some pairs of letters and not others.
        assert metrics["avg_input_tokens"] == pytest.approx(96, rel=0.15)
        # What the agent waited for is a part of what the client waited for.
        server, client = metrics["server_time_to_first_token_ms"], metrics["time_to_first_token_ms"]
        assert 0 < server["average"] < client["average"] < metrics["request_latency_ms"]["average"]
    system = found[0]["system"]
    assert (system["runtime"], system["precision"], system["device"]) == (
        "onnxruntime",
        "int8",
        "jetson-test",
    )
    assert system["runtime_version"]


def test_a_chat_s_prompts_grow_by_the_answers(serving):
    options = ("--scenario", "chat", "--concurrency", "2", "--turns", "3", "--input-tokens", "24")
    (item,) = results(serving, *options, "--output-tokens", "8")
    lengths = [turn["metrics"]["avg_input_tokens"] for turn in item["turns"]]
    assert lengths == sorted(set(lengths))
    assert [turn["metrics"]["requests"] for turn in item["turns"]] == [2, 2, 2]


def test_a_long_prompt_beside_running_answers_is_measured(busy):
    options = ("--scenario", "interference", "--concurrency", "2", "--requests", "2")
    (item,) = results(busy, *options, "--input-tokens", "300", "--output-tokens", "900")
    assert item["metrics"]["rounds"] == 2
    assert item["metrics"]["calm_inter_token_latency_ms"]["count"] >= 2 * 16
    assert item["metrics"]["during_inter_token_latency_ms"]["count"] >= 2 * 2
    # The streams were stopped with the last newcomer.
    with busy.client() as client:
        wait_for(lambda: runtime(client).running_sequences == 0, "the end of the streams")


def runtime(client):
    return next(client.watch_telemetry(timeout_s=5)).runtime


@pytest.fixture
def long_benchmark(busy):
    """One that would take minutes, and has some of its requests behind it."""
    options = ("--requests", "100000", "--concurrency", "2", "--output-tokens", "24", "--input-tokens", "40")
    process = subprocess.Popen(
        command(busy, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        with busy.client() as client:
            wait_for(lambda: runtime(client).requests_total >= 12, "some answers")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_prints_what_was_measured_so_far(busy, long_benchmark):
    long_benchmark.send_signal(signal.SIGINT)
    output, errors = long_benchmark.communicate(timeout=30)
    assert (long_benchmark.returncode, errors) == (130, "")
    document = json.loads(output)
    metrics = document["results"][0]["metrics"]
    assert not document["complete"]
    assert metrics["requests"] > 0
    assert metrics["unfinished"] == 2
    with busy.client() as client:
        wait_for(lambda: runtime(client).running_sequences == 0, "the end of the requests")


def test_a_device_that_goes_away_gives_one_error_after_what_was_measured(busy, long_benchmark):
    busy.stop(signal.SIGKILL)
    output, errors = long_benchmark.communicate(timeout=30)
    assert long_benchmark.returncode == 1
    assert json.loads(errors)["error"]["kind"] == "DeviceUnreachableError"
    document = json.loads(output)
    assert not document["complete"]
    assert document["results"][0]["metrics"]["requests"] > 0
