"""The settings that make a connection through SSH fast are in force; they were measured once and are easily lost."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from dstack_core._attach.hops import Chain
from dstack_core._attach.host_keys import HostKeys
from dstack_core._attach.read_ahead import reading_ahead
from tests.core.ssh_hosts import RUN_KEY, Host, way


@pytest.fixture
def chain() -> Iterator[Chain]:
    with closing(Host()) as instance, closing(Host()) as container, closing(Chain()) as chain:
        chain.open(way([instance, container]), RUN_KEY.private, HostKeys())
        yield chain


def test_small_packets_are_sent_at_once(chain: Chain) -> None:
    # Otherwise each packet waits for the acknowledgement of the one before: 40 ms on Linux.
    below: Any = chain._transports[0].sock
    assert below.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_cheapest_cipher_is_chosen_where_the_other_side_has_it(chain: Chain) -> None:
    offered = chain._transports[0].get_security_options().ciphers
    expected = next((name for name in offered if "gcm" in name), offered[0])
    assert [vars(transport)["remote_cipher"] for transport in chain._transports] == [expected] * 2


def test_data_that_was_read_ahead_is_returned_unchanged() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        below = reading_ahead(ours)
        theirs.sendall(b"0123456789")
        assert [below.recv(size) for size in (4, 1, 100)] == [b"0123", b"4", b"56789"]
        theirs.sendall(b"ab")
        theirs.close()
        assert [below.recv(100) for _ in range(3)] == [b"ab", b"", b""]
