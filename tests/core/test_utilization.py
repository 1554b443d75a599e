"""How busy a run's machine was: the summary, the chart, and the requests that a follower makes for it."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dstack_core import (
    ConfigurationError,
    Hardware,
    Metric,
    Offer,
    Outcome,
    Progress,
    RunFinished,
    RunMetrics,
    ServerUnreachableError,
    Utilization,
    UtilizationSoFar,
)
from dstack_core._flow.utilization import read_metrics
from dstack_core._operations import Operations
from dstack_core._wire.api import Api
from dstack_core._wire.plans import parse_plan
from dstack_core._wire.runs import parse_run
from dstack_core.integration import (
    describe_utilization,
    outcome_dict,
    outcome_rows,
    utilization_chart,
    utilization_lines,
)
from dstack_core.models.utilization import utilization_of
from tests.core.scripted import LOST, Driver, Script, recorded, reply, run_json

API = Api("http://server", "main")
START = datetime(2026, 11, 27, 12, tzinfo=UTC)
GIB = 2**30
A100 = Hardware(cpus=8, memory=64 * GIB, gpus=1, gpu="A100", gpu_memory=80 * GIB, gpu_vendor="nvidia")
METRICS = "metrics/job"


def series(name: str, values: list[float], node: int = 0, start: datetime = START) -> Metric:
    times = tuple(start + timedelta(seconds=10 * index) for index in range(len(values)))
    return Metric(name, times, tuple(values), node)


def gpu_job(count: int, node: int = 0, start: datetime = START) -> list[Metric]:
    """A job whose GPU is at 20 and 40 % in turn, with 11 of 80 GB, and whose 8 CPUs are at 25 %."""
    return [
        series("cpu_usage_percent", [200.0] * count, node, start),
        series("memory_working_set_bytes", [3.0 * GIB] * count, node, start),
        series("gpu_util_percent_gpu0", [20.0 + 20 * (each % 2) for each in range(count)], node, start),
        series("gpu_memory_usage_bytes_gpu0", [11.0 * GIB] * count, node, start),
    ]


def test_means_peaks_and_totals() -> None:
    usage = utilization_of(gpu_job(6), A100)
    assert usage is not None
    assert (usage.gpu_mean, usage.gpu_max, usage.cpu_mean, usage.cpu_max) == (30.0, 40.0, 25.0, 25.0)
    assert (usage.gpu_memory_peak, usage.gpu_memory_total) == (11 * GIB, 80 * GIB)
    assert (usage.memory_peak, usage.memory_total) == (3 * GIB, 64 * GIB)
    assert (usage.gpus, usage.gpu, usage.seconds, usage.points) == (1, "A100", 50.0, 6)
    text = "GPU 30 % mean, 40 % max; 11 of 80 GB; CPU 25 % mean, 25 % max; memory 3 of 64 GB"
    assert describe_utilization(usage) == text


def test_totals_of_the_server_count_before_those_of_the_machine() -> None:
    given = [
        *gpu_job(3),
        series("cpus_detected_num", [4.0] * 3),
        series("memory_total_bytes", [8.0 * GIB] * 3),
    ]
    usage = utilization_of([*given, series("gpu_memory_total_bytes", [24.0 * GIB] * 3)], A100)
    assert usage is not None
    assert (usage.cpu_mean, usage.memory_total, usage.gpu_memory_total) == (50.0, 8 * GIB, 24 * GIB)


def test_a_run_without_a_gpu_and_without_totals() -> None:
    usage = utilization_of(gpu_job(3)[:2], Hardware())
    assert usage is not None
    assert (usage.gpu_mean, usage.gpu_memory_peak, usage.gpus, usage.cpu_mean) == (None, None, 0, None)
    assert describe_utilization(usage) == "memory 3 GB"
    assert utilization_of([], A100) is None
    assert describe_utilization(None) == ""
    assert utilization_of([series("cpu_usage_percent", [])], A100) is None


def test_values_other_than_numbers_are_left_out() -> None:
    odd = [series("cpu_usage_percent", [math.nan, 80.0]), series("cpus_detected_num", [math.inf] * 2)]
    usage = utilization_of([*odd, series("memory_usage_bytes", [math.inf, 1.0])], A100)
    assert usage is not None
    assert (usage.cpu_mean, usage.memory_peak) == (10.0, 1)


def test_nodes_are_joined_and_a_long_series_is_thinned_without_changing_its_mean() -> None:
    usage = utilization_of([*gpu_job(360), *gpu_job(360, 1, START + timedelta(seconds=3))], A100)
    assert usage is not None
    assert (usage.gpus, usage.points, usage.seconds) == (2, 720, 3593.0)
    assert len(usage.series.times) == 60
    assert (usage.gpu_mean, usage.gpu_max) == (30.0, 40.0)
    assert list(usage.series.times) == sorted(usage.series.times)
    assert len(json.dumps(usage.to_dict())) < 6000


def test_two_parts_of_a_run_merge_into_what_one_would_be() -> None:
    whole = utilization_of(gpu_job(100), A100)
    first = utilization_of(gpu_job(40), A100)
    second = utilization_of(gpu_job(60, start=START + timedelta(seconds=400)), A100)
    assert whole is not None
    assert first is not None
    merged = first.merged(second)
    for name in (
        "gpu_mean",
        "gpu_max",
        "cpu_mean",
        "memory_peak",
        "gpu_memory_total",
        "points",
        "gpus",
        "gpu",
    ):
        assert getattr(merged, name) == getattr(whole, name), name
    assert first.merged(None) == first
    assert UtilizationSoFar.from_dict(
        json.loads(json.dumps(UtilizationSoFar(1.0, {"0.0": 2.0}, merged).to_dict()))
    ) == (UtilizationSoFar(1.0, {"0.0": 2.0}, merged))


def test_it_is_written_and_read_by_other_versions() -> None:
    usage = utilization_of(gpu_job(3), A100)
    assert usage is not None
    plain = json.loads(json.dumps(usage.to_dict()))
    assert Utilization.from_dict(plain) == usage
    newer = {**plain, "tpu_mean": 3, "series": {**plain["series"], "tpu": [1]}}
    assert Utilization.from_dict(newer) == usage
    assert Utilization.from_dict({"gpu_mean": 3.0}) == Utilization(gpu_mean=3.0)
    with pytest.raises(ValueError, match="zip"):
        Utilization.from_dict({"series": {"times": [1.0], "counts": []}})


def test_the_chart_is_one_safe_svg(tmp_path: Path) -> None:
    metrics = RunMetrics('train"<script>', (*gpu_job(30), *gpu_job(30, 1)), A100)
    chart = metrics.plot()
    root = ElementTree.fromstring(chart.svg)  # noqa: S314 - our own
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags == {"svg", "title", "rect", "text", "line", "polyline"}
    texts = ["".join(element.itertext()) for element in root.iter()]
    assert 'train"<script>' in texts
    assert "GPU (A100)" in texts
    assert "node 1, GPU 0" in texts
    assert not re.search(r"<script|href|url\(|on\w+=", chart.svg)
    for name in ("chart.svg", "chart.html"):
        chart.save(tmp_path / name)
        assert "<svg" in (tmp_path / name).read_text()
    assert metrics._repr_html_().startswith(
        '<img alt="train&quot;&lt;script&gt;" src="data:image/svg+xml;base64,'
    )
    assert chart._repr_svg_() == chart.svg
    with pytest.raises(
        ConfigurationError, match=r"path: expected \.svg, \.html or \.png at its end, got '\.pdf'"
    ):
        chart.save("chart.pdf")


def test_charts_of_one_value_of_none_and_with_gaps() -> None:
    assert "circle" in RunMetrics("r", tuple(gpu_job(1)), A100).plot().svg
    empty = RunMetrics("r")
    assert not empty
    assert list(empty) == []
    assert empty.summary() == Utilization()
    assert "No values yet" in empty.plot().svg
    usage = utilization_of(gpu_job(3), A100)
    assert usage is not None
    gap = replace(usage, series=replace(usage.series, gpu_percent=(1.0, None, 2.0)))
    assert gap.plot("x").svg.count("circle") == 2


def test_png_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="to_png: expected matplotlib, which is not installed"):
        RunMetrics("r", tuple(gpu_job(3)), A100).plot().to_png()


def test_a_line_is_cut_where_nothing_was_measured() -> None:
    parts = [*gpu_job(30), *gpu_job(30, start=START + timedelta(minutes=20))]
    joined = [
        Metric(one.name, one.timestamps + two.timestamps, one.values + two.values)
        for one, two in zip(parts[:4], parts[4:], strict=True)
    ]
    assert RunMetrics("r", tuple(joined), A100).plot().svg.count("<polyline") == 8
    assert RunMetrics("r", tuple(gpu_job(30)), A100).plot().svg.count("<polyline") == 4
    # A long run has a value a minute in its summary, which counts as joined.
    long = utilization_of(gpu_job(3600), A100)
    assert long is not None
    assert long.plot().svg.count("<polyline") == 4


def pixels(png: bytes) -> tuple[int, set[tuple[int, int, int]]]:
    """Return the height of a picture and its colors."""
    image = pytest.importorskip("PIL.Image", reason="needs the group plots: make .venv/core/.ready")
    picture = image.open(io.BytesIO(png)).convert("RGB")
    return picture.height, {color for _, color in picture.getcolors(1 << 20)}


BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the group plots: make .venv/core/.ready")
    several = [series(f"gpu_util_percent_gpu{gpu}", [20.0 + 40 * gpu] * 9) for gpu in range(2)]
    metrics = RunMetrics("train", (*gpu_job(9)[:2], *several), A100)
    metrics.plot().save(tmp_path / "usage.png")
    height, colors = pixels((tmp_path / "usage.png").read_bytes())
    # The line of each GPU has its color.
    assert {BLUE, ORANGE} <= colors
    lower, colors = pixels(RunMetrics("r", tuple(gpu_job(9)[:2])).plot("costs $5 or $6").to_png())
    assert lower < height
    assert ORANGE not in colors
    # One value is a dot, and a run without values a sentence.
    assert BLUE in pixels(RunMetrics("r", tuple(gpu_job(1)), A100).plot().to_png())[1]
    assert BLUE not in pixels(RunMetrics("r").plot().to_png())[1]


def test_series_by_name_and_job() -> None:
    metrics = RunMetrics("r", (*gpu_job(3), *gpu_job(3, 1)), A100)
    found = metrics.get("cpu_usage_percent", node=1)
    assert found is not None
    assert found.node == 1
    assert len(metrics) == 8
    assert metrics[0].node == 0
    assert metrics.get("cpu_usage_percent", node=2) is None
    assert len(metrics[:2]) == 2


# What a follower requests.


def metrics_reply(count: int, start: datetime = START, gpu: bool = True) -> Any:
    """A reply as the server gives it: newest first."""
    return reply(
        {
            "metrics": [
                {
                    "name": each.name,
                    "timestamps": [time.isoformat() for time in reversed(each.timestamps)],
                    "values": list(reversed(each.values)),
                }
                for each in gpu_job(count, start=start)[: None if gpu else 2]
            ]
        }
    )


def ended(seconds: float, gpu: bool = True) -> dict[str, Any]:
    run = run_json("done")
    run["submitted_at"] = START.isoformat()
    for submission in (run["latest_job_submission"], run["jobs"][0]["job_submissions"][-1]):
        submission["finished_at"] = (START + timedelta(seconds=seconds)).isoformat()
        machine = submission["job_provisioning_data"]
        machine["price"] = 1.2
        gpus = [{"name": "A100", "memory_mib": 81920, "vendor": "nvidia"}] if gpu else []
        resources = {"cpus": 8, "memory_mib": 65536, "gpus": gpus, "spot": False}
        machine["instance_type"]["resources"] = resources
        submission["job_runtime_data"] = None
    run["run_spec"]["configuration"]["resources"] = {"gpu": {"name": ["A100"], "count": {"min": 1, "max": 1}}}
    return run


class MetricsScript(Script):
    """A scripted server whose metrics are one list, whatever the query."""

    def __init__(self, **answers: Any) -> None:
        super().__init__(**answers)
        self.queries: list[str] = []

    def send(self, request: Any) -> Any:
        if "/metrics/" not in request.path:
            return super().send(request)
        self.queries.append(request.path)
        answers = self.answers[METRICS]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def finish(driver: Driver, script: Script, progress: Progress | None = None, **options: Any) -> Outcome:
    operations = Operations(API, 30.0, clock=driver.clock, wall_clock=driver.clock)
    given = {"poll_interval": 5.0, "logs": False, "retry_budget": 600.0, "utilization": True, **options}
    flow = operations.follow(progress or Progress("train", "id-1"), **given)
    events = driver.events(flow, script)
    assert isinstance(events[-1], RunFinished)
    return events[-1].outcome


def test_one_request_at_the_end(driver: Driver) -> None:
    script = MetricsScript(runs__get=[reply(ended(100))], metrics__job=[metrics_reply(9)])
    outcome = finish(driver, script)
    assert outcome.utilization is not None
    assert outcome.utilization.gpu_mean == pytest.approx(28.9)
    assert len(script.queries) == 1
    assert script.paths() == ["runs/get"]
    line = "Run train used GPU 29 % mean, 40 % max; 11 of 80 GB; CPU 25 % mean, 25 % max; memory 3 of 64 GB"
    assert utilization_lines(outcome) == [line]
    assert outcome_rows(outcome)["Utilization"] == line.removeprefix("Run train used ")
    plain = json.loads(json.dumps(outcome_dict(outcome)))
    assert Outcome.from_dict(plain) == outcome
    page = utilization_chart({"run_name": "<b>", **plain["utilization"]})
    assert page["text"] == f"The run used {line.removeprefix('Run train used ')}."
    assert "<polyline" in page["svg"]
    assert "<b>" not in page["svg"]


def test_no_request_without_the_option_or_without_values(driver: Driver) -> None:
    script = MetricsScript(runs__get=[reply(ended(100))], metrics__job=[metrics_reply(9)])
    outcome = finish(driver, script, utilization=False)
    assert outcome.utilization is None
    assert script.queries == []
    assert utilization_lines(outcome) == []
    assert "Utilization" not in outcome_rows(outcome)
    short = MetricsScript(runs__get=[reply(ended(9))], metrics__job=[metrics_reply(9)])
    assert finish(driver, short).utilization is None
    assert short.queries == []
    without = ended(100)
    for submission in (without["latest_job_submission"], without["jobs"][0]["job_submissions"][-1]):
        submission["job_provisioning_data"] = submission["job_runtime_data"] = None
    script = MetricsScript(runs__get=[reply(without)], metrics__job=[metrics_reply(9)])
    assert finish(driver, script).utilization is None
    assert script.queries == []


@pytest.mark.parametrize(
    "answer",
    [LOST, reply({"detail": "no"}, 404), reply({"metrics": []}), reply({"metrics": 3}), reply({}, 500)],
)
def test_a_server_without_metrics_costs_one_request_and_no_outcome(driver: Driver, answer: Any) -> None:
    script = MetricsScript(runs__get=[reply(ended(100))], metrics__job=[answer])
    outcome = finish(driver, script)
    assert outcome.succeeded
    assert outcome.utilization is None
    assert len(script.queries) == 1
    assert driver.clock.slept == []


def test_a_long_run_is_read_every_45_minutes_and_only_what_is_new(driver: Driver) -> None:
    driver.clock.now = START.timestamp()
    running = run_json("running", submitted_at=START.isoformat())
    hour = START + timedelta(minutes=45)
    answers = [metrics_reply(270), metrics_reply(270, hour), metrics_reply(60, START + timedelta(minutes=90))]
    polls = [reply(running)] * 1201 + [reply(ended(6000))]
    script = MetricsScript(runs__get=polls, runs__get_plan=[reply({}, 500)], metrics__job=answers)
    outcome = finish(driver, script)
    usage = outcome.utilization
    assert usage is not None
    assert len(script.queries) == 3
    assert "after" not in script.queries[0]
    assert "after=2026-11-27T12%3A44%3A50%2B00%3A00" in script.queries[1]
    assert usage.points == 600
    assert usage.seconds == pytest.approx(5990, abs=150)
    assert len(usage.series.times) == 60
    assert (usage.gpu_mean, usage.gpu_max) == (30.0, 40.0)


def test_the_values_of_an_attempt_are_read_before_the_server_repeats_it(driver: Driver) -> None:
    driver.clock.now = START.timestamp() + 290
    failed = ended(300)
    failed |= {"status": "pending", "status_message": "pending"}
    for submission in (failed["latest_job_submission"], failed["jobs"][0]["job_submissions"][-1]):
        submission |= {"status": "failed", "termination_reason": "container_exited_with_error"}
    running = run_json("running", submitted_at=START.isoformat())
    polls = [reply(running)] * 3 + [reply(failed)] * 4 + [reply(running)] * 3 + [reply(ended(600))]
    answers = [metrics_reply(30), metrics_reply(10, START + timedelta(seconds=400))]
    script = MetricsScript(runs__get=polls, runs__get_plan=[reply({}, 500)], metrics__job=answers)
    usage = finish(driver, script).utilization
    assert usage is not None
    # One request for each attempt, however often the run is polled in between.
    assert len(script.queries) == 2
    assert usage.points == 40


def test_a_run_that_is_terminating_is_read_once_at_its_end(driver: Driver) -> None:
    driver.clock.now = START.timestamp() + 290
    terminating = ended(300) | {"status": "terminating"}
    polls = [reply(terminating)] * 3 + [reply(ended(300))]
    script = MetricsScript(runs__get=polls, runs__get_plan=[reply({}, 500)], metrics__job=[metrics_reply(30)])
    assert finish(driver, script).utilization is not None
    assert len(script.queries) == 1


def test_an_attempt_that_got_no_machine_costs_no_request(driver: Driver) -> None:
    driver.clock.now = START.timestamp() + 290
    failed = ended(300)
    failed |= {"status": "pending", "status_message": "pending"}
    for submission in (failed["latest_job_submission"], failed["jobs"][0]["job_submissions"][-1]):
        submission |= {"status": "failed", "job_provisioning_data": None, "job_runtime_data": None}
    script = MetricsScript(runs__get=[reply(failed)] * 3 + [reply(ended(600))], metrics__job=[reply({}, 500)])
    finish(driver, script)
    assert len(script.queries) == 1


def test_another_process_continues_the_sum(driver: Driver) -> None:
    first = UtilizationSoFar(START.timestamp(), {"0.0": START.timestamp()}, utilization_of(gpu_job(90), A100))
    kept = Progress("train", "id-1", utilization=first)
    progress = Progress.from_dict(json.loads(json.dumps(kept.to_dict())))
    assert progress == kept
    script = MetricsScript(
        runs__get=[reply(ended(1800))],
        runs__get_plan=[reply({}, 500)],
        metrics__job=[metrics_reply(90, START + timedelta(minutes=15))],
    )
    outcome = finish(driver, script, progress)
    assert outcome.utilization is not None
    assert outcome.utilization.points == 180


def plan(price: float, memory_mib: int, availability: str = "available") -> Any:
    offer = {
        "backend": "aws",
        "region": "eu",
        "price": price,
        "availability": availability,
        "instance": {"name": "g5", "resources": {"gpus": [{"name": "A10G", "memory_mib": memory_mib}]}},
    }
    return reply({"job_plans": [{"offers": [offer], "total_offers": 1, "max_price": price}]})


@pytest.mark.parametrize(
    ("count", "offer", "advice"),
    [
        (
            90,
            plan(0.4, 24576),
            "GPU memory peaked at 11 of 80 GB: at today's offers a machine with 24 GB (A10G) costs 0.40 USD per "
            "hour instead of 1.20 USD.",
        ),
        (90, plan(1.0, 24576), ""),
        (90, plan(0.4, 24576, "not_available"), ""),
        (90, reply({}, 500), ""),
        (30, plan(0.4, 24576), ""),
    ],
)
def test_advice_only_for_a_long_run_and_a_real_saving(
    driver: Driver, count: int, offer: Any, advice: str
) -> None:
    script = MetricsScript(
        runs__get=[reply(ended(1800))], runs__get_plan=[offer], metrics__job=[metrics_reply(count)]
    )
    outcome = finish(driver, script)
    assert outcome.utilization is not None
    assert outcome.utilization.advice == advice
    assert utilization_lines(outcome)[1:] == ([advice] if advice else [])
    asked = script.bodies("runs/get_plan")
    assert len(asked) == (1 if count == 90 else 0)
    for body in asked:
        spec = body["run_spec"]
        wanted = {"count": {"min": 1, "max": 1}, "memory": {"min": 14, "max": 79}, "vendor": "nvidia"}
        assert spec["configuration"]["resources"]["gpu"] == wanted
        assert spec["run_name"] is None


def test_offers_know_their_gpus() -> None:
    (offer,) = parse_plan(json.loads(plan(0.4, 24576).body)).offers
    assert offer == Offer("aws", "eu", "g5", 0.4, False, "available", "A10G", 1, 24 * GIB)


# What ``run.metrics()`` requests.


def test_all_jobs_or_the_chosen_one(driver: Driver) -> None:
    data = ended(100)
    second = json.loads(json.dumps(data["jobs"][0]))
    second["job_spec"]["job_num"] = 1
    data["jobs"].append(second)
    run = parse_run(data)
    script = MetricsScript(metrics__job=[metrics_reply(3)])
    metrics = driver.run(read_metrics(API, run, node=None, replica=None, limit=5), script)
    assert [each.node for each in metrics] == [0] * 4 + [1] * 4
    assert metrics.hardware == A100
    assert metrics.summary().gpus == 2
    assert script.paths() == []
    assert len(script.queries) == 2
    metrics = driver.run(read_metrics(API, run, node=1, replica=None, limit=5), script)
    assert {each.node for each in metrics} == {1}
    driver.run(read_metrics(API, run, node=3, replica=None, limit=5), script)
    assert "replica_num=0&job_num=3&" in script.queries[-1]


def test_a_run_that_had_no_machine_when_it_was_polled_is_fetched(driver: Driver) -> None:
    run = parse_run(recorded("runs_apply_e2e_0.22.5"))
    script = MetricsScript(runs__get=[reply(ended(100))], metrics__job=[metrics_reply(3)])
    metrics = driver.run(read_metrics(API, run, node=None, replica=None, limit=5), script)
    assert metrics.hardware == A100
    assert script.paths() == ["runs/get"]


def test_an_unreachable_server_raises_from_metrics(driver: Driver) -> None:
    operations = Operations(API, 0.0, clock=driver.clock)
    script = MetricsScript(metrics__job=[LOST])
    with pytest.raises(ServerUnreachableError):
        driver.run(operations.metrics(parse_run(ended(100)), node=None, replica=None, limit=None), script)


def test_the_api_of_a_project() -> None:
    call = Api("https://host", "main").get_metrics("r", "i", node=0, replica=0, limit=1, after=START)
    assert call.request.path.endswith("limit=1&after=2026-11-27T12%3A00%3A00%2B00%3A00")


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [],
        {},
        {"run_name": "r", "series": 3},
        {"run_name": "r", "series": {"times": [1, 2]}, "gpu_mean": "much"},
        {"run_name": "r", "series": {"times": ["a", "b"], "gpu_percent": [1, 2]}},
        {"run_name": "r", "series": {"times": [1], "gpu_percent": [{}]}},
        {"run_name": "r", "gpu_memory_peak": "</text><script>"},
    ],
)
def test_a_page_is_made_of_a_utilization_only(data: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        utilization_chart(data)
