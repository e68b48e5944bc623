"""What a codec of payloads is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec

from sgl_kvq.memory_pool.page_io.span import Buffer


class Codec(ABC):
    """A lossless codec; one object serves all threads of a process.

    Attributes:
        id: Number in the block header, 0 to 255; 0 to 127 are this package's.
        name: Value of `--kv-quant-transfer-codec`, and what the handshake compares.
        module: Module it needs beside this package; None if none.
        package: Name under which pip installs that module.
    """

    id: int
    name: str
    module: str | None = None
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the module it needs can be found."""
        if self.module is None:
            return True
        try:
            return find_spec(self.module) is not None
        except ModuleNotFoundError:  # the parent package of a dotted name
            return False

    @abstractmethod
    def encode(self, payload: Buffer) -> Buffer:
        """Compress a payload."""

    @abstractmethod
    def decode(self, data: Buffer, raw_bytes: int) -> Buffer:
        """Undo `encode`, allocating about `raw_bytes` whatever the data says.

        Args:
            data: What `encode` returned, its checksum verified.
            raw_bytes: Size of the payload, at most 16 MiB.

        Raises:
            Exception: damaged data; any exception is taken as such.
        """
