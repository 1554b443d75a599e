from __future__ import annotations

import pytest

from tests.core.scripted import Driver
from tests.settings import no_settings_of_this_machine


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Driver:
    return Driver(request.param)


_no_settings_of_this_machine = pytest.fixture(autouse=True)(no_settings_of_this_machine)
