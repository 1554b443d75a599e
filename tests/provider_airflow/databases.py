"""The databases that real Airflow components may have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.postgres import PostgresMissing, postgres_url

DATABASE_URL = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"


def migrate(url: str, home: Path) -> None:
    """Create Airflow's tables in a database."""
    airflow = Path(sys.executable).with_name("airflow")
    done = subprocess.run(
        [airflow, "db", "migrate"],
        env={**os.environ, "AIRFLOW_HOME": str(home), DATABASE_URL: url},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, f"airflow db migrate: {done.stderr[-3000:]}"


@contextmanager
def best_database(home: Path) -> Iterator[str]:
    """Yield the URL of a migrated database: Postgres where that is installed, else sqlite."""
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgres_url())
        except PostgresMissing:
            url = f"sqlite:///{home / 'airflow.db'}"
        migrate(url, home)
        yield url
