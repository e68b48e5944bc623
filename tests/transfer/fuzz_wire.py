"""Coverage-guided fuzzing of everything that reads bytes from a peer; needs `pip install atheris`.

Usage: python -m tests.transfer.fuzz_wire tests/transfer/corpus -max_total_time=600

An empty corpus is seeded with one valid input of each kind, which no mutation would find: headers
carry a checksum. `test_fuzz.py` does the same without coverage and without atheris.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sgl_kvq.transfer"]):
    from tests.support import wire_targets

if __name__ == "__main__":
    folder = next((Path(name) for name in sys.argv[1:] if not name.startswith("-")), None)
    if folder is not None and folder.is_dir() and not any(folder.iterdir()):
        for number, seed in enumerate(wire_targets.seeds()):
            (folder / f"seed-{number}").write_bytes(seed)
    atheris.Setup(sys.argv, wire_targets.one_input)
    atheris.Fuzz()
