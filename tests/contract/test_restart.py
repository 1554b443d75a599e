"""A real server that is restarted while its runs are followed: the fast version of ``make test-faults``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.core import ADAPTERS
from tests.faults.restarts import MOMENTS, Moment, try_moment
from tests.faults.restarts_at_requests import WAYS, Way, try_at_requests
from tests.rig.server import RealServer

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def own_server() -> Iterator[RealServer]:
    """Start a separate server, so that no other test sees it end."""
    with RealServer(images=True, impatient=True, hosts=len(ADAPTERS)) as server:
        yield server


@pytest.mark.timeout(900)
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
def test_a_restart_loses_no_line_and_no_run(own_server: RealServer, moment: Moment) -> None:
    results = try_moment(own_server, moment, ADAPTERS)
    assert [(one.adapter, one.reached, one.flaw) for one in results] == [
        (name, True, "") for name in ADAPTERS
    ]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_a_restart_at_a_request_loses_no_line_and_no_run(own_server: RealServer, way: Way) -> None:
    # The submission, and a request while the run is followed; one restart hits both.
    results = try_at_requests(own_server, way, ADAPTERS, [3, 10])
    assert [(one.adapter, one.step, one.reached, one.flaw) for one in results] == [
        (name, step, True, "") for step in (3, 10) for name in ADAPTERS
    ]
