"""Verbatim copies: a named function out of a file of about 5,000 tokens.

The files are the standard library of the Python that runs this, less the modules that calibration
uses by default.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path

from benchmarks.tasks.cases import FENCE_END, PYTHON_FENCE, Case, Grade
from sgl_kvq.commands.calibrate.text import MODULES

TASK = "copy"
COUNT = 104
FILE_BYTES = range(16_000, 24_000)  # 4,000 to 6,000 tokens
FUNCTION_LINES = range(8, 41)
NO_LIBRARY = {"idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
QUESTION = """The file {file}:

```python
{source}
```

Copy the function `{name}` of this file word for word, with its comments, its docstring and its
indentation. Answer with this function alone, in one block of code.
"""


def cases(seed: int = 0) -> list[Case]:
    """Return `COUNT` cases, those of a file one after the other."""
    library = Path(sysconfig.get_path("stdlib"))
    known = [
        (path.relative_to(library).as_posix(), source, *function)
        for path, source in _files(library)
        for function in functions(source)
    ]
    chosen = sorted(random.Random(seed).sample(range(len(known)), COUNT))
    made = []
    for file, source, name, text in (known[index] for index in chosen):
        made.append(
            Case(
                task=TASK,
                name=f"{file} {name}",
                group=file,
                question=QUESTION.format(file=file, source=source, name=name),
                answer_begin=PYTHON_FENCE,
                stop=FENCE_END,
                max_tokens=64 + len(text) // 3,
                grade=partial(grade, text),
            )
        )
    return made


def _files(library: Path) -> Iterator[tuple[Path, str]]:
    calibrated = {Path(str(module.__file__)) for module in MODULES}
    for path in sorted(library.rglob("*.py")):
        is_library = not NO_LIBRARY & {*path.relative_to(library).parts}
        if is_library and path.stat().st_size in FILE_BYTES and path not in calibrated:
            yield path, path.read_text("utf-8")


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield name and text of the functions of a file that can be asked for by name.

    These are functions and methods of classes without decorators, of `FUNCTION_LINES`, whose name
    the file defines once.
    """
    tree, lines = ast.parse(source), source.splitlines()
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef)
    times = Counter(node.name for node in ast.walk(tree) if isinstance(node, definitions))
    for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
        for node in scope.body:
            if not isinstance(node, definitions) or node.decorator_list or times[node.name] > 1:
                continue
            text = lines[node.lineno - 1 : node.end_lineno]
            if len(text) in FUNCTION_LINES:
                yield node.name, "\n".join(text)


def grade(expected: str, answer: str) -> Grade:
    """Compare a copy with the function; indentation of the whole and ends of lines do not count."""
    found, right = _normal(answer), _normal(expected)
    ratio = SequenceMatcher(None, found, right, autojunk=False).ratio()
    return Grade(found == right, ratio)


def _normal(text: str) -> str:
    lines = [line.rstrip() for line in textwrap.dedent(text.expandtabs()).splitlines()]
    return "\n".join(lines).strip("\n")
