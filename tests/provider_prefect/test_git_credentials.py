"""Code and the credentials of its repository: where Prefect keeps them, and what the server gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime
from prefect.runtime import flow_run
from pydantic import SecretStr

from dstack_core import ConfigurationError, RunError
from dstack_core.local import LocalServer
from prefect_dstack import DstackCredentials, DstackRun, run_task
from prefect_dstack._secrets import GitLogin, login_of
from tests.core.repos import git, write

from .specs import git_login, private_checkout, specs
from .support import log_records, submissions
from .test_secrets import kept
from .test_submit_options import ALL_WAYS, SHORT, Submit, by_asubmit_run, by_run_task, by_submit_run

pytestmark = pytest.mark.usefixtures("prefect_server")

TOKEN = "ghp_a-token-of-this-test"


@pytest.fixture(scope="module")
def key() -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    made = Ed25519PrivateKey.generate()
    return made.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()


class GitHubLike(Block):
    """The fields of prefect-github's GitHubCredentials 0.4.4."""

    token: SecretStr | None = None


class GitLabLike(Block):
    """The fields of prefect-gitlab's GitLabCredentials 0.3.5."""

    token: SecretStr | None = None
    url: str | None = None


class BitBucketLike(Block):
    """The fields of prefect-bitbucket's BitBucketCredentials 0.3.7."""

    token: SecretStr | None = None
    username: str | None = None
    password: SecretStr | None = None
    url: str | None = None


class DeployKey(Block):
    """A block that a user defines."""

    private_key: SecretStr


HELD: list[tuple[Callable[[str], Any], str]] = [
    (lambda text: GitHubLike(token=SecretStr(text)), "GitHub"),
    (lambda text: GitLabLike(token=SecretStr(f"oauth2:{text}")), "GitLab"),
    (lambda text: BitBucketLike(token=SecretStr(f"x-token-auth:{text}")), "Bitbucket"),
    (lambda text: BitBucketLike(username="robot", password=SecretStr(text)), "password"),
    (lambda text: Secret(value=SecretStr(text)), "Secret"),
    (lambda text: Secret.model_validate({"value": {"username": "robot", "password": text}}), "JSON"),
    (SecretStr, "SecretStr"),
    (lambda text: {"username": "robot", "access_token": Secret(value=SecretStr(text))}, "of-a-git-step"),
]


@pytest.mark.parametrize(("hold", "name"), HELD, ids=[name for _, name in HELD])
def test_a_token_is_found_where_blocks_keep_it(hold: Callable[[str], Any], name: str, key: str) -> None:
    assert login_of(hold(TOKEN)) == GitLogin(token=TOKEN)
    if name in ("Secret", "SecretStr"):
        assert login_of(hold(key)) == GitLogin(private_key=key.strip())


def test_a_key_is_found_where_blocks_keep_it(key: str) -> None:
    assert login_of(DeployKey(private_key=SecretStr(key))) == GitLogin(private_key=key.strip())
    assert TOKEN not in repr(login_of(SecretStr(TOKEN)))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (GitHubLike(), "got GitHubLike without one. Pass a Secret block"),
        (7, "got int. Pass a Secret block"),
        (DeployKey(private_key=SecretStr("~/.ssh/id_ed25519")), "not its path"),
        (TOKEN, "got other text. Pass a token as SecretStr"),
        ("secret/nobody-saved-it", "^git_credentials: .* got 'secret/nobody-saved-it', which does not exist"),
    ],
)
def test_what_holds_no_credentials_is_refused_without_being_shown(
    given: Any, told: str, dstack: LocalServer, credentials: DstackCredentials
) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        by_run_task(SHORT, credentials, git_credentials=given)
    assert TOKEN not in str(caught.value)
    assert submissions(dstack) == 0


