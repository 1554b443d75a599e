"""Postgres for the real components: started if it is installed, otherwise reported as missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import postgres


def test_missing_postgres_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "_DEBIAN", tmp_path)
    with (
        pytest.raises(
            postgres.PostgresMissing, match=r"there is no initdb .* install the package postgresql"
        ),
        postgres.postgres_url(),
    ):
        pass
