"""Values as Python source in the format of ruff and black: one line if it fits, else one entry per line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoshard.export.arrays import Spec

_COLUMNS = 120
_INDENT = "    "


@dataclass(frozen=True)
class Group:
    """A bracketed expression: the opening, its entries, each with a prefix (a key), and the closing."""

    opening: str
    entries: tuple[tuple[str, Source], ...]
    closing: str


Source = str | Group


def sequence(items: Sequence[Source], brackets: str = "()") -> Group:
    """A tuple, or a list with `brackets="[]"`."""
    return Group(brackets[0], tuple(("", item) for item in items), brackets[1])


def assignment(name: str, value: Source) -> str:
    """The statement `name = value`, on one or several lines."""
    return _write(f"{name} = ", value, "", "")


def literal(value: str) -> str:
    """A string literal, in double quotes unless the text contains them."""
    plain = repr(value)
    return f'"{plain[1:-1]}"' if plain.startswith("'") and '"' not in plain else plain


def spec(entries: Spec) -> str:
    """A `PartitionSpec` as `P("x", None, ("y", "z"))`."""
    return f"P({', '.join(map(_entry, entries))})"


def axes(entry: str | tuple[str, ...] | None) -> str:
    """One entry of a `PartitionSpec`: `None`, `"x"` or `("x", "y")`."""
    return _entry(entry)


def _entry(entry: str | tuple[str, ...] | None) -> str:
    if entry is None or isinstance(entry, str):
        return "None" if entry is None else literal(entry)
    return f"({', '.join(map(literal, entry))})"


def _write(before: str, value: Source, after: str, indent: str) -> str:
    line = f"{indent}{before}{_to_one_line(value)}{after}"
    if isinstance(value, str) or not value.entries or len(line) <= _COLUMNS:
        return line
    inner = indent + _INDENT
    rows = [_write(key, entry, ",", inner) for key, entry in value.entries]
    return "\n".join([f"{indent}{before}{value.opening}", *rows, f"{indent}{value.closing}{after}"])


def _to_one_line(value: Source) -> str:
    if isinstance(value, str):
        return value
    inside = ", ".join(key + _to_one_line(entry) for key, entry in value.entries)
    lonely = "," if value.opening == "(" and len(value.entries) == 1 else ""
    return f"{value.opening}{inside}{lonely}{value.closing}"
