"""Limits of what connections send are the kernel's matter: the simulation has none."""

from __future__ import annotations

from typing import Any


class NoLimits:
    """In the place of `InboundLimits`: connections are not known."""

    def __contains__(self, descriptor: int) -> bool:
        return False

    def prove(self, *args: Any) -> bool:
        return False

    def add(self, *args: Any, **options: Any) -> None:
        pass

    took = hold = release = drop = forget = sweep = add
