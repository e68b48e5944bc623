"""Graded answers, kept in a file of JSON lines, so that a run goes on where another stopped."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.cases import Grade
from benchmarks.tasks.prompts import Prompt


@dataclass(frozen=True)
class Source:
    """Who answered.

    Attributes:
        model: Name of its folder.
        system: As on the command line.
        calibration: Name of its file of bases, or "".
        device: Where it ran.
    """

    model: str
    system: str
    calibration: str
    device: str


class AnswerFile:
    """All graded answers of a file; new ones are written at once.

    Args:
        path: JSON lines; made with the first answer.

    Raises:
        ValueError: a line is no answer.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._grades: dict[tuple[Source, str, str], Grade] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                source = Source(*(entry[name] for name in Source.__annotations__))
                grade = Grade(entry["passed"], entry["similarity"])
                self._grades[source, entry["case"], entry["prompt"]] = grade
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{path}, line {number}: expected an answer, got {line[:40]!r}; delete the line"
                ) from None

    def grade(self, source: Source, prompt: Prompt) -> Grade | None:
        """Return the grade of an answer, None if there is none yet."""
        return self._grades.get((source, prompt.case.name, prompt.digest))

    def add(self, source: Source, prompt: Prompt, grade: Grade, **details: Any) -> None:
        """Keep an answer; `details` is what else is worth a look, its text first of all."""
        case = prompt.case
        entry = {
            **asdict(source),
            "task": case.task,
            "case": case.name,
            "prompt": prompt.digest,
            **asdict(grade),
            **details,
        }
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            self._grades[source, case.name, prompt.digest] = grade
