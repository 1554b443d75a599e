"""Volumes of the embedded server: the replies of a real 0.22.5, and directories that outlive their runs."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.local.support import Api, ending, wait_until

GONE = (400, "resource_not_exists", "Resource not found")
AWS = {"type": "volume", "backend": "aws", "region": "us-east-1", "size": "100GB"}


def create(api: Api, name: str = "data", *, wait: bool = True, **changes: Any) -> Any:
    made = api.ok("{p}/volumes/create", {"configuration": {**AWS, "name": name, **changes}})
    return wait_until(lambda: active(api, name)) if wait else made


def get(api: Api, name: str = "data") -> Any:
    return api.ok("{p}/volumes/get", {"name": name})


def active(api: Api, name: str = "data") -> Any:
    found = get(api, name)
    return found if found["status"] == "active" else None


def delete(api: Api, *names: str) -> None:
    assert api.ok("{p}/volumes/delete", {"names": list(names)}) is None


def refusal(api: Api, path: str, body: Any) -> tuple[int, str, str]:
    reply = api.call(path, body)
    detail = reply.json()["detail"][0]
    return reply.status_code, detail["code"], detail["msg"]


def refused_run(api: Api, *mounts: Any, **configuration: Any) -> tuple[int, str, str]:
    task = {"type": "task", "commands": ["true"], "volumes": list(mounts), **configuration}
    body = {"plan": {"run_spec": {"run_name": "refused", "configuration": task}}, "force": False}
    return refusal(api, "{p}/runs/apply", body)


def refused(api: Api, **changes: Any) -> tuple[int, str, str]:
    return refusal(api, "{p}/volumes/create", {"configuration": {**AWS, "name": "data", **changes}})


def test_a_volume_is_created_listed_and_deleted(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.05)
    assert api.ok("{p}/volumes/list") == []
    assert refusal(api, "{p}/volumes/get", {"name": "no"}) == GONE
    made = create(api, wait=False, tags={"owner": "me"}, auto_cleanup_duration="1d")
    assert (made["name"], made["status"], made["provisioning_data"]) == ("data", "submitted", None)
    assert (made["user"], made["project_name"], made["external"]) == ("admin", "main", False)
    assert made["configuration"] == {
        **AWS,
        "name": "data",
        "size": 100.0,
        "availability_zone": None,
        "volume_id": None,
        "auto_cleanup_duration": 86400,
        "tags": {"owner": "me"},
    }
    found = wait_until(lambda: active(api))
    assert (found["id"], found["volume_id"]) == (made["id"], f"vol-{made['id']}")
    assert found["provisioning_data"]["size_gb"] == 100
    assert refused(api) == (400, "resource_exists", "Resource exists")
    assert api.ok("{p}/volumes/list") == [found]

    delete(api, "data", "unknown")
    wait_until(lambda: api.call("{p}/volumes/get", {"name": "data"}).status_code == 400)
    assert api.ok("{p}/volumes/list") == []
    (gone,) = api.ok("volumes/list", {"project_name": "main"})
    assert (gone["id"], gone["deleted"]) == (made["id"], True)
    assert api.ok("volumes/list", {"only_active": True}) == []
    assert api.ok("volumes/list", {"project_name": "other"}) == []


def test_a_registered_and_an_unnamed_volume(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0)
    found = create(api, "old", volume_id="vol-1", size=None)
    assert (found["external"], found["volume_id"], found["provisioning_data"]["size_gb"]) == (
        True,
        "vol-1",
        None,
    )
    claim = {"type": "volume", "backend": "kubernetes", "claim_name": "claim"}
    unnamed = api.ok("{p}/volumes/create", {"configuration": claim})
    assert unnamed["name"]
    assert unnamed["configuration"]["access_modes"] == ["ReadWriteOnce"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": None}, "Volume must specify either existing identifier or size"),
        ({"name": "Data"}, "Resource name should match regex '^[a-z][a-z0-9-]{1,40}$'"),
        ({"volume_id": "vol-1", "auto_cleanup_duration": "1h"}, "External volumes do not support"),
    ],
)
def test_wrong_volumes_are_refused(api: Api, changes: dict[str, Any], text: str) -> None:
    status, code, message = refused(api, **changes)
    assert (status, code) == (400, "error")
    assert message.startswith(text)


@pytest.mark.parametrize("size", ["-5GB", 0])
def test_a_size_that_no_disk_has_is_accepted_and_fails_in_the_cloud(
    make: Callable[..., Api], size: Any
) -> None:
    """As on a real 0.22.5, whose schema has no limits."""
    api = make(instance_seconds=0.0)
    create(api, wait=False, size=size)
    wait_until(lambda: get(api)["status"] == "failed")
    assert get(api)["status_message"].startswith("Backend error: invalid volume size")


@pytest.mark.parametrize("changes", [{"backend": "slurm"}, {"region": None}, {"bogus": 1}])
def test_a_configuration_that_the_schema_lacks_is_a_422(api: Api, changes: dict[str, Any]) -> None:
    configuration = {**AWS, "name": "data", **changes}
    assert api.call("{p}/volumes/create", {"configuration": configuration}).status_code == 422


def test_what_a_run_writes_to_a_volume_the_next_one_reads(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.02)
    create(api)
    mounted = {"volumes": ["data:/workflow/data"]}
    writing = api.run("write", "mkdir data/deep && echo kept > data/deep/x", **mounted)
    assert ending(writing)[0] == "done"
    assert writing["latest_job_submission"]["job_runtime_data"]["volume_names"] == ["data"]
    assert writing["jobs"][0]["job_spec"]["volumes"] == [{"name": ["data"], "path": "/workflow/data"}]
    assert api.output(api.run("read", "cat data/deep/x", **mounted)).strip() == "kept"
    elsewhere = api.run(
        "home", "cat ~/v/deep/x", 'cat "$DSTACK_LOCAL_ROOT/root/v/deep/x"', volumes=["data:/root/v"]
    )
    assert api.output(elsewhere).split() == ["kept", "kept"]
    root = api.run(
        "root",
        'cat "$DSTACK_LOCAL_ROOT/mnt/x/deep/x"',
        "pwd -P",
        working_dir="/mnt/x",
        volumes=["data:/mnt/x"],
    )
    kept, directory = api.output(root).split()
    assert kept == "kept"
    assert "/volumes/" in directory
    assert "DSTACK_LOCAL_ROOT" not in api.output(api.run("plain", "env"))
    delete(api, "data")
    wait_until(lambda: not Path(directory).exists())


def _archive(api: Api, **files: str) -> tuple[dict[str, Any], str]:
    """Upload files and return the repo of a run spec for them, and the id of the same files as an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    content, local = buffer.getvalue(), {"repo_type": "local", "repo_dir": "/somewhere"}
    digest = hashlib.sha256(content).hexdigest()
    api.ok("{p}/repos/init", {"repo_id": "code", "repo_info": local})
    for path in ("project/main/repos/upload_code?repo_id=code", "files/upload_archive"):
        reply = api.session.post(
            f"{api.server.url}/api/{path}", files={"file": (digest, content)}, timeout=10
        )
        assert reply.ok, reply.text
    return {"repo_id": "code", "repo_data": local, "repo_code_hash": digest}, reply.json()["id"]