@ALL_WAYS
def test_the_code_of_a_directory_reaches_the_run(
    submit: Submit, dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    write(tmp_path / "code", word="of-the-directory", **{".dstack__profiles.yml": "profiles: []"})
    submit(
        {"type": "task", "commands": ["grep of-the-directory word"]},
        credentials,
        repo_dir=str(tmp_path / "code"),
    )
    (spec,) = specs(dstack)
    assert spec["repo_data"]["repo_type"] == "local"
    with dstack.client() as client:
        (run,) = client.runs.list(all=True)
        assert run.wait(timeout=60, poll_interval=0.2).succeeded


@ALL_WAYS
def test_a_private_repository_gets_its_credentials(
    submit: Submit, dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    """The run itself fails: the remote cannot be reached from here."""
    block: Any = Secret(value=SecretStr(TOKEN))
    block.save("for-git", overwrite=True)
    work = private_checkout(tmp_path)
    for number, given in enumerate(("secret/for-git", SecretStr(TOKEN))):
        options = {"repo_dir": str(work), "git_credentials": given}
        configuration = {**SHORT, "name": f"numbered-{number}"}
        with suppress(RunError):
            submit(configuration, credentials, **options)
        spec = specs(dstack)[-1]
        assert (len(specs(dstack)), spec["repo_data"]["repo_type"]) == (number + 1, "remote")
        assert git_login(dstack, spec)["oauth_token"] == TOKEN


def test_the_credentials_block_may_hold_those_of_git(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path, key: str
) -> None:
    with_token = credentials.model_copy(update={"git_token": SecretStr(TOKEN)})
    with_key = credentials.model_copy(update={"git_private_key": SecretStr(key)})

    def login(name: str, block: DstackCredentials, **options: Any) -> tuple[str | None, str | None]:
        work = private_checkout(tmp_path / name)
        by_submit_run({**SHORT, "name": name}, block, repo_dir=work, **options)
        stored = git_login(dstack, specs(dstack)[-1])
        return stored["oauth_token"], stored["private_key"]

    assert login("by-token", with_token) == (TOKEN, None)
    assert login("by-key", with_key) == (None, key)
    assert login("by-task", with_key, git_credentials=SecretStr("ghp_other")) == ("ghp_other", None)


@pytest.mark.parametrize("submit", [by_run_task, by_asubmit_run], ids=lambda way: way.__name__)
def test_code_that_is_uploaded_instead_of_cloned_is_a_line_in_the_log(
    submit: Submit, credentials: DstackCredentials, tmp_path: Path
) -> None:
    work = private_checkout(tmp_path)
    git(work, "remote", "remove", "origin")
    ids: list[UUID] = []
    began: Any = datetime.now(UTC)
    submit({**SHORT, "commands": ["cat a"]}, credentials, repo_dir=work)
    with get_client(sync_client=True) as client:
        since = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=began))
        ids += [found.id for found in client.read_flow_runs(flow_run_filter=since)]
    assert "instead of cloning, because" in "\n".join(log_records(ids[0], last="uploading the files of"))


@pytest.mark.parametrize("submit", [by_run_task, by_asubmit_run], ids=lambda way: way.__name__)
def test_credentials_without_code_are_one_warning(submit: Submit, credentials: DstackCredentials) -> None:
    began: Any = datetime.now(UTC)
    submit(SHORT, credentials, git_credentials=SecretStr(TOKEN))
    with get_client(sync_client=True) as client:
        since = FlowRunFilter(start_time=FlowRunFilterStartTime(after_=began))
        (found,) = client.read_flow_runs(flow_run_filter=since)
    logged = "\n".join(log_records(found.id, last="credentials are not used"))
    assert logged.count("git_credentials: expected repo_dir") == 1
    assert TOKEN not in logged


def test_one_git_login_of_a_block() -> None:
    with pytest.raises(ValueError, match=r"expected one of git_token and git_private_key"):
        DstackCredentials(
            server_url="http://localhost:3000",
            project_name="main",
            user_token=SecretStr("t"),
            git_token=SecretStr("a"),
            git_private_key=SecretStr("b"),
        )


def test_an_error_about_a_key_names_an_argument_that_exists_here(
    credentials: DstackCredentials, tmp_path: Path, key: str
) -> None:
    broken = "\n".join([*key.splitlines()[:2], "-----END OPENSSH PRIVATE KEY-----"])
    work = private_checkout(tmp_path)
    with pytest.raises(ConfigurationError, match=r"^git_credentials") as caught:
        by_run_task(SHORT, credentials, repo_dir=work, git_credentials=SecretStr(broken))
    assert "git_private_key" not in str(caught.value)
    assert key.splitlines()[1] not in str(caught.value)


