"""`edgellm bench` refuses what cannot be measured before it begins, and counts what the device refuses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import shlex
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import pytest
from typer.testing import CliRunner

from edgellm.bench import session
from edgellm.cli.main import app
from edgellm.v1 import (
    device_pb2,
    device_pb2_grpc,
    engines_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    telemetry_pb2,
)
from tests.support.fake_device import (
    FakeDeviceService,
    FakeEngineService,
    FakeInferenceService,
)

pytestmark = pytest.mark.usefixtures("home")


class CountingInference(FakeInferenceService):
    """Counts the words of a prompt as its tokens, and answers as long as it was asked to.

    Requests whose numbers, from 1, are in `failing` fail.
    """

    failing = frozenset()

    def stream(self, request):
        if len(self.device.requests) in self.failing:
            raise ZeroDivisionError
        text = request.prompt or " ".join(message.content for message in request.chat.messages)
        for number in range(request.max_tokens):
            yield inference_pb2.GenerateResponse(request_id="r1", token_ids=[number], text="w ")
        yield inference_pb2.GenerateResponse(
            request_id="r1",
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(prompt_tokens=len(text.split()), completion_tokens=request.max_tokens),
            timings=inference_pb2.Timings(queue_s=0.01, ttft_s=0.1, decode_s=0.3),
        )


class PoweredDevice(FakeDeviceService):
    """Draws 5 W in its 15 W mode."""

    def WatchTelemetry(self, request, context):
        power = telemetry_pb2.Power(total_mw=5000, mode="15W")
        pause = threading.Event()
        while context.is_active():
            pause.wait(0.001)
            yield device_pb2.WatchTelemetryResponse(telemetry=telemetry_pb2.Telemetry(power=power))


@pytest.fixture
def served(device, config, tmp_path):
    device.configs["sha256:1"] = config
    device.active = "sha256:1"
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    device_pb2_grpc.add_DeviceServiceServicer_to_server(PoweredDevice(device), server)
    engines_pb2_grpc.add_EngineServiceServicer_to_server(FakeEngineService(device), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(CountingInference(device), server)
    address = f"unix://{tmp_path}/bench.sock"
    server.add_insecure_port(address)
    server.start()
    run("device", "add", "jetson-01", address)
    yield device
    device.cancelled.set()
    server.stop(grace=None).wait()


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def bench(*args):
    return run("bench", "--device", "jetson-01", *args)


def results(*args):
    result = bench(*args, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["complete"]
    return document["results"]


def failure(*args):
    """The error of a benchmark that measured nothing."""
    result = bench(*args, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    return json.loads(result.stderr)["error"]


def test_each_point_of_the_grid_is_measured_as_asked(served):
    options = ("--input-tokens", "20,30", "--output-tokens", "5", "--concurrency", "1,2", "--requests", "6")
    found = results(*options)
    shapes = [(item["settings"]["input_tokens"], item["settings"]["concurrency"]) for item in found]
    assert shapes == [(20, 1), (20, 2), (30, 1), (30, 2)]
    for item in found:
        metrics = item["metrics"]
        assert (metrics["requests"], metrics["errors"], metrics["unfinished"]) == (6, {}, 0)
        assert metrics["avg_input_tokens"] == item["settings"]["input_tokens"]
        assert metrics["avg_output_tokens"] == 5
        assert metrics["inter_token_latency_ms"]["count"] == 6 * 4
        assert metrics["server_time_to_first_token_ms"]["p50"] == pytest.approx(100)


def test_a_result_names_the_system_and_its_command_measures_it_again(served):
    (first,) = results("--input-tokens", "20", "--output-tokens", "3", "--concurrency", "2")
    system = first["system"]
    assert (system["device"], system["profile"], system["engine"]) == (
        "fake-01",
        "orin-nano-8gb",
        "tiny-int4",
    )
    assert (system["digest"], system["agent_version"], system["power_mode"]) == ("sha256:1", "0.1.0", "15W")
    again = run(*shlex.split(first["command"])[1:], "--json")
    (second,) = json.loads(again.stdout)["results"]
    assert second["settings"] == first["settings"]
    assert second["command"] == first["command"]


def test_no_prompt_comes_twice_and_none_ends_early(served):
    results("--input-tokens", "20", "--output-tokens", "3", "--concurrency", "1,2", "--requests", "5")
    prompts = [request.prompt for request in served.requests]
    assert len(set(prompts)) == len(prompts)
    assert all(request.ignore_eos for request in served.requests)


def test_a_shared_prefix_is_shared_by_all_and_nothing_else_is(served):
    results("--input-tokens", "40", "--shared-prefix", "30", "--output-tokens", "2", "--concurrency", "1")
    prompts = [request.prompt.split() for request in served.requests[2:]]
    assert len({" ".join(words[:30]) for words in prompts}) == 1
    assert len({" ".join(words[30:]) for words in prompts}) == len(prompts)


def test_tokens_per_joule_come_from_the_device_s_own_sensor(served):
    (item,) = results("--output-tokens", "4", "--concurrency", "1", "--requests", "4")
    metrics = item["metrics"]
    assert metrics["energy_j"] == pytest.approx(5 * metrics["span_s"])
    assert metrics["output_tokens_per_joule"] == pytest.approx(16 / metrics["energy_j"])


def test_requests_can_be_sent_at_a_rate(served):
    (item,) = results("--rate", "50", "--requests", "10", "--output-tokens", "2")
    assert item["settings"]["rate"] == 50
    assert item["metrics"]["requests"] == 10


def test_what_fails_on_the_device_is_counted_and_shown(served, monkeypatch):
    # Two requests fit the words; of the six that are measured, these three fail.
    monkeypatch.setattr(CountingInference, "failing", {4, 6, 7})
    options = ("--requests", "6", "--concurrency", "1", "--output-tokens", "2", "--warmup", "0")
    (item,) = results(*options)
    assert (item["metrics"]["requests"], item["metrics"]["errors"]) == (3, {"UNKNOWN": 3})
    served.requests.clear()
    assert "UNKNOWN 3" in bench(*options).stdout


@pytest.mark.parametrize("scenario", ["sweep", "chat"])
def test_if_nothing_was_answered_the_benchmark_fails_with_the_device_s_reason(served, monkeypatch, scenario):
    monkeypatch.setattr(CountingInference, "failing", range(3, 1000))
    result = bench("--scenario", scenario, "--requests", "4", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert not document["complete"]
    assert "UNKNOWN" in json.dumps(document["results"][0])
    assert json.loads(result.stderr)["error"]["code"] == "UNKNOWN"


def test_the_table_is_aligned_and_ends_with_the_commands(served):
    text = bench("--concurrency", "1,2", "--output-tokens", "3", "--requests", "2").stdout
    lines = text.splitlines()
    (header,) = [line for line in lines if line.startswith("IN ")]
    at = lines.index(header)
    assert [line[header.index("LOAD")] for line in lines[at + 1 : at + 3]] == ["1", "2"]
    assert "engine     tiny-int4 sha256:1" in text
    assert lines[-1].startswith("  edgellm bench --device=jetson-01 ")


def test_a_chat_shows_its_turns(served):
    (item,) = results("--scenario", "chat", "--concurrency", "2", "--turns", "3", "--output-tokens", "4")
    assert [turn["turn"] for turn in item["turns"]] == [1, 2, 3]
    lengths = [turn["metrics"]["avg_input_tokens"] for turn in item["turns"]]
    assert lengths == [128, 2 * 128 + 4, 3 * 128 + 8]
    text = bench("--scenario", "chat", "--concurrency", "2", "--turns", "3", "--output-tokens", "4").stdout
    assert "USERS  TURN" in text


def test_a_report_is_written_beside_the_figures(served, tmp_path):
    page = tmp_path / "bench.html"
    results("--concurrency", "1,2", "--output-tokens", "3", "--requests", "2", "--report", page)
    assert page.read_text().count("<svg") == 5


@pytest.mark.parametrize(
    ("options", "option"),
    [
        (("--concurrency", "0"), "--concurrency"),
        (("--concurrency", "1,two"), "--concurrency"),
        (("--input-tokens", ""), "--input-tokens"),
        (("--output-tokens", "-1"), "--output-tokens"),
        (("--rate", "nan"), "--rate"),
        (("--scenario", "chat", "--rate", "1"), "--rate"),
        (("--scenario", "interference", "--report", "x.html"), "--report"),
        (("--shared-prefix", "200"), "--shared-prefix"),
        (("--report", "/nowhere/x.html"), "--report"),
    ],
)
def test_wrong_usage_names_the_option_before_the_device_is_asked(options, option):
    result = bench(*options)
    assert result.exit_code == 2
    assert option in result.stderr


def test_lengths_beyond_the_context_are_refused_before_anything_is_sent(served):
    error = failure("--input-tokens", "100,2000", "--output-tokens", "100")
    assert "2100 tokens" in error["message"]
    assert "--input-tokens" in error["hint"]
    assert served.requests == []


def test_more_streams_than_the_device_runs_at_once_make_no_interference(served):
    error = failure("--scenario", "interference", "--concurrency", "64")
    assert "would wait" in error["message"]
    assert served.requests == []


def test_without_an_engine_there_is_nothing_to_measure(served):
    served.active = ""
    assert "edgellm push" in failure()["hint"]


def test_an_engine_that_is_not_there_is_named_with_those_that_are(served):
    assert failure("--model", "gemma")["message"] == "the device has no engine 'gemma'; it has: tiny-int4"


def test_a_device_that_is_not_there_gives_one_error(home, tmp_path):
    run("device", "add", "jetson-01", f"unix://{tmp_path}/none.sock")
    assert failure()["kind"] == "DeviceUnreachableError"
    assert [line.startswith("error: ") for line in bench().stderr.splitlines()] == [True, False]


def read_terminal(descriptor):
    """All that a terminal was sent, up to the end of the program that wrote to it."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 4096):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize(("options", "shown"), [((), True), (("--json",), False)])
