"""Which weights an instance serves, so that two instances can tell whether they are the same."""

from __future__ import annotations

MAX_NAME = 256


class ServedWeights:
    """The version that SGLang was last told, and how many updates came without one.

    SGLang's own version does not change with an update that names none. An update that fails may
    have changed weights, so it counts as one without a name.

    Args:
        version: `--weight-version`.
    """

    def __init__(self, version: str) -> None:
        self._version, self._unnamed = version, 0

    def begin_update(self) -> None:
        """The weights are going to change."""
        self._unnamed += 1

    def name(self, version: str) -> None:
        """An update has succeeded, and this is its `weight_version`."""
        self._version, self._unnamed = version, 0

    def __str__(self) -> str:
        """What both instances must have in common."""
        updates = f" + {self._unnamed} updates" if self._unnamed else ""
        return self._version[:MAX_NAME] + updates
