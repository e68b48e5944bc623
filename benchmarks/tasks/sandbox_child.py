"""Runs one program under limits: sandbox_child.py CPU_SECONDS MEMORY_BYTES FILE.

Exits with `PASSED` if the program ran to its end. What would reach beyond the process is refused by
an audit hook (PEP 578), since a container's root is bound by few limits of the system.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

PASSED = 42  # a program that ends itself early ends with another status
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    *("os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg"),
    *("os.link", "os.mkdir", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir"),
    *("os.symlink", "os.system", "os.truncate", "os.utime", "pty.spawn", "subprocess.Popen"),
    *("shutil.", "socket."),
)


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """Raise PermissionError for an event that writes, starts a process or uses the network."""
    if event.startswith(REFUSED) or (event == "open" and args[2] & WRITES):
        raise PermissionError(event)


def main(cpu_s: int, memory_bytes: int, path: Path) -> None:
    """Set the limits and run the program; does not return."""
    source = path.read_text()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    sys.addaudithook(refuse)
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    os._exit(PASSED)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
