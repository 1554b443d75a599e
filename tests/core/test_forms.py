"""Each form that dstack 0.22.5's own client reads, and what we send for it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from dstack_core import GPU, Configuration, ConfigurationError, Resources, Service, Task, load_configuration
from dstack_core._wire.spec import run_spec
from dstack_core._wire.versions import check, needs_of
from dstack_core.errors import UnsupportedServerError
from dstack_core.integration import check_ends
from dstack_core.models.options import SubmitOptions
from dstack_core.models.profiles import Profile

TASK = {"type": "task", "commands": ["x"]}
SERVICE = {"type": "service", "port": 80}


def sent(data: dict[str, Any], **options: Any) -> dict[str, Any]:
    configuration: dict[str, Any] = spec_of(data, **options)["configuration"]
    return configuration


def spec_of(data: dict[str, Any], **options: Any) -> dict[str, Any]:
    return run_spec(load_configuration(data), cast(SubmitOptions, options))


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("python", 3.1, "3.10"),  # YAML reads 3.10 so, and Airflow's native rendering
        ("python", 3.12, "3.12"),
        ("python", "3.10", "3.10"),
        ("commands", [42, 1.5, "x"], ["42", "1.5", "x"]),
        ("max_price", "2.5", 2.5),
        ("nodes", "2", 2),
        ("nodes", 2.0, 2),
        ("priority", "7", 7),
        ("privileged", "yes", True),
        ("user", 1000, "1000"),
        ("regions", [1], ["1"]),
        ("availability_zones", ["b-1", 7], ["b-1", "7"]),
        ("reservation", 5, "5"),
        ("retry", "true", True),
        ("retry", False, False),
        ("retry", {"duration": "1h"}, {"duration": "1h"}),
        ("idle_duration", 0, 0),
        ("idle_duration", "0", "0"),
        ("idle_duration", -7, -7),
        ("idle_duration", True, True),
        ("idle_duration", False, False),
        ("max_duration", 0, 0),
        ("max_duration", 1.5, 1),
        ("max_duration", True, True),
        ("max_duration", "5 m", "5 m"),
        ("stop_duration", "90", "90"),
        ("working_dir", "~/x", "~/x"),
        ("working_dir", "~", "~"),
        ("working_dir", "/app", "/app"),
        ("working_dir", "src", "/workflow/src"),
        ("registry_auth", {"username": 1, "password": 2}, {"username": "1", "password": "2"}),
        ("instances", ["i", {"hostname": "h"}], ["i", {"hostname": "h"}]),
        ("backend_options", [{"type": "vastai", "min_score": 3}], [{"type": "vastai", "min_score": 3}]),
        (
            "groups",
            [{"commands": [1], "nodes": 2}, {"commands": ["b"]}],
            [{"commands": ["1"], "nodes": 2}, {"commands": ["b"]}],
        ),
    ],
)
def test_forms_of_a_task(key: str, given: Any, wanted: Any) -> None:
    value = sent({**TASK, key: given})[key]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("replicas", 2, 2),
        ("replicas", "2", "2"),
        ("replicas", "0..4", "0..4"),
        ("replicas", {"min": 1, "max": 2}, {"min": 1, "max": 2}),
        (
            "replicas",
            [{"count": 1, "commands": [5], "python": 3.1}, {"replicas": "1..2", "commands": ["b"]}],
            [{"count": 1, "commands": ["5"], "python": "3.10"}, {"replicas": "1..2", "commands": ["b"]}],
        ),
        ("groups", [{"replicas": 1, "commands": ["a"]}], [{"replicas": 1, "commands": ["a"]}]),
        ("port", "8000", "8000"),
        ("port", 8000.0, 8000),
        ("port", {"container_port": 8000}, {"container_port": 8000, "local_port": None}),
        ("https", "auto", "auto"),
        ("gateway", True, True),
    ],
)
def test_forms_of_a_service(key: str, given: Any, wanted: Any) -> None:
    assert sent({**SERVICE, key: given})[key] == wanted


def test_a_name_that_is_a_number_is_read_as_text() -> None:
    assert load_configuration({**TASK, "name": 123}).name == "123"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"commands": ["x"]},
            r"expected one of `type: task`, `type: service`, `type: dev-environ.*, got none\.",
        ),
        ({"type": "job"}, r"expected one of `type: task`.*, got 'job'\."),
        ({"type": ["task"]}, r"expected one of `type: task`.*, got \['task'\]"),
        ({**TASK, "commands": [True]}, r"Task\.commands, item 1: expected a string, got"),
        ({**TASK, "name": True}, r"Task\.name: "),
        ({**TASK, "max_price": "cheap"}, r"Task\.max_price: expected USD per hour above 0, got 'cheap'"),
        ({**TASK, "max_price": "inf"}, r"Task\.max_price: expected USD per hour above 0, got 'inf'"),
        ({**TASK, "nodes": 2.5}, r"Task\.nodes: "),
        ({**TASK, "groups": "a"}, r"Task\.groups"),
        (
            {**TASK, "max_duration": "long"},
            r"Task\.max_duration: expected seconds, or a string .* got 'long'",
        ),
    ],
)
def test_what_dstack_refuses_is_refused(data: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        load_configuration(data)


def test_the_home_of_another_user_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"working_dir: expected a path such as ~/x, got '~root/x'"):
        sent({**TASK, "working_dir": "~root/x"})


MINIMUM = {"count": "2..", "name": ["A100"], "memory": "40GB.."}


@pytest.mark.parametrize(
    ("gpu", "wanted"),
    [
        ("A100:40GB:2", MINIMUM),
        (GPU(name="A100", memory="40GB", count=2), MINIMUM),
        ("24GB", {"count": "1..", "memory": "24GB.."}),
        ("24GB..80GB", {"count": "1..", "memory": "24GB..80GB"}),
        ("A100,H100", {"count": "1..", "name": ["A100", "H100"]}),
        (" amd : MI300X : 2..8", {"count": "2..8", "name": ["MI300X"], "vendor": "amd"}),
        (1, {"count": "1.."}),
        (0, {"count": "0"}),
    ],
)
def test_the_short_forms_of_a_gpu_are_minimums_in_resources(gpu: Any, wanted: dict[str, Any]) -> None:
    assert sent({**TASK, "resources": Resources(gpu=gpu)})["resources"] == {"gpu": wanted, "disk": None}
    assert sent(TASK, resources=Resources(gpu=gpu))["resources"] == {"gpu": wanted, "disk": None}


def test_an_architecture_of_the_cpu() -> None:
    for cpu, wanted in (("arm:4", "arm:4.."), ("x86:4..8", "x86:4..8"), ("arm", "arm"), (4, "4..")):
        assert sent({**TASK, "resources": Resources(cpu=cpu)})["resources"]["cpu"] == wanted
    with pytest.raises(ConfigurationError, match=r"Resources\.cpu: expected .*'x'"):
        Resources(cpu="arm:x")


@pytest.mark.parametrize("gpu", ["", ":", "A100:H100", "24GB:40GB", "1:2", "24XB", "amd:nvidia", True, [1]])
def test_a_wrong_short_form_is_refused(gpu: Any) -> None:
    with pytest.raises(ConfigurationError):
        Resources(gpu=gpu)
    with pytest.raises(ConfigurationError, match=r"resources: |GPU\.memory: expected a size .*, got '24XB'"):
        sent(TASK, resources=gpu)


@pytest.mark.parametrize("as_option", [True, False])
@pytest.mark.parametrize(
    ("resources", "wanted"),
    [
        ({"gpu": "24GB", "memory": 16}, {"gpu": "24GB", "memory": 16}),
        ("24GB..", {"gpu": "24GB.."}),
        ("A100:40GB:2", {"gpu": "A100:40GB:2"}),
        (1, {"gpu": 1}),
    ],
)
def test_resources_mean_the_same_in_an_option_and_in_a_configuration(
    resources: Any, wanted: Any, as_option: bool
) -> None:
    got = sent(TASK, resources=resources) if as_option else sent({**TASK, "resources": resources})
    assert got["resources"] == wanted


@pytest.mark.parametrize(
    ("data", "need", "first"),
    [
        ({**TASK, "working_dir": "~/x"}, "working_dir outside of /workflow", (0, 19, 27)),
        ({**TASK, "working_dir": "/workflows"}, "working_dir outside of /workflow", (0, 19, 27)),
        ({**TASK, "retry": {"duration": "1h"}}, "retry without on_events", (0, 19, 0)),
        ({**SERVICE, "replicas": [{"count": 1}]}, "replicas in groups", (0, 20, 7)),
        ({**TASK, "groups": [{"commands": ["x"]}]}, "groups of a task", (0, 21, 2)),
        ({**SERVICE, "groups": [{"commands": ["x"]}]}, "groups of a service", (0, 21, 3)),
        ({**SERVICE, "https": "auto"}, "https: auto", (0, 20, 12)),
        ({**SERVICE, "gateway": True}, "gateway: true", (0, 20, 1)),
        ({**TASK, "resources": {"cpu": "arm:4"}}, "cpu with an architecture", (0, 19, 8)),
        ({**TASK, "resources": {"cpu": {"arch": "arm"}}}, "cpu with an architecture", (0, 19, 8)),
        ({**TASK, "python": "3.15"}, "python 3.15", (0, 22, 5)),
        ({"type": "dev-environment"}, "a dev-environment without ide", (0, 20, 14)),
    ],
)
def test_what_an_old_server_does_not_read_is_reported_before_submitting(
    data: dict[str, Any], need: str, first: tuple[int, int, int]
) -> None:
    needs = needs_of(spec_of(data))
    assert needs == (need,)
    check(needs, first, "http://server")
    with pytest.raises(UnsupportedServerError, match=f"^{need}: needs dstack >= "):
        check(needs, (first[0], first[1], first[2] - 1) if first[2] else (0, 18, 44), "http://server")


@pytest.mark.parametrize(
    "data",
    [
        {**TASK, "working_dir": "src", "retry": True, "resources": {"cpu": 4}, "python": "3.12"},
        {**TASK, "working_dir": "/workflow", "retry": {"on_events": ["error"]}, "resources": {"cpu": "2..4"}},
        {**SERVICE, "replicas": "1..2", "https": True, "gateway": False},
        {"type": "dev-environment", "ide": "vscode"},
    ],
)
def test_what_every_server_reads_needs_no_version(data: dict[str, Any]) -> None:
    assert needs_of(spec_of(data)) == ()


DEV = load_configuration({"type": "dev-environment", "ide": "vscode"})


@pytest.mark.parametrize(
    ("configuration", "max_duration", "profile"),
    [
        (Task(commands=["x"]), None, None),
        (Service(port=80, commands=["x"]), None, None),
        (DEV, "2h", None),
        (DEV, 7200, None),
        (DEV.model_copy(update={"max_duration": "2h"}), None, None),
        (DEV, None, Profile(max_duration="2h")),
        (DEV.model_copy(update={"max_duration": True}), None, Profile(max_duration=60)),
    ],
)
def test_a_configuration_that_ends_is_accepted(
    configuration: Configuration, max_duration: Any, profile: Profile | None
) -> None:
    check_ends(configuration, max_duration, profile)


@pytest.mark.parametrize(
    ("configuration", "max_duration", "profile"),
    [
        (DEV, None, None),
        (DEV, "off", None),
        (DEV, False, Profile(max_duration="2h")),
        (DEV.model_copy(update={"max_duration": "off"}), None, Profile(max_duration="2h")),
        (DEV, None, Profile(max_price=1)),
    ],
)
def test_a_dev_environment_without_a_limit_is_refused(
    configuration: Configuration, max_duration: Any, profile: Profile | None
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_ends(configuration, max_duration, profile)
    assert str(caught.value) == (
        "configuration: expected a configuration that ends, got a dev-environment without max_duration. "
        'Use `type: task`, or set max_duration, such as "2h", at which the run ends as failed.'
    )


@pytest.mark.parametrize("max_duration", [None, "2h"])
def test_a_schedule_is_refused(max_duration: Any) -> None:
    schedule = {"cron": "0 8 * * *"}
    for configuration, profile in (
        (Task(commands=["x"], schedule=schedule), None),
        (Task(commands=["x"]), Profile(schedule=schedule)),
    ):
        with pytest.raises(
            ConfigurationError, match=r"schedule: expected a configuration that ends, got one"
        ):
            check_ends(configuration, max_duration, profile)
