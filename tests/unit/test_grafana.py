"""The dashboard and the alerts ask for what the agent exports, and show it in its unit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("yaml")

import yaml
from prometheus_client.parser import text_string_to_metric_families

from edgellm_agent.http.settings import MetricsSettings
from edgellm_agent.telemetry.prometheus import render
from tests.support.telemetry_records import busy_totals, full_record

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/edgellm.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
# What is there for a closer look than the dashboard's.
NOT_SHOWN = {
    "edgellm_rail_voltage_volts",
    "edgellm_rail_current_amperes",
    "edgellm_cpu_hertz",
    "edgellm_swap_total_bytes",
    "edgellm_load_seconds",
    "edgellm_recent_first_tokens",
    "edgellm_recent_inter_token_gaps",
}
# End of a metric's name → Grafana's unit; a counter's rate is in units of its own.
UNITS = {
    "_celsius": "celsius",
    "_celsius_per_second": "suffix:°C/s",
    "_watts": "watt",
    "_joules": "joule",
    "_joules_per_request": "joule",
    "_bytes": "bytes",
    "_tokens_per_second": "suffix:tok/s",
    "_seconds": "s",
    "_ratio": "percentunit",
    "_hertz": "hertz",
}
RATES = {"_requests": "reqps", "_tokens": "suffix:tok/s", "_joules": "watt"}
# Labels that Prometheus adds.
ITS_OWN = {"instance", "job"}
NAME = re.compile(r"\bedgellm_[a-z0-9_]+")
SELECTOR = re.compile(r"\b(edgellm_[a-z0-9_]+)\{([^}]*)\}")
LABEL = re.compile(r'([a-z_]+)\s*=~?\s*"')


def exported() -> dict[str, set[str]]:
    """Name of each sample → its labels."""
    body, _ = render(full_record(), totals=busy_totals())
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


EXPORTED = exported()


def exprs(panel):
    return [target["expr"] for target in panel["targets"]]


def all_exprs():
    return [expr for panel in PANELS for expr in exprs(panel)] + [rule["expr"] for rule in ALERTS]


def longest_end(name, table):
    ends = [end for end in table if name.endswith(end)]
    return table[max(ends, key=len)] if ends else None


def unit_of(expr):
    """What a query gives, as Grafana names it."""
    (name,) = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in NAME.findall(expr)}
    if "rate(" in expr and not expr.startswith("histogram_quantile"):
        return longest_end(name, RATES)
    return longest_end(name, UNITS) or "short"


@pytest.mark.parametrize("expr", all_exprs())
def test_every_query_asks_for_metrics_and_labels_that_are_exported(expr):
    assert NAME.findall(expr) or "up{" in expr
    assert set(NAME.findall(expr)) <= EXPORTED.keys()
    for name, selector in SELECTOR.findall(expr):
        assert set(LABEL.findall(selector)) <= EXPORTED[name] | ITS_OWN


def test_every_metric_is_shown_or_listed_as_not_shown():
    asked = {name for panel in PANELS for expr in exprs(panel) for name in NAME.findall(expr)}
    # A histogram is shown by its buckets.
    unseen = {re.sub(r"_(sum|count)$", "_bucket", name) for name in EXPORTED} - asked
    assert unseen == NOT_SHOWN


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_the_unit_of_its_queries(panel):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] != "timeseries":
        assert unit == "none"
        return
    for expr in exprs(panel):
        # A share of two counts of one kind.
        assert unit == ("percentunit" if ") / rate(" in expr else unit_of(expr)), expr


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_the_chosen_source_about_the_chosen_devices(panel):
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        names, selectors = NAME.findall(target["expr"]), SELECTOR.findall(target["expr"])
        assert [name for name, _ in selectors] == names
        assert all('instance=~"$device"' in selector for _, selector in selectors)
        labels = set.intersection(*(EXPORTED[name] for name in names)) | ITS_OWN
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
        assert target["datasource"]["uid"] == "${datasource}"


def test_panels_have_ids_of_their_own_and_places_that_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for place in (panel["gridPos"] for panel in panels):
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        taken |= cells


def test_states_are_shown_by_the_names_that_are_exported():
    shown = {
        re.search(r"edgellm_\w+_state", expr)[0]: {
            *re.findall(r'state="(\w+)"', expr),
            panel["fieldConfig"]["defaults"]["mappings"][0]["options"]["0"]["text"],
        }
        for panel in PANELS
        for expr in exprs(panel)
        if "_state{" in expr
    }
    body, _ = render(full_record())
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    assert shown.keys() == {"edgellm_engine_state", "edgellm_governor_state"}
    for name, states in shown.items():
        assert states == {sample.labels["state"] for sample in families[name].samples}


def test_alerts_have_names_of_their_own_a_severity_and_a_sentence():
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]


def test_prometheus_scrapes_the_listeners_default_and_loads_the_alerts():
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert config["rule_files"] == ["alerts.yml"]
    assert job["static_configs"] == [{"targets": [MetricsSettings().listen]}]
    assert 'job="edgellm"' in ALERTS[0]["expr"]
    assert job["job_name"] == "edgellm"


promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, which comes with Prometheus"
)


def check(*arguments):
    done = subprocess.run(["promtool", *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_the_configuration_and_every_query_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"panel{panel['id']}:{number}", "expr": expr.replace("$device", ".*")}
        for panel in PANELS
        for number, expr in enumerate(exprs(panel))
    ]
    (tmp_path / "dashboard.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    check("check", "config", str(DEPLOY / "prometheus/prometheus.yml"))
    check("check", "rules", str(tmp_path / "dashboard.yml"))


# Alert → {series: (by the minute on a device in trouble, and on a calm one)}.
TRIPS = {
    "EdgellmDeviceAway": {'up{job="edgellm"}': ("0x120", "1x120")},
    "EdgellmTelemetryStuck": {
        'up{job="edgellm"}': ("1x120", "1x120"),
        'edgellm_telemetry_timestamp_seconds{job="edgellm"}': ("1000x120", "1000+60x120"),
    },
    "EdgellmNearlyThrottling": {"edgellm_thermal_margin_celsius": ("4x120", "20x120")},
    "EdgellmTooHotToServe": {"edgellm_governor_refusing": ("1x120", "0x120")},
    "EdgellmOverCurrent": {'edgellm_over_current_events_total{kind="average"}': ("0x118 1 2", "7x120")},
    "EdgellmEngineDown": {'edgellm_engine_state{state="restarting"}': ("1x120", "0x120")},
    "EdgellmWorkerRestarts": {"edgellm_worker_restarts_total": ("0x110 1 2 3 4 5x20", "1x120")},
    "EdgellmRequestsFail": {
        "edgellm_requests_total": ("0+100x120", "0+100x120"),
        "edgellm_failed_requests_total": ("0+6x120", "0+4x120"),
    },
    "EdgellmOutboxDrops": {"edgellm_uplink_dropped_telemetry_total": ("0+10x120", "10x120")},
    "EdgellmOutboxFills": {"edgellm_uplink_queued_bytes": ("1000+1000x120", "900000-1000x120")},
}


def test_every_alert_is_tripped_in_a_test():
    assert {rule["alert"] for rule in ALERTS} == TRIPS.keys()


@promtool
@pytest.mark.parametrize("name", TRIPS)
def test_an_alert_fires_for_the_device_in_trouble_and_not_for_a_calm_one(tmp_path, name):
    series, labels = [], {}
    for wanted, values in TRIPS[name].items():
        metric, _, rest = wanted.partition("{")
        own = dict(re.findall(r'(\w+)="(\w+)"', rest))
        labels |= own
        for device, by_minute in zip(("robot", "calm"), values, strict=True):
            pairs = ",".join(f'{key}="{value}"' for key, value in (own | {"instance": device}).items())
            series.append({"series": f"{metric}{{{pairs}}}", "values": by_minute})
    # Sentences are not what is tested.
    rules = [{key: rule[key] for key in rule if key != "annotations"} for rule in ALERTS]
    (severity,) = (rule["labels"]["severity"] for rule in ALERTS if rule["alert"] == name)
    alert = {"exp_labels": labels | {"severity": severity, "instance": "robot"}}
    case = {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [{"alertname": name, "eval_time": "2h", "exp_alerts": [alert]}],
    }
    test = {"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    check("test", "rules", str(tmp_path / "test.yml"))
