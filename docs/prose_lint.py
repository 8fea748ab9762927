"""A lint for the English of the repository: Markdown, docstrings, comments and messages.

    python docs/prose_lint.py                # everything but the exempt files; exit code 1 if a pattern is found
    python docs/prose_lint.py autoshard/cli  # these files, exempt or not

`CONTRIBUTING.md` has the rules and the glossary. Markdown between `<!-- quoted -->` and
`<!-- /quoted -->` may quote the patterns.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("autoshard", "costmodels", "search")
FOLDERS = ("autoshard", "costmodels", "search", "docs", "examples", "benchmarks")

EXEMPT: tuple[str, ...] = ()
"""Rooms whose English has not been revised yet. This list only gets shorter."""

ANYWHERE: dict[str, str] = {
    r"\banew\b": "again; re-tiled, recomputed, refitted",
    r"\bwould do\b": "`X must be A or B, got C`",
    r"(?<!there )(?<!There )\b(is|are|was|were) no (?!longer|more|less|other|better|worse|faster|slower)[a-z]": "is not a ...",
    r"\bwh(o|at|ich)ever\b": "any ... that",
    r"\bdearer\b": "costlier",
    r"\bprices? of memory\b": "Lagrange multiplier",
    r"\bnobody (vouches|needs)\b": "without a source; not needed",
    r"\bvouch": "without a source",
    r"\bstruck out\b|\bstrikes? out\b": "fixed, removed",
    r"\bwhole on (every|each|all)\b": "replicated",
    r"\bin the user's words\b": "name the content: paths, source lines",
    r"\b(goes|go|going|went) round\b": "loop carry",
    r"\blaid out (again|otherwise|alike)\b": "re-tiled; in another layout; in one layout",
    r"\bchanges? of layouts?\b": "reshard",
    r"\bhas not the\b|\bhave not the\b": "lacks the",
    r"\bone (behind|after) the other\b": "concatenated; serial",
    r"\bmakes no sense\b": "is invalid",
    r"\bthat there (is|are) not\b": "that does not exist",
    r"\bcomputed? (things )?again\b": "rematerialise, recompute",
    r"\bwaits? for\b(?= (the )?(compute|HBM|what))": "is bound by",
}
"""Patterns that no prose may contain, each with the remedy."""
AT_THE_START: dict[str, str] = {
    r"(What|Which|Whoever|Whatever) (?![^\n]*\?)": "begin with a noun phrase or a verb",
    r"So that\b": "put the subject first",
}
"""Patterns that no docstring, comment, heading or message may begin with."""


class Prose(NamedTuple):
    """A piece of prose: where it begins, and its text."""

    path: Path
    line: int
    text: str


def prose_of(path: Path) -> Iterator[Prose]:
    """The prose of a file: paragraphs of Markdown; docstrings, comments and messages of Python."""
    if path.suffix == ".md":
        yield from _markdown(path)
    elif path.suffix == ".py":
        yield from _docstrings_and_messages(path)
        yield from _comments(path)


def _markdown(path: Path) -> Iterator[Prose]:
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```") or line.strip() in ("<!-- quoted -->", "<!-- /quoted -->"):
            fenced = not fenced
        elif not fenced and not line.startswith("    ") and line.strip():
            yield Prose(path, number, line.lstrip("#-*> ").strip())


def _docstrings_and_messages(path: Path) -> Iterator[Prose]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Prose(path, node.lineno, node.value.value)
        elif _is_message(node):
            yield from _texts(path, node)


def _is_message(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _name(node.func) in ("warn", "Misuse")
    return isinstance(node, ast.Raise) or (isinstance(node, ast.keyword) and node.arg == "help")


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _texts(path: Path, node: ast.AST) -> Iterator[Prose]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.JoinedStr):
            yield Prose(path, inner.lineno, "".join(_piece(value) for value in inner.values))
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield Prose(path, inner.lineno, inner.value)


def _piece(value: ast.expr) -> str:
    return str(value.value) if isinstance(value, ast.Constant) else "{}"


def _comments(path: Path) -> Iterator[Prose]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT:
            yield Prose(path, token.start[0], token.string.lstrip("#!- ").strip())


def faults(prose: Prose) -> Iterator[str]:
    """The forbidden patterns in a piece of prose, as `path:line: what was found -> remedy`."""
    where = prose.path.relative_to(ROOT)
    for pattern, remedy in ANYWHERE.items():
        for match in re.finditer(pattern, prose.text):
            line = prose.line + prose.text[: match.start()].count("\n")
            yield f"{where}:{line}: {match[0]!r} -> {remedy}"
    for pattern, remedy in AT_THE_START.items():
        if match := re.match(pattern, prose.text):
            yield f"{where}:{prose.line}: begins with {match[0]!r} -> {remedy}"
    for match in re.finditer(rf"`(({'|'.join(PACKAGES)})(\.[a-z_0-9]+)+)", prose.text):
        if not _is_module(match[1]):
            yield f"{where}:{prose.line + prose.text[: match.start()].count(chr(10))}: there is no module {match[1]}"


def _is_module(name: str) -> bool:
    """Whether a dotted name is a folder, a module, a name in a module, or a name that a package's door imports."""
    parts = name.split(".")
    if ROOT.joinpath(*parts).is_dir():
        return True
    if any(ROOT.joinpath(*parts[:n]).with_suffix(".py").is_file() for n in range(2, len(parts) + 1)):
        return True
    door = ROOT.joinpath(*parts[:-1], "__init__.py")
    return door.is_file() and parts[-1] in door.read_text()


def is_exempt(path: Path) -> bool:
    """Whether a file has not been revised yet."""
    name = str(path.relative_to(ROOT))
    return any(name == exempt or name.startswith(f"{exempt}/") for exempt in EXEMPT)


def files(arguments: list[str]) -> Iterator[Path]:
    """The files to read: those given, or all that are not exempt."""
    if arguments:
        for given in map(Path.resolve, map(Path, arguments)):
            yield from sorted(given.rglob("*.py")) if given.is_dir() else (given,)
        return
    yield from sorted(path for path in ROOT.glob("*.md"))
    for folder in FOLDERS:
        found = sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")])
        yield from (path for path in found if not is_exempt(path) and path != Path(__file__).resolve())


def main(arguments: list[str]) -> int:
    """Prints every fault; returns the exit code."""
    found = list(
        dict.fromkeys(fault for path in files(arguments) for prose in prose_of(path) for fault in faults(prose))
    )
    print("\n".join(found) if found else "The prose has no forbidden patterns.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
