"""Every hop is reached, or the error names the hop, what failed and what to do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paramiko.common import AUTH_SUCCESSFUL

from dstack_core._attach.hops import Chain
from dstack_core._attach.host_keys import HostKeyError, HostKeys
from dstack_core._wire.attach import Hop
from dstack_core.errors import AttachError
from tests.core.ssh_hosts import RUN_KEY, USER, Echo, Host, way
from tests.ports import free_port

HOPS = [(count, bad) for count in (1, 2, 3) for bad in range(count)]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Host())) for _ in range(3)]


def open_chain(hops: list[Hop], host_keys: HostKeys | None = None) -> None:
    with closing(Chain()) as chain:
        chain.open(hops, RUN_KEY.private, host_keys or HostKeys())


def failure(hops: list[Hop]) -> str:
    with pytest.raises(AttachError) as caught:
        open_chain(hops)
    return caught.value.message


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_port_behind_several_hops_is_reached(hosts: list[Host], count: int) -> None:
    with closing(Echo()) as echo, closing(Chain()) as chain:
        chain.open(way(hosts[:count]), RUN_KEY.private, HostKeys())
        channel = chain.channel(echo.port, timeout=10)
        channel.sendall(b"hello")
        assert channel.recv(100) == b"hello"
    assert not chain.is_open
    assert [host.logins[-1:] for host in hosts] == [[USER]] * count + [[]] * (3 - count)


@pytest.mark.parametrize(("count", "bad"), HOPS)
def test_the_error_for_an_unreachable_hop_names_it(hosts: list[Host], count: int, bad: int) -> None:
    hops = way(hosts[:count])
    hops[bad] = replace(hops[bad], port=free_port())
    text = failure(hops)
    assert text.startswith(f"{hops[bad]}: no connection: ")
    assert "refused" in text or "rejected the connection" in text
    assert "Check that the machine is up" in text


@pytest.mark.parametrize(("count", "bad"), HOPS)
def test_the_error_for_a_rejected_login_names_hop_user_and_key(
    hosts: list[Host], count: int, bad: int
) -> None:
    hops = way(hosts[:count])
    hops[bad] = replace(hops[bad], username="nobody")
    text = failure(hops)
    assert text.startswith(f"{hops[bad]}: the login was rejected for ssh-rsa {RUN_KEY.private.fingerprint}")
    assert f"nobody@127.0.0.1:{hosts[bad].port}" in text


@pytest.mark.parametrize(("count", "bad"), HOPS)
def test_the_error_for_a_connection_dropped_at_login_names_the_hop(
    hosts: list[Host], count: int, bad: int
) -> None:
    hosts[bad].drops = 1
    hops = way(hosts[:count])
    assert failure(hops).startswith(f"{hops[bad]}: ")
    open_chain(hops)


@pytest.mark.parametrize(("count", "bad"), HOPS)
def test_a_hop_whose_host_key_changed_is_refused(hosts: list[Host], count: int, bad: int) -> None:
    hops, host_keys = way(hosts[:count]), HostKeys()
    open_chain(hops, host_keys)
    open_chain(hops, host_keys)
    hosts[bad].change_host_key()
    with pytest.raises(HostKeyError) as caught:
        open_chain(hops, host_keys)
    assert str(caught.value).startswith(f"{hops[bad]}: its host key (ecdsa-sha2-nistp256 SHA256:")
    assert "before the connection was lost" in str(caught.value)


def test_the_error_names_a_port_that_another_program_listens_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        text = failure([Hop("instance", "127.0.0.1", listening.getsockname()[1], USER)])
        thread.join()
    assert "connected, but SSH did not start" in text
    assert "another program listens on that port" in text


def test_the_error_names_a_container_port_that_nothing_listens_on(hosts: list[Host]) -> None:
    port = free_port()
    with closing(Chain()) as chain:
        chain.open(way(hosts[:1]), RUN_KEY.private, HostKeys())
        with pytest.raises(AttachError, match=f"localhost:{port} rejected the connection"):
            chain.channel(port, timeout=10)


def plain(name: str) -> str:
    return name


def hashed(name: str) -> str:
    salt = b"12345678901234567890"
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


@pytest.mark.parametrize("written", [plain, hashed])
def test_the_sshproxys_host_key_is_compared_with_known_hosts_where_it_is_listed(
    tmp_path: Path, written: Callable[[str], str]
) -> None:
    known_hosts = tmp_path / "known_hosts"
    key, other = paramiko.ECDSAKey.generate(), paramiko.RSAKey.generate(2048)
    with closing(Host(host_key=key)) as host:
        hop = replace(way([host])[0], role="sshproxy", check_host_key=True)
        # An unknown host is accepted, as in a first login with ssh that is answered with yes.
        open_chain([hop], HostKeys(known_hosts))
        name = written(f"[127.0.0.1]:{host.port}")
        known_hosts.write_text(f"{name} {key.get_name()} {key.get_base64()}\n")
        open_chain([hop], HostKeys(known_hosts))
        known_hosts.write_text(
            f"x ssh-rsa garbage\n# no key\n{name} {other.get_name()} {other.get_base64()}\n"
        )
        with pytest.raises(HostKeyError, match=rf"sshproxy .*{known_hosts}.*ssh-keygen -R '\[127") as caught:
            open_chain([hop], HostKeys(known_hosts))
        assert key.fingerprint in str(caught.value)
        # Without check_host_key the host is not checked.
        open_chain([replace(hop, check_host_key=False)], HostKeys(known_hosts))


def test_the_users_known_hosts_are_used() -> None:
    other = paramiko.ECDSAKey.generate()
    with closing(Host()) as host:
        hop = replace(way([host])[0], check_host_key=True)
        folder = Path.home() / ".ssh"
        folder.mkdir()
        (folder / "known_hosts").write_text(
            f"[127.0.0.1]:{host.port} {other.get_name()} {other.get_base64()}\n"
        )
        with pytest.raises(HostKeyError):
            open_chain([hop])


class Welcome(paramiko.ServerInterface):
    """A server that accepts every login."""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_host_with_several_keys_is_asked_for_the_one_in_known_hosts(tmp_path: Path, number: int) -> None:
    keys = [paramiko.RSAKey.generate(2048), paramiko.ECDSAKey.generate()]
    keys.append(paramiko.Ed25519Key.from_private_key(io.StringIO(new_ed25519())))
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            transport = paramiko.Transport(connection)
            for key in keys:
                transport.add_server_key(key)
            with closing(transport), connection:
                transport.start_server(server=Welcome())
                transport.join()

        thread = threading.Thread(target=serve)
        thread.start()
        port, known = listening.getsockname()[1], keys[number]
        known_hosts = tmp_path / "known_hosts"
        known_hosts.write_text(f"[127.0.0.1]:{port} {known.get_name()} {known.get_base64()}\n")
        open_chain([Hop("sshproxy", "127.0.0.1", port, USER, check_host_key=True)], HostKeys(known_hosts))
        thread.join()


def new_ed25519() -> str:
    key = Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    return key.private_bytes(*form).decode()


@pytest.mark.parametrize("named", [True, False])
def test_the_users_keys_log_in_to_their_own_jump_host(named: bool) -> None:
    own = paramiko.ECDSAKey.generate()
    folder = Path.home() / ".ssh"
    folder.mkdir()
    own.write_private_key_file(str(folder / ("work_key" if named else "id_ecdsa")))
    if named:
        (folder / "config").write_text("Host 127.0.0.1\n  IdentityFile ~/.ssh/work_key\n")
    with closing(Host(key=own)) as jump, closing(Host()) as instance:
        hops = way([jump, instance])
        open_chain([replace(hops[0], own_identity=True), hops[1]])
        assert "the login was rejected" in failure(hops)


def test_a_jump_host_that_accepts_no_key_of_the_user_is_explained() -> None:
    with closing(Host(key=paramiko.ECDSAKey.generate())) as jump:
        text = failure([replace(way([jump])[0], own_identity=True)])
    assert "Load the key of this machine into your SSH agent" in text


def test_no_paramiko_message_reaches_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG), closing(Host()) as host:
        host.drops = 1
        failure(way([host]))
        open_chain(way([host]))
    assert [record for record in caplog.records if "paramiko" in record.name] == []
    assert capfd.readouterr() == ("", "")
