"""Plain text tables and numbers with units, for all reports."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from textwrap import wrap

WIDTH = 120
"""The widest report, in columns; where the width of the output is unknown, its width."""
NARROW = 80
"""The columns of a terminal as it opens, and of a notebook's cell."""

_NARROWEST = 12
_KEY = re.compile(r"\[[^\]]*\]|\.?[^.\[\]/]+/?|/")
"""The parts of a path: keys in brackets, attributes, folders."""


def columns() -> int:
    """The columns of the output: of the terminal, between 80 and 120; 80 in a notebook; 120 in a pipe or a file."""
    if "ipykernel" in sys.modules:
        return NARROW
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        return WIDTH
    return min(max(shutil.get_terminal_size((WIDTH, 0)).columns, NARROW), WIDTH)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, width: int = WIDTH) -> list[str]:
    """The lines of a table: a row of headers, a rule, the rows.

        table(("name", "seconds"), [("wq", "1.2 ms")], "<>")

    **Arguments:**

    - `align`: one sign per column: `<` left, `>` right, `~` left, and if the table is too wide shortened at its end, or
      below the full width wrapped, `/` left and shortened to the parts that tell its paths apart.
    """
    head, blocks = table_blocks(headers, rows, align, width)
    return [*head, *(line for block in blocks for line in block)]


def table_blocks(
    headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, width: int = WIDTH
) -> tuple[list[str], list[list[str]]]:
    """The lines of a table, as those of its head, and those of each row."""
    cells = [tuple(headers), *map(tuple, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headers))]
    flexible = [k for k, sign in enumerate(align) if sign in "~/"]
    while sum(widths) + 2 * (len(widths) - 1) > width and flexible:
        longest = max(flexible, key=lambda k: widths[k])
        if widths[longest] <= _NARROWEST:
            break
        widths[longest] -= 1
    shown = [
        _paths([row[k] for row in rows], widths[k]) if sign == "/" else [row[k] for row in rows]
        for k, sign in enumerate(align)
    ]
    wraps = width < WIDTH - 2
    blocks = [_block(row, widths, align, wraps) for row in zip(*shown, strict=True)]
    head = "  ".join(_cell(text, w, sign) for text, w, sign in zip(headers, widths, align, strict=True)).rstrip()
    return [head, "  ".join("─" * w for w in widths)], blocks


def _block(row: Sequence[str], widths: Sequence[int], align: str, wraps: bool) -> list[str]:
    """The lines of one row: more than one if a cell is wrapped."""
    parts = [
        _wrapped(text, w) if wraps and sign == "~" else [text] for text, w, sign in zip(row, widths, align, strict=True)
    ]
    height = max(map(len, parts))
    filled = [[*part, *[""] * (height - len(part))] for part in parts]
    return ["  ".join(map(_cell, line, widths, align)).rstrip() for line in zip(*filled, strict=True)]


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a cell, broken after spaces and commas where possible."""
    lines = [""]
    for word in re.findall(r"[^ ,]*[ ,]?", text):
        while len((lines[-1] + word).rstrip()) > width and len(word.rstrip()) > width:
            lines[-1], word = (lines[-1] + word)[:width], (lines[-1] + word)[width:]
            lines.append("")
        if len((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.strip() for line in lines]


def _cell(text: str, width: int, sign: str) -> str:
    if len(text) > width:
        text = f"{text[: width - 1]}…"
    return f"{text:{'<' if sign in '~/' else sign}{width}}"


def _paths(texts: Sequence[str], width: int) -> list[str]:
    """Paths in at most `width` columns, by the parts in which they differ.

    Of a path that is too long, the parts that most other paths have, too, are left out first.
    """
    every = list(dict.fromkeys(texts))
    if all(len(text) <= width for text in every):
        return list(texts)
    parts = {text: [text] if " " in text else _KEY.findall(text) or [text] for text in every}
    shared = Counter(part for found in parts.values() for part in set(found))
    short = {text: text if len(text) <= width else shortened_path(parts[text], shared, width) for text in every}
    return [short[text] for text in texts]


def shortened_path(parts: Sequence[str], shared: Mapping[str, int], width: int) -> str:
    """The parts of one path in at most `width` columns, without those that most paths share; the last decide a tie."""
    kept = [True] * len(parts)
    for at in sorted(range(len(parts)), key=lambda k: (-shared[parts[k]], k)):
        text = _joined(parts, kept)
        if len(text) <= width or sum(kept) == 1:
            break
        kept[at] = False
    text = _joined(parts, kept)
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _joined(parts: Sequence[str], kept: Sequence[bool]) -> str:
    text = "".join(part if keep else "…" for part, keep in zip(parts, kept, strict=True))
    return re.sub("…+", "…", text)


def item(text: str, width: int = WIDTH) -> list[str]:
    """The lines of one item of a list."""
    return wrap(text, width, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def wrap_text(text: str, width: int, indent: int) -> list[str]:
    """The lines of a text that keeps its own spaces; those after the first begin at a column."""
    if len(text) <= width:
        return [text]
    cut = text.rfind(" ", indent + 1, width + 1)
    if cut <= indent:
        return [text]
    return [text[:cut].rstrip(), *wrap_text(" " * indent + text[cut:].lstrip(), width, indent)]


def time(seconds: float) -> str:
    """Seconds in a suitable unit: `23.5 ms`, `869 µs`."""
    if seconds == 0 or not isfinite(seconds):
        return f"{seconds:g} s"
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, scale = next(((unit, scale) for unit, scale in units if abs(seconds) >= scale), ("ns", 1e-9))
    return f"{_to_three_digits(seconds / scale)} {unit}"


def size(count: float) -> str:
    """Bytes in a suitable binary unit: `16.97 GiB`, `32 KiB`, `4 B`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= scale / 1024 * 1000:
            return f"{_short(count / scale)} {unit}"
    return f"{_short(count)} B"


def figure(number: float) -> str:
    """A number without unit, with three significant digits and thousands written out: `0.0338`, `1330`."""
    return f"{number:.0f}" if 1000 <= abs(number) < 1e6 else f"{number:.3g}"


def percent(share: float) -> str:
    """A share as percent: `0.4 %`."""
    return f"{100 * share:.1f} %"


def _to_three_digits(number: float) -> str:
    """Three significant digits."""
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}"


def _short(number: float) -> str:
    text = f"{number:.2f}" if abs(number) < 100 else f"{number:.1f}"
    return text.rstrip("0").rstrip(".")
