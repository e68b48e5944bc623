"""CURVE keys: who may connect, and encryption, as ZeroMQ provides them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from sgl_kvq.errors import ConfigError

logger = logging.getLogger(__name__)

PREFILL_KEY = "prefill"
_PUBLIC, _SECRET = ".key", ".key_secret"
_DOMAIN = "kvq"


def make_keys(folder: Path, decode_names: list[str]) -> list[Path]:
    """Make a key pair for the prefill instances and one for each decode instance.

    Args:
        folder: Made if missing; readable by its owner only.
        decode_names: Names of the decode instances' keys.

    Returns:
        The secret key files.

    Raises:
        ConfigError: a key of this name exists, or a name is not a plain file name.
    """
    names = [PREFILL_KEY, *decode_names]
    for name in names:
        if not name.replace("-", "").replace("_", "").isalnum() or names.count(name) > 1:
            raise ConfigError(f"keys: expected different names of letters and digits, got {name!r}")
        if (folder / (name + _SECRET)).exists():
            raise ConfigError(f"keys: {folder / (name + _SECRET)} exists; remove it for a new one")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    secrets = []
    for name in names:
        public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
        public = f'    public-key = "{public_key}"\n'
        secret = f'    secret-key = "{secret_key}"\n'
        _write(folder / (name + _PUBLIC), public, 0o644)
        secrets.append(_write(folder / (name + _SECRET), public + secret, 0o600))
    return secrets


def _write(path: Path, keys: str, mode: int) -> Path:
    """Write a certificate of pyzmq, whose file has its mode from the start."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(f"metadata\ncurve\n{keys}")
    return path


def _load(folder: Path, name: str, suffix: str) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(folder / (name + suffix))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--kv-quant-transfer-keys {folder}: expected a key file {name}{suffix} ({error}); "
            f"make keys with: python -m sgl_kvq keys FOLDER"
        ) from None


def _load_secret(folder: Path, name: str) -> tuple[bytes, bytes]:
    public, secret = _load(folder, name, _SECRET)
    path = folder / (name + _SECRET)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"--kv-quant-transfer-keys {folder}: others may read {path.name}; run: chmod 600 {path}"
        )
    if secret is None:
        raise ConfigError(f"--kv-quant-transfer-keys {folder}: no secret key in {name}{_SECRET}")
    return public, secret


class ServerKeys(NamedTuple):
    """Keys of a prefill instance, and the public keys of the decode instances it lets in."""

    public: bytes
    secret: bytes
    clients: frozenset[bytes]


class ClientKeys(NamedTuple):
    """Keys of a decode instance, and the prefill instance's public key."""

    public: bytes
    secret: bytes
    server: bytes


Keys = TypeVar("Keys", ServerKeys, ClientKeys)


def load_server_keys(folder: Path) -> ServerKeys:
    """Read prefill.key_secret and all public keys of a folder.

    Raises:
        ConfigError: a key file is missing or damaged, or the secret one is not its owner's alone.
    """
    public, secret = _load_secret(folder, PREFILL_KEY)
    try:
        clients = frozenset(zmq.auth.load_certificates(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--kv-quant-transfer-keys {folder}: {error}") from None
    return ServerKeys(public, secret, clients)


def load_client_keys(folder: Path) -> ClientKeys:
    """Read prefill.key and the one secret key besides prefill's.

    Raises:
        ConfigError: a key file is missing or damaged, the secret one is not its owner's alone, or
            there are several secret keys to choose from.
    """
    names = sorted(
        path.name.removesuffix(_SECRET)
        for path in folder.glob(f"*{_SECRET}")
        if path.name != PREFILL_KEY + _SECRET
    )
    if len(names) != 1:
        raise ConfigError(
            f"--kv-quant-transfer-keys {folder}: expected one secret key of a decode instance, got "
            f"{', '.join(names) or 'none'}"
        )
    return ClientKeys(*_load_secret(folder, names[0]), _load(folder, PREFILL_KEY, _PUBLIC)[0])


class KeyFolder(Generic[Keys]):
    """Keys of a folder, read again when its files change.

    Args:
        folder: `--kv-quant-transfer-keys`.
        load: Reads them.
    """

    def __init__(self, folder: Path, load: Callable[[Path], Keys]) -> None:
        self._folder = folder
        self._read: Callable[[Path], Keys] = load
        self._files: _Files | None = None
        self._keys: Keys | None = None

    def keys(self) -> Keys:
        """Present keys; those from before while the files cannot be used, which is logged once.

        Raises:
            ConfigError: they cannot be used, and there are none from before.
        """
        files = _files_of(self._folder)
        if self._keys is None or files != self._files:
            try:
                self._keys = self._read(self._folder)
            except ConfigError as error:
                if self._keys is None:
                    raise
                logger.error("kvq-zmq: the keys from before stay in use: %s", error)
            self._files = files
        return self._keys


_Files = frozenset[tuple[str, int, int, int]]


def _files_of(folder: Path) -> _Files:
    """Name, inode, time of the last change (of content or mode) and size of each file."""
    with suppress(OSError), os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries]
        return frozenset((name, s.st_ino, s.st_ctime_ns, s.st_size) for name, s in stats)
    return frozenset()


class CurveServer:
    """Lets only holders of a key in a folder connect, and follows changes of the folder.

    Args:
        socket: ROUTER socket of the prefill instance, not bound yet.
        folder: Holds prefill.key_secret and the public key of every decode instance.

    Raises:
        ConfigError: a key file is missing or damaged, or a secret one is not its owner's alone.
    """

    def __init__(self, socket: zmq.Socket[bytes], folder: Path) -> None:
        self._socket, self._folder = socket, KeyFolder(folder, load_server_keys)
        self._keys = self._folder.keys()
        self.authenticator = ThreadAuthenticator(socket.context)
        self.authenticator.start()
        self.authenticator.configure_curve_callback(domain=_DOMAIN, credentials_provider=self)
        # Without a domain that is enforced, ZeroMQ lets everybody in when no authenticator runs.
        socket.zap_domain = _DOMAIN.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._set_keys()

    def _set_keys(self) -> None:
        self._socket.curve_publickey = self._keys.public
        self._socket.curve_secretkey = self._keys.secret
        self._socket.curve_server = True

    def callback(self, domain: str, key: bytes) -> bool:
        """In the authenticator's thread: whether the holder of this key may connect."""
        return key in self._keys.clients

    def refresh(self) -> bool:
        """Use keys that changed; whether the socket must be bound again to use its own."""
        old, self._keys = self._keys, self._folder.keys()
        if old == self._keys:
            return False
        logger.info("kvq-zmq: keys have changed, %d may connect", len(self._keys.clients))
        self._set_keys()
        return old[:2] != self._keys[:2]

    def stop(self) -> None:
        """End the authenticator; after the socket is closed."""
        self.authenticator.stop()


def secure_client(socket: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Connect with this decode instance's key, to the holder of the prefill key only.

    Args:
        socket: DEALER socket of the decode instance, not connected yet.
        keys: Its keys.
    """
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = keys.server
