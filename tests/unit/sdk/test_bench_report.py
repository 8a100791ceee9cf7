"""Results are shown as they are: aligned, complete, and in a page that needs nothing from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from datetime import datetime, timezone

import pytest

from edgellm.bench import Bounds, Point, Record, Row, System, summarize
from edgellm.bench.load import Arrival
from edgellm.bench.plots import check_available
from edgellm.bench.report import html
from edgellm.bench.session import Findings, Scenario, Settings
from edgellm.bench.tables import HEADERS, cells, document, facts
from edgellm.errors import EdgellmError, RemoteError

SYSTEM = System(
    device="jetson-<01>",
    profile="orin-nano-8gb",
    simulated=True,
    power_mode="15W",
    engine="smollm2",
    digest="sha256:" + "0" * 64,
    precision="int4",
    context_tokens=2048,
    runtime="onnxruntime",
    runtime_version="1.32.0",
    max_sequences=8,
    kv_bytes=201_326_592,
    agent_version="0.1.0",
    client_version="0.1.0",
    client_machine="a laptop, 8 cores",
    measured_at=datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc),
)


def row(users, *, input_tokens=128, error=None):
    records = [
        Record(at, at + 1.5, tuple(Arrival(at + 0.5 + step / 10, 1) for step in range(10)), error=error)
        for at in range(users * 4)
    ]
    point = Point(input_tokens, 10, concurrency=users, rate=None, bounds=Bounds(4 * users))
    return Row(point, summarize(records), records)


@pytest.fixture(scope="module")
def page():
    rows = [row(users, input_tokens=tokens) for tokens in (128, 512) for users in (1, 4)]
    return html(SYSTEM, rows, ["edgellm bench --device=jetson-<01>"])


def test_the_page_asks_nothing_of_the_network(page):
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)|\ssrc=", page)
    assert re.findall(r'href="(?!#)', page) == []


def test_each_pair_of_lengths_has_its_plots_and_they_are_well_formed(page):
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 2 * 5
    for plot in plots:
        ET.fromstring(plot)
    for label in ("concurrent requests", "output tokens per second", "time to first token, ms"):
        assert label in page
    assert page.count('role="img" aria-label=') == len(plots)


def test_no_id_is_on_the_page_twice_and_none_that_is_referred_to_is_missing(page):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)


def test_the_plots_take_the_page_s_colours_in_light_and_in_dark(page):
    (plot, *_) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", plot))
    assert {"--ink", "--grid", "--series-1"} <= used
    light, dark = page.split("@media (prefers-color-scheme: dark)")
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark
    assert set(re.findall(r"#[0-9a-f]{6}", plot)) == set()


def test_the_page_names_what_was_measured_without_taking_names_for_markup(page):
    for text in (SYSTEM.digest, "int4", "onnxruntime 1.32.0", "(simulated), 15W", "jetson-&lt;01&gt;"):
        assert text in page
    assert "<01>" not in page


def test_a_load_that_only_failed_is_still_on_the_page():
    failed = row(2, error=RemoteError("no", code="RESOURCE_EXHAUSTED"))
    assert "RESOURCE_EXHAUSTED 8" in html(SYSTEM, [failed], [])


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(EdgellmError, match="matplotlib") as error:
        check_available()
    assert error.value.hint == "pip install 'edgellm[bench]'"


def test_a_line_has_a_cell_for_each_header_and_a_dash_for_what_is_unknown():
    line = dict(zip(HEADERS, cells(row(4)), strict=True))
    assert line["LOAD"] == "4"
    assert line["TTFT P50"] == "500"
    assert line["TPOT P99"] == "100.0"
    assert line["DONE"] == "16"
    assert line["ERRORS"] == "none"
    assert line["TOK/J"] == line["IN"] == "-"


def test_the_facts_say_what_a_figure_needs_beside_it():
    text = " ".join(value for _, value in facts(SYSTEM))
    for fact in ("orin-nano-8gb (simulated), 15W", SYSTEM.digest, "int4", "1.32.0", "a laptop, 8 cores"):
        assert fact in text


def test_each_result_can_be_measured_again_from_what_it_says():
    settings = Settings("jetson-01", concurrency=(1, 4), model="smollm2", shared_prefix_tokens=64, seed=7)
    found = document(Findings(settings, SYSTEM, [row(1), row(4)]))
    assert found["complete"]
    for result, users in zip(found["results"], (1, 4), strict=True):
        assert result["system"]["digest"] == SYSTEM.digest
        assert result["command"] == (
            "edgellm bench --device=jetson-01 --scenario=sweep --model=smollm2 --input-tokens=128 "
            f"--output-tokens=10 --concurrency={users} --requests={4 * users} --warmup=0 --timeout=600.0 "
            "--seed=7"
        )


def test_a_benchmark_that_ended_early_says_so():
    assert not document(Findings(Settings("x"), SYSTEM, [row(1)], stopped=True))["complete"]
    assert not document(Findings(Settings("x"), SYSTEM, [row(1)], EdgellmError("gone")))["complete"]


def test_the_grid_is_every_combination_of_lengths_and_loads():
    grid = Settings("x", input_tokens=(1, 2), output_tokens=(3, 4), concurrency=(5, 6)).points()
    assert len({(point.input_tokens, point.output_tokens, point.concurrency) for point in grid}) == 8
    assert [point.load for point in Settings("x", rates=(0.5, 2)).points()] == [0.5, 2]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (Settings("x", concurrency=(1, 4)), 8 + 16),
        (Settings("x", concurrency=(1, 4), requests=3), 6),
        (Settings("x", duration_s=5), None),
        (Settings("x", scenario=Scenario.CHAT, concurrency=(2, 3), turns=4), 4 * 5),
        (Settings("x", scenario=Scenario.INTERFERENCE, concurrency=(2,), requests=6), 12),
    ],
)
def test_the_number_of_requests_follows_from_the_load(settings, count):
    assert settings.requests_in_all() == count
