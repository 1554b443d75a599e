"""Run the body of a Python function on a GPU with ``@task.dstack``; its result is the task's XCom.

The run gets the function's source, so the function imports what it needs in its body. Needs the connection
``dstack_default``.
"""

from __future__ import annotations

from airflow.sdk import DAG, task

with DAG("example_dstack_function", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:

    @task
    def rates() -> list[float]:
        """Choose the learning rates to try."""
        return [0.001, 0.01, 0.05]

    @task.dstack(
        python="3.11",
        resources={"gpu": {"memory": "16GB.."}},
        # For example: requirements=["torch==2.9"]
        max_duration="1h",
        deferrable=True,
        poll_interval=2.0,
    )
    def train(rate: float, epochs: int) -> dict[str, float]:
        """Fit a line, and return the loss."""
        import random

        random.seed(1)
        samples = [(x / 50, 3 * x / 50 - 1 + random.gauss(0, 0.05)) for x in range(100)]
        slope = offset = loss = 0.0
        for epoch in range(1, epochs + 1):
            for x, y in samples:
                error = slope * x + offset - y
                slope -= rate * error * x
                offset -= rate * error
            loss = sum((slope * x + offset - y) ** 2 for x, y in samples) / len(samples)
            print(f"epoch {epoch} loss {loss:.4f}")  # noqa: T201 - it becomes the log
        return {"rate": rate, "loss": loss}

    @task
    def best(results: list[dict[str, float]]) -> float:
        """Choose the rate with the smallest loss."""
        return min(results, key=lambda result: result["loss"])["rate"]

    best(train.partial(epochs=5).expand(rate=rates()))  # type: ignore[arg-type]  # resolved when it runs