def test_progress_goes_to_a_terminal_and_not_among_json(served, options, shown):
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", "from edgellm.cli.main import main; main()", "bench"]
    arguments = ["--device", "jetson-01", "--requests", "2", "--concurrency", "2", *options]
    with subprocess.Popen([*program, *arguments], stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        seen = read_terminal(ours)
    os.close(ours)
    assert process.returncode == 0
    assert ("2 at once" in seen) == shown


def stopped_by(served, at_record):
    """What is found when the first measured request, or nothing at all, is followed by a stop."""

    async def main():
        stop = asyncio.Event()
        if not at_record:
            stop.set()
        settings = session.Settings("jetson-01", output_tokens=(2,), requests=5)
        return await session.run(settings, stop, session.Progress(on_record=stop.set))

    return asyncio.run(main())


def test_a_stop_ends_the_grid_and_keeps_what_was_measured(served):
    findings = stopped_by(served, at_record=True)
    (row,) = findings.rows
    assert (row.point.concurrency, row.metrics.requests) == (1, 1)
    assert (findings.stopped, findings.failure) == (True, None)


def test_a_stop_before_the_first_request_leaves_nothing(served):
    findings = stopped_by(served, at_record=False)
    assert (findings.rows, findings.stopped, findings.failure) == ([], True, None)
    assert served.requests == []
