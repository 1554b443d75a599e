"""A run that reports 100 metrics a second for a minute, while the process that receives them is killed.

Airflow's real components, a real dstack server. Airflow keeps the last value of a metric, so a journal notes
each message that any process receives before the provider keeps it (``report_journal``). Judged is:

* What Airflow keeps has each message exactly once, in order. A process continues with a state that another
  one saved. Messages that a killed process received after its last save died with it, and its successor
  receives them again: they count once, because the state of the successor lacks them. So the journal is read
  as the states are: what a receiver got is appended behind the message that its first state ends with.
* Each process by itself receives no message twice and leaves none out, whatever page it continues in.
* What users see: the XComs and the outcome have the last values, one run was submitted, no message is shown
  as a log line, and each of the run's lines is in the log.
"""

from __future__ import annotations

import itertools
import signal
import statistics
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.provider_airflow.components import Components
from tests.provider_airflow.report_journal import NAME, Receipt, receipts
from tests.provider_airflow.support import runs_of, wait_for
from tests.rig.server import RealServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
    pytest.mark.real,
    pytest.mark.long,
    pytest.mark.timeout(600),
]

_COUNT, _PER_SECOND = 6000, 100
_KILLED_AT = 2000
_SECONDS = 240.0
# A log line follows each message. The pace is that of the clock, so a pause of the machine is made up for.
_SCRIPT = """
import json, time
start = time.time()
for step in range(1, {count} + 1):
    time.sleep(max(0.0, start + step / {per_second} - time.time()))
    message = {{"kind": "metric", "case": {case}, "step": step, "sent": time.time()}}
    print("::dstack::" + json.dumps(message), f"line-{{step}}", sep="\\n", flush=True)
"""


class Reporting:
    """A DAG run with one task, whose run reports ``_COUNT`` metrics with a log line after each."""

    def __init__(self, components: Components, server: RealServer, folder: Path, dag_id: str) -> None:
        self.components = components
        self.server = server
        self.dag_id = dag_id
        self.case = uuid.uuid4().int >> 96
        script = folder / "report.py"
        script.write_text(_SCRIPT.format(count=_COUNT, per_second=_PER_SECOND, case=self.case))
        self.dag_run = components.trigger(dag_id, command=f"python3 {script}")

    def receipts(self) -> list[Receipt]:
        return receipts(self.components.home, self.case)

    def wait_for_message(self, step: int) -> None:
        def received() -> bool:
            return any(one.step >= step for one in self.receipts())

        wait_for(f"message {step}", received, _SECONDS)

    def wait_for_next_page(self) -> None:
        """Return as soon as another message is received, most likely in the middle of a page."""
        journal = self.components.home / NAME
        size = journal.stat().st_size
        wait_for("next page", lambda: journal.stat().st_size > size, _SECONDS, look_every=0.005)

    def saved_step(self) -> int:
        """Return the step of the last message in the state that was saved in Airflow, 0 without one."""
        state = self.components.xcom(self.dag_id, self.dag_run, "dstack_progress") or {}
        metrics = (state.get("reported") or {}).get("dstack_metrics", {})
        return int(metrics["case"]["step"]) if metrics else 0

    def lines(self, attempt: int) -> list[str]:
        return self.components.log_lines(self.dag_id, self.dag_run, attempt)

    def finish(self) -> list[Receipt]:
        """Return what was received, once the task has succeeded and shows what the run reported."""
        self.components.wait_for_state(self.dag_id, self.dag_run, "success", seconds=_SECONDS)
        (run,) = runs_of(self.server, f"airflow:{self.dag_id}/{self.dag_run}/")
        result = self.components.result(self.dag_id, self.dag_run)
        assert (result["run_id"], result["status"]) == (run.id, "done")
        found = self.receipts()
        last = {"case": float(self.case), "sent": found[-1].sent}
        assert result["metrics"] == last
        metrics = self.components.xcom(self.dag_id, self.dag_run, "dstack_metrics")
        assert metrics == {name: {"value": value, "step": _COUNT} for name, value in last.items()}
        return found


def by_receiver(found: list[Receipt]) -> list[list[Receipt]]:
    """Return the receipts of each receiver, in the order of their first ones."""
    names = dict.fromkeys(one.receiver for one in found)
    return [[one for one in found if one.receiver == name] for name in names]


def assert_kept_once_and_in_order(found: list[Receipt]) -> None:
    kept: list[int] = []
    for received in by_receiver(found):
        steps, since = [one.step for one in received], received[0].since
        assert steps == list(range(since + 1, since + 1 + len(steps)))
        assert since <= len(kept)
        kept = kept[:since] + steps
    assert kept == list(range(1, _COUNT + 1))