def test_code_and_files_below_a_mount_are_in_the_volume(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0)
    create(api)
    repo, _ = _archive(api, **{"data/code": "code"})
    _, file = _archive(api, file="file")
    spec = {**repo, "file_archives": [{"id": file, "path": "/workflow/data/sub/file"}]}
    api.apply("upload", "true", spec=spec, volumes=["data:/workflow/data"])
    assert api.wait("upload")["status"] == "done"
    reading = api.run("read", "cat data/code; cat data/sub/file", volumes=["data:/workflow/data"])
    assert api.output(reading) == "codefile"
    api.apply("blocked", "true", spec=repo, volumes=["data:/workflow/data/code"])
    assert ending(api.wait("blocked"))[3] == "executor_error"
    inside = ["data:/workflow/data", "more:/workflow/data/more"]
    create(api, "more")
    for name in ("first", "second"):
        assert api.run(name, "echo more >> data/more/x", volumes=inside)["status"] == "done"
    assert api.output(api.run("more", "cat more/x", volumes=["more:/workflow/more"])).split() == ["more"] * 2


def test_each_node_gets_its_own_volume(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0)
    for number in range(2):
        create(api, f"data-{number}")
    mounts = ["data-${{ dstack.node_rank }}:/workflow/data"]
    assert api.run("nodes", "echo $DSTACK_NODE_RANK > data/rank", nodes=2, volumes=mounts)["status"] == "done"
    read = ["cat a/rank b/rank"]
    run = api.run("both", *read, volumes=["data-0:/workflow/a", "data-1:/workflow/b"])
    assert api.output(run).split() == ["0", "1"]
    assert refused_run(api, *mounts, nodes=3) == (400, "resource_not_exists", "Volume ['data-2'] not found")
    assert (
        refused_run(api, "data-${{ run.x }}:/data")[2]
        == "Failed to interpolate due to missing vars: ['run.x']"
    )


