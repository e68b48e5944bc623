"""What the benchmarks and tests start servers with."""

from __future__ import annotations

import socket

from testbed.servers import free_port


def test_a_port_stays_free_until_its_server_binds_it() -> None:
    """Ports that libraries of other servers take meanwhile are none of these."""
    ports = [free_port() for _ in range(200)]
    taken = []
    try:
        for _ in range(2000):
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            taken.append(sock)
        assert len(set(ports)) == len(ports)
        assert not {sock.getsockname()[1] for sock in taken} & set(ports)
    finally:
        for sock in taken:
            sock.close()
