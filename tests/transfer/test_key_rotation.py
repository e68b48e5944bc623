"""Keys change while both instances run: new connections use the new ones, no transfer fails."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_kvq.transfer.options import TransferConfig
from sgl_kvq.transfer.runtime.curve import make_keys
from tests.support.transfer_pair import (
    DecodeSide,
    PrefillSide,
    stopped,
    take_pages,
    wait_for,
)

NUM_TOKENS = 1000


class Site:
    """A prefill instance and two decode instances, each with a key folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._keys, self.folders = folder / "keys", {}
        make_keys(self._keys, ["east", "west"])
        for name in ("prefill", "east", "west"):
            self.folders[name] = folder / name
            self.folders[name].mkdir()
            self.give(name, f"{name}.key_secret", "prefill.key")
        self.give("prefill", "east.key", "west.key")
        self.prefill = PrefillSide(self.config("prefill"))
        self.east, self.west = DecodeSide(self.config("east")), DecodeSide(self.config("west"))
        self.pages = take_pages(self.prefill.pool, NUM_TOKENS, 1)
        self.rooms = 100

    def config(self, name: str) -> TransferConfig:
        return TransferConfig(
            keys=self.folders[name], deadline_s=6.0, block_bytes=4096, window_bytes=8192
        )

    def give(self, name: str, *files: str) -> None:
        for file in files:
            copy = self.folders[name] / (file + ".new")
            shutil.copy(self._keys / file, copy)
            copy.rename(self.folders[name] / file)

    def make_again(self, *names: str) -> None:
        """New keys of these names; nobody has them yet."""
        fresh = self._keys / "fresh"
        make_keys(fresh, [name for name in names if name != "prefill"])
        for name in names:
            for kind in ("key", "key_secret"):
                (fresh / f"{name}.{kind}").replace(self._keys / f"{name}.{kind}")
        shutil.rmtree(fresh)

    def restart(self, name: str) -> DecodeSide:
        """Connections of its own: nobody waits for a silent one to be closed."""
        return DecodeSide(self.config(name))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    with stopped(site.prefill, site.east, site.west):
        yield site


class Running:
    """Transfers one after the other, none of which may fail."""

    def __init__(self, site: Site, decode: DecodeSide) -> None:
        self._site, self._decode = site, decode
        self._pages = take_pages(decode.pool, NUM_TOKENS, 30)

    def for_seconds(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.one()

    def one(self) -> None:
        site, decode, room = self._site, self._decode, self._site.rooms
        site.rooms += 1
        out, result = site.prefill.open(room), decode.announce(room, [site.prefill.endpoint])
        decode.start(room, self._pages)
        site.prefill.send(room, site.pages, NUM_TOKENS)
        wait_for(lambda: bool(out.result and result.result), 20.0)
        assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)
        site.prefill.close(room)
        decode.close(room)


def refused(site: Site, decode: DecodeSide) -> bool:
    site.rooms += 1
    outcome = decode.announce(site.rooms, [site.prefill.endpoint])
    wait_for(lambda: bool(outcome.result), 20.0)
    return "no prefill instance answers" in outcome.reason


def test_every_key_can_be_changed(site: Site) -> None:
    running = Running(site, site.east)
    running.for_seconds(0.5)
    # A decode instance's key: the prefill instance must know it first.
    site.make_again("east")
    site.give("prefill", "east.key")
    running.for_seconds(0.5)
    site.give("east", "east.key_secret")
    running.for_seconds(0.5)
    again = site.restart("east")
    with stopped(again):
        Running(site, again).one()
    # The prefill instance's key: decode instances must know it first.
    site.make_again("prefill")
    for name in ("east", "west"):
        site.give(name, "prefill.key")
    running.for_seconds(0.5)
    before = [connection.socket for connection in site.east.thread.connections.values()]
    site.give("prefill", "prefill.key_secret")
    running.for_seconds(3.0)
    after = [connection.socket for connection in site.east.thread.connections.values()]
    assert before != after  # it connected again, with the new key
    Running(site, site.west).one()


def test_a_transfer_outlives_the_prefill_key(site: Site) -> None:
    """The key changes in the middle of it."""
    pages = take_pages(site.east.pool, NUM_TOKENS, 30)
    out, result = site.prefill.open(1), site.east.announce(1, [site.prefill.endpoint])
    site.east.start(1, pages)
    wait_for(lambda: 1 in site.prefill.requested)
    site.make_again("prefill")
    site.give("east", "prefill.key")
    (connection,) = site.east.thread.connections.values()
    old = connection.socket
    site.give("prefill", "prefill.key_secret")
    wait_for(lambda: old not in site.east.thread._connections.by_socket)
    site.prefill.send(1, site.pages, NUM_TOKENS)
    wait_for(lambda: bool(out.result and result.result), 20.0)
    assert (out.result, result.result) == ("success", "success"), (out.reason, result.reason)


def test_clients_come_and_go(site: Site) -> None:
    """One that is taken out keeps its connection and gets no other."""
    running = Running(site, site.east)
    running.one()
    (site.folders["prefill"] / "east.key").unlink()
    running.for_seconds(1.0)
    again = site.restart("east")
    with stopped(again):
        assert refused(site, again)
    running.one()
    site.give("prefill", "east.key")
    time.sleep(0.5)
    again = site.restart("east")
    with stopped(again):
        Running(site, again).one()


def test_key_files_that_cannot_be_used_change_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "sgl_kvq.transfer.runtime.curve")
    running = Running(site, site.east)
    running.one()
    site.make_again("prefill", "east")
    site.give("prefill", "prefill.key_secret")
    (site.folders["prefill"] / "prefill.key_secret").chmod(0o644)
    site.give("east", "east.key_secret")
    (site.folders["east"] / "east.key_secret").chmod(0o640)
    running.for_seconds(1.0)
    again = site.restart("west")
    with stopped(again):
        Running(site, again).one()
    site.east.thread.post(lambda: reconnect(site.east))
    running.for_seconds(1.0)
    lines = sorted(record.getMessage() for record in caplog.records)
    assert len(lines) == 2
    for line, name in zip(lines, ("east", "prefill"), strict=True):
        assert "stay in use" in line
        assert f"others may read {name}.key_secret; run: chmod 600" in line
    (site.folders["prefill"] / "prefill.key_secret").chmod(0o600)
    for name in ("east", "west"):
        site.give(name, "prefill.key")
    site.give("prefill", "east.key")
    (site.folders["east"] / "east.key_secret").chmod(0o600)
    running.for_seconds(2.0)
    again = site.restart("east")
    with stopped(again):
        Running(site, again).one()


def reconnect(decode: DecodeSide) -> None:
    for connection in decode.thread.connections.values():
        connection.broken = True
