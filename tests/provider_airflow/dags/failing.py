"""A DAG whose runs fail, for the pictures of what Airflow shows of that; its params name a file to wait for."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

from airflow.sdk import DAG, BaseNotifier

from airflow_provider_dstack.operators import DstackRunOperator
from dstack_core import CallbackEvent, Run, RunCallbacks
from dstack_core._flow import partial_lines

# What comes after a minute of waiting, or 10 s of an unfinished line, comes at once.
Run.follow = partialmethod(Run.follow, waiting_interval=1.5)  # type: ignore[assignment]
partial_lines._OPEN_SECONDS = 1.0

BATCHES = r"printf '\repoch 1: %3d of 800 batches' $((i += 5)); sleep 0.3"
TRAINING = [
    "echo ::group::Install packages",
    "echo Successfully installed torch-2.9.1",
    "echo ::endgroup::",
    f"i=0; until [ -e {{{{ params.gate }}}} ]; do {BATCHES}; done",
    r"printf '\repoch 1: 800 of 800 batches\n'",
    "echo epoch 1 loss 0.9346",
    "evaluate-model --stage $STAGE",
]


class Announce(RunCallbacks):
    """Callbacks as those of the documentation, which print instead of writing to a chat."""

    def on_submitted(self, event: CallbackEvent) -> None:
        """Announce the run."""
        print(f"{event.source['task_id']}: {event.url}")  # noqa: T201

    def on_ended(self, event: CallbackEvent) -> None:
        """Announce its end."""
        print(f"{event.run_name} is {event.status}, {event.outcome and event.outcome.cost:.2f} USD")  # noqa: T201


class Notifier(BaseNotifier):
    """The notifier of the documentation."""

    def notify(self, context: Any) -> None:
        """Print why the run failed."""
        outcome = getattr(context["exception"], "outcome", None) or {}
        print(f"{outcome.get('run_name')} failed: {outcome.get('category')}, {outcome.get('reason')}")  # noqa: T201


with DAG("failing", schedule=None, params={"gate": "/", "connection": "dstack_default"}):
    DstackRunOperator(
        task_id="train",
        configuration={"type": "task", "commands": TRAINING, "resources": {"gpu": "A100:8"}},
        env={"STAGE": "train", "API_KEY": "4f9a7c21d08e-key"},
        tags={"team": "vision"},
        log_groups=True,
        dstack_conn_id="{{ params.connection }}",
        poll_interval=0.5,
    )
    DstackRunOperator(
        task_id="debug",
        configuration={"type": "task", "commands": ["echo 'epoch 1 loss nan'", "exit 3"]},
        debug_on_failure="30m",
        poll_interval=0.5,
    )
    DstackRunOperator(
        task_id="notify",
        configuration={"type": "task", "commands": ["echo epoch 1 loss 0.9346", "evaluate-model"]},
        callbacks=Announce,
        on_failure_callback=Notifier(),
        poll_interval=0.5,
    )
