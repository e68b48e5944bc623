"""The versions of SGLang that `--kv-quant` starts on."""

from __future__ import annotations

import importlib.metadata
import os

from sgl_kvq.errors import ConfigError

SUPPORTED = ("0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
"""Oldest first. The tests run on the first and the last."""

ALLOW_UNTESTED_ENV = "KVQ_ALLOW_UNTESTED_SGLANG"


def installed_version() -> str:
    """Version of the installed SGLang."""
    return importlib.metadata.version("sglang")


def installed_versions() -> dict[str, str]:
    """Versions of SGLang and of what kernels depend on; "none" where one is missing."""
    found = {}
    for package in ("torch", "triton", "sglang", "sglang-kernel", "flashinfer-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def describe_version() -> str:
    """The installed SGLang and the supported ones.

    Raises:
        ConfigError: as `check_version`.
    """
    check_version()
    return f"{installed_version()}, supported: {', '.join(SUPPORTED)}"


def install_advice() -> str:
    """What to do about an SGLang that the hooks do not fit."""
    return f"install sglang=={SUPPORTED[-1]}"


def check_version() -> None:
    """Refuse an SGLang that is not in the table.

    Raises:
        ConfigError: another version, and the environment does not allow it.
    """
    version = installed_version()
    if version in SUPPORTED or os.environ.get(ALLOW_UNTESTED_ENV) == "1":
        return
    raise ConfigError(
        f"--kv-quant: expected SGLang {SUPPORTED[0]} to {SUPPORTED[-1]}, got {version}; "
        f"{install_advice()}, or set {ALLOW_UNTESTED_ENV}=1 to try this one"
    )
