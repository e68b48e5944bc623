"""A decode rank's connections: made, told apart, made anew; `decode_link` decides what is said."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress

import zmq

from sgl_kvq.errors import TransferError
from sgl_kvq.transfer.decode.link import Link
from sgl_kvq.transfer.options import TransferConfig, is_loopback
from sgl_kvq.transfer.protocol.messages import Hello, Message, pack_message
from sgl_kvq.transfer.runtime.curve import secure_client
from sgl_kvq.transfer.runtime.event_loop import CONTROL

logger = logging.getLogger(__name__)


class Links:
    """Connections by endpoint and by socket.

    Args:
        make_socket: Of the transfer thread.
        poller: Of the transfer thread.
        config: Keys.
        hello: First message on a connection.
    """

    def __init__(
        self,
        make_socket: Callable[[int], zmq.Socket[bytes]],
        poller: zmq.Poller,
        config: TransferConfig,
        hello: Hello,
    ) -> None:
        self.by_endpoint: dict[str, Link] = {}
        self.by_socket: dict[zmq.Socket[bytes], Link] = {}
        self._make_socket, self._poller, self._keys = make_socket, poller, config.keys
        self._hello = hello

    def get_or_connect(self, endpoint: str) -> Link:
        """The connection to a prefill rank.

        Raises:
            TransferError: the address is beyond loopback and there are no keys.
            ConfigError: a key file is missing.
            zmq.ZMQError: not an address.
        """
        return self.by_endpoint.get(endpoint) or self._connect(endpoint, b"kvq" + os.urandom(16))

    def _connect(self, endpoint: str, identity: bytes) -> Link:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        if self._keys is None and not is_loopback(host):
            raise TransferError(
                "expected --kv-quant-transfer-keys for an address beyond loopback; make keys with: "
                "python -m sgl_kvq keys FOLDER"
            )
        socket = self._make_socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.ipv6 = ":" in host
        if self._keys is not None:
            secure_client(socket, self._keys)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(endpoint)
        link = self.by_endpoint[endpoint] = Link(endpoint, identity, socket, monitor)
        for readable in (socket, monitor):
            self.by_socket[readable] = link
            self._poller.register(readable, zmq.POLLIN)
        self.say_hello(link)
        return link

    def close(self, link: Link) -> None:
        """End a connection."""
        del self.by_endpoint[link.endpoint]
        for readable in (link.socket, link.monitor):
            del self.by_socket[readable]
            self._poller.unregister(readable)
        link.socket.disable_monitor()
        link.monitor.close(linger=0)
        link.socket.close(linger=0)

    def reconnect(self, link: Link) -> None:
        """Replace a connection that broke, or that says nothing and may be out of step."""
        logger.debug("kvq-zmq: connecting to %s anew", link.endpoint)
        self.close(link)
        fresh = self._connect(link.endpoint, link.identity)
        fresh.waiting, fresh.parts, fresh.finished = link.waiting, link.parts, link.finished
        fresh.landings, fresh.instance = link.landings, link.instance
        fresh.last_heard = link.last_heard

    def say_hello(self, link: Link) -> None:
        """Begin the handshake."""
        link.said_hello = time.monotonic()
        self.send(link, self._hello)

    def send(self, link: Link, message: Message) -> None:
        """Send a message; one that is lost is said again later."""
        with suppress(zmq.ZMQError):
            link.socket.send_multipart([CONTROL, pack_message(message)], zmq.NOBLOCK)