def seconds_on_the_way(found: list[Receipt]) -> tuple[list[float], list[float]]:
    """Return how long messages took to their first receiver: usually, and where the receiver changed.

    The change held up what was sent before the new receiver received anything, and was not received before.
    """
    usual, held_up, seen = list[float](), list[float](), set[int]()
    for number, received in enumerate(by_receiver(found)):
        for one in received:
            if one.step not in seen:
                is_usual = number == 0 or one.sent >= received[0].at
                (usual if is_usual else held_up).append(one.at - one.sent)
        seen.update(one.step for one in received)
    return usual, held_up


@pytest.fixture
def start(real_components: Components, real_server: RealServer, tmp_path: Path) -> Callable[[str], Reporting]:
    return lambda dag_id: Reporting(real_components, real_server, tmp_path, dag_id)


@pytest.fixture
def show(record_property: Callable[[str, object], None]) -> Callable[[list[Receipt]], None]:
    """Return a function that prints and records how long messages took, and how many came again."""

    def shown(found: list[Receipt]) -> None:
        usual, held_up = seconds_on_the_way(found)
        hundredths = statistics.quantiles(usual, n=100)
        record_property("from the run to Airflow: median", f"{hundredths[49]:.1f} s")
        record_property("95 %", f"{hundredths[94]:.1f} s")
        received = [(one[0].since, len(one)) for one in by_receiver(found)]
        print(  # noqa: T201 - shown with -s
            f"\n{len(usual)} of {_COUNT} messages: p50 {hundredths[49]:.2f} s, p95 {hundredths[94]:.2f} s, "
            f"max {max(usual):.2f} s; the others, where the receiver changed: up to {max(held_up):.2f} s.\n"
            f"Receivers (last step of the first state, messages received): {received}"
        )

    return shown


def test_a_retry_keeps_each_message_of_a_busy_run_of_a_killed_task_once(
    start: Callable[[str], Reporting], show: Callable[[list[Receipt]], None]
) -> None:
    one = start("reporting")
    one.wait_for_message(_KILLED_AT)
    process = psutil.Process(one.components.task(one.dag_id, one.dag_run)["pid"])
    one.wait_for_next_page()
    process.kill()
    found = one.finish()
    show(found)
    assert_kept_once_and_in_order(found)
    killed, retried = by_receiver(found)
    assert killed[-1].step < _COUNT
    # A retry has a log and XComs of its own, so it begins at the first message.
    assert retried[0].since == 0
    lines = one.lines(attempt=2)
    assert [line for line in lines if line.startswith("line-")] == [f"line-{n}" for n in range(1, _COUNT + 1)]
    assert [line for attempt in (1, 2) for line in one.lines(attempt) if "::dstack" in line] == []


def test_a_triggerer_keeps_each_message_of_a_busy_run_of_a_killed_one_once(
    start: Callable[[str], Reporting], show: Callable[[list[Receipt]], None]
) -> None:
    one = start("reporting_deferred")
    one.components.wait_for_state(one.dag_id, one.dag_run, "deferred", seconds=_SECONDS)
    one.wait_for_message(_KILLED_AT)
    # A trigger saves its first message, and from then on every ten seconds.
    wait_for("position in the middle", lambda: one.saved_step() >= _KILLED_AT, _SECONDS)
    one.wait_for_next_page()
    one.components.signal_one("triggerer", signal.SIGKILL)
    one.components.end_one("triggerer")
    killed = one.receipts()
    one.components.start_one("triggerer")
    found = one.finish()
    show(found)
    assert_kept_once_and_in_order(found)
    assert killed[-1].step < _COUNT
    # If the run ends before the new triggerer has caught up, the resumed task receives the rest.
    assert killed[-1].receiver == found[len(killed) - 1].receiver != found[len(killed)].receiver
    assert _KILLED_AT <= found[len(killed)].since <= killed[-1].step
    lines = one.lines(attempt=1)
    numbers = [int(line.removeprefix("line-")) for line in lines if line.startswith("line-")]
    # Documented: lines of the seconds before the kill may be logged again, once, and none is missing.
    again = [after for before, after in itertools.pairwise(numbers) if after != before + 1]
    assert len(again) <= 1
    assert list(dict.fromkeys(numbers)) == list(range(1, _COUNT + 1))
    assert [line for line in lines if "::dstack" in line] == []