@ALL_WAYS
def test_only_a_profile_that_is_named_or_lies_beside_the_code_counts(
    submit: Submit,
    dstack: LocalServer,
    credentials: DstackCredentials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def profiles(folder: Path, name: str, price: float, *, default: bool = True) -> Path:
        path = folder / ".dstack" / "profiles.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"profiles": [{"name": name, "max_price": price, "default": default}]}))
        return path

    profiles(tmp_path / "home", "home", 50)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DSTACK_PROFILE", "home")
    profiles(tmp_path / "here", "here", 40)
    monkeypatch.chdir(tmp_path / "here")
    profiles(tmp_path / "code", "code", 30)
    named = profiles(tmp_path / "elsewhere", "named", 20, default=False)

    def priced(name: str, **options: Any) -> float | None:
        submit({**SHORT, "name": name}, credentials, **options)
        spec = specs(dstack)[-1]
        found = spec["configuration"].get("max_price") or spec["profile"].get("max_price")
        return None if found is None else float(found)

    assert priced("without") is None
    assert priced("beside", repo_dir=str(tmp_path / "code")) == 30
    assert priced("of-file", profile="named", profiles_file=str(named)) == 20
    with pytest.raises(ConfigurationError, match="profile: expected one of those in"):
        priced("unknown", profile="home", repo_dir=str(tmp_path / "code"))


def test_a_profile_limits_the_duration(
    credentials: DstackCredentials, dstack: LocalServer, tmp_path: Path
) -> None:
    file = tmp_path / "profiles.yml"
    file.write_text("profiles: [{name: short, max_duration: 1h}]")
    by_run_task(SHORT, credentials, profile="short", profiles_file=file)
    (spec,) = specs(dstack)
    assert (spec["configuration"].get("max_duration") or spec["profile"].get("max_duration")) == 3600


def test_no_secret_of_an_option_shows_in_prefect(
    dstack: LocalServer, credentials: DstackCredentials, tmp_path: Path
) -> None:
    write(tmp_path / "code", word="x")
    ids: list[UUID] = []
    commands = ['echo "it is $HF_TOKEN and $PLAIN"', "sleep 0.5", "echo the-end", "exit 3"]

    @flow
    def secretive(block: DstackCredentials) -> None:
        ids.append(UUID(flow_run.get_id()))
        run_task(
            {"type": "task", "commands": commands, "env": ["HF_TOKEN", "PLAIN"]},
            block,
            env={"HF_TOKEN": Secret(value=SecretStr("hf_hidden-word")), "PLAIN": "plain-word"},
            repo_dir=tmp_path / "code",
            git_credentials=GitHubLike(token=SecretStr(TOKEN)),
            poll_interval=0.1,
        )

    with pytest.raises(Exception, match="exited with status 3") as failed:
        secretive(credentials)
    told = "\n".join(log_records(ids[0], last="the-end"))
    assert "it is *** and plain-word" in told
    for secret in ("hf_hidden-word", TOKEN, dstack.token):
        assert secret not in told
        assert secret not in kept(ids[0])
        assert secret not in f"{failed.value!r} {failed.value}"


def test_a_saved_block_keeps_its_secrets_and_returns_them(
    dstack: LocalServer, credentials: DstackCredentials
) -> None:
    made = DstackRun(
        credentials=credentials,
        configuration={**SHORT, "env": ["HF_TOKEN"]},
        env={"HF_TOKEN": SecretStr("hf_hidden-word")},  # type: ignore[arg-type]
        git_credentials=GitHubLike(token=SecretStr(TOKEN)),  # type: ignore[arg-type]
        poll_interval=0.1,
    )
    made.save("with-secrets", overwrite=True)
    with get_client(sync_client=True) as client:
        hidden = client.read_block_document_by_name("with-secrets", "dstack-run", include_secrets=False)
    shown = f"{hidden.model_dump_json()} {made!r} {made.model_dump_json()}"
    assert "hf_hidden-word" not in shown
    assert TOKEN not in shown
    loaded: Any = DstackRun.load("with-secrets", _sync=True)  # type: ignore[call-arg]
    assert loaded.git_credentials.get_secret_value() == TOKEN
    loaded.trigger().wait_for_completion()
    (spec,) = specs(dstack)
    assert spec["configuration"]["env"] == {"HF_TOKEN": "hf_hidden-word"}
