"""CURVE keys: who may connect, and encryption, as ZeroMQ provides them."""

from __future__ import annotations

import os
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from sgl_kvq.errors import ConfigError

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


def secure_server(socket: zmq.Socket[bytes], folder: Path) -> ThreadAuthenticator:
    """Let only holders of a key in the folder connect; call before the socket binds.

    Args:
        socket: ROUTER socket of the prefill instance.
        folder: Holds prefill.key_secret and the public key of every decode instance.

    Returns:
        The running authenticator; stop it after the socket is closed.

    Raises:
        ConfigError: a key file is missing, or a secret one is not its owner's alone.
    """
    public, secret = _load_secret(folder, PREFILL_KEY)
    authenticator = ThreadAuthenticator(socket.context)
    authenticator.start()
    authenticator.configure_curve(domain=_DOMAIN, location=str(folder))
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_server = True
    # Without a domain that is enforced, ZeroMQ lets everybody in when no authenticator runs.
    socket.zap_domain = _DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return authenticator


def secure_client(socket: zmq.Socket[bytes], folder: Path) -> None:
    """Connect with this decode instance's key, to the holder of the prefill key only.

    Args:
        socket: DEALER socket of the decode instance, not connected yet.
        folder: Holds prefill.key and one secret key besides prefill's.

    Raises:
        ConfigError: a key file is missing or not its owner's alone, or there are several secret
            keys to choose from.
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
    socket.curve_publickey, socket.curve_secretkey = _load_secret(folder, names[0])
    socket.curve_serverkey, _ = _load(folder, PREFILL_KEY, _PUBLIC)