def test_runs_are_refused_volumes_that_they_cannot_mount(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=60.0)
    missing = (400, "resource_not_exists", "Volume ['data'] not found")
    assert refused_run(api, "data:/data") == missing
    spec = {"configuration": {"type": "task", "commands": ["true"], "volumes": ["data:/data"]}}
    assert refusal(api, "{p}/runs/get_plan", {"run_spec": spec}) == missing
    create(api, wait=False)
    assert refused_run(api, "data:/data") == (400, "error", "Cannot mount volumes that are not active: data")
    assert api.ok("{p}/runs/get_plan", {"run_spec": spec})["action"] == "create"
    delete(api, "data")
    text = "Volume ['data'] is marked for deletion and cannot be attached"
    assert refused_run(api, "data:/data") == (400, "error", text)
    assert api.run("host", "true", volumes=["/mnt/data:/data"])["status"] == "done"


def test_volumes_of_a_run_are_in_one_place_and_mounted_once(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0)
    create(api, "one")
    create(api, "two", region="eu-west-1")
    assert refused_run(api, "one:/a", "two:/b")[2] == (
        "Volumes from different locations specified for different mount points"
    )
    assert (
        refused_run(api, "one:/a", "one:/b")[2] == "Cannot attach the same volume at different mount points"
    )
    either = {"name": ["one", "two"], "path": "/workflow/data"}
    run = api.run("either", "touch data/x", volumes=[either])
    assert run["status"] == "done", str(run["latest_job_submission"])
    none = api.run("none", "true", volumes=[{"name": [], "path": "/workflow/data"}])
    assert ending(none)[3] == "volume_error"


def test_a_volume_in_use_is_shown_and_not_deleted(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0, stop_grace_seconds=0.1)
    create(api, auto_cleanup_duration=1)
    api.apply("using", "sleep 60", volumes=["data:/workflow/data"])
    api.wait("using", "running")
    (attachment,) = get(api)["attachments"]
    assert attachment["instance"]["name"] == "local"
    text = "Failed to delete volume data. Volume is in use."
    assert refusal(api, "{p}/volumes/delete", {"names": ["data"]}) == (400, "error", text)
    api.stop("using", abort=True)
    api.wait("using")
    assert get(api)["attachments"] == []
    # Cleaned up a second after its last use.
    wait_until(lambda: api.call("{p}/volumes/get", {"name": "data"}).status_code == 400)


def test_a_volume_that_goes_before_its_run_starts_fails_the_run(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0, step_seconds=0.3)
    create(api)
    api.apply("late", "true", volumes=["data:/workflow/data"])
    delete(api, "data")
    run = api.wait("late")
    assert ending(run) == ("failed", "job_failed", "failed", "volume_error", None)
    job = run["latest_job_submission"]
    assert "Volume ['data']" in job["termination_reason_message"]
    assert (job["error"], job["status_message"]) == ("volume error", "error")


def test_a_backend_that_the_project_lacks_fails_the_volume(make: Callable[..., Api]) -> None:
    api = make(instance_seconds=0.0, regions={"gcp/us-west1": 1.0})
    create(api, wait=False)
    wait_until(lambda: get(api)["status"] == "failed")
    assert get(api)["status_message"] == "Backend not available"
    assert refused_run(api, "data:/data")[2] == "Cannot mount volumes that are not active: data"
