"""Plain text tables and numbers with units, for all reports."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from textwrap import wrap

WIDTH = 120
"""The default width of a report, in columns."""

_NARROWEST = 12


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str, width: int = WIDTH) -> list[str]:
    """The lines of a table: a row of headers, a rule, the rows.

        table(("name", "seconds"), [("wq", "1.2 ms")], "<>")

    **Arguments:**

    - `align`: one sign per column: `<` left, `>` right, `~` left and shortened at its end if the table is too wide,
      `/` left and shortened in its middle, for paths.
    """
    cells = [tuple(headers), *map(tuple, rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headers))]
    flexible = [k for k, sign in enumerate(align) if sign in "~/"]
    while (excess := sum(widths) + 2 * (len(widths) - 1) - width) > 0 and flexible:
        longest = max(flexible, key=lambda k: widths[k])
        if widths[longest] <= _NARROWEST:
            break
        widths[longest] = max(_NARROWEST, widths[longest] - excess)
    lines = ["  ".join(map(_cell, row, widths, align)).rstrip() for row in cells]
    return [lines[0], "  ".join("─" * w for w in widths), *lines[1:]]


def _cell(text: str, width: int, sign: str) -> str:
    if len(text) > width:
        head = width - 1 if sign != "/" else (width - 1) // 3
        text = f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
    return f"{text:{'<' if sign in '~/' else sign}{width}}"


def item(text: str, width: int = WIDTH) -> list[str]:
    """The lines of one item of a list."""
    return wrap(text, width, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def time(seconds: float) -> str:
    """Seconds in a suitable unit: `23.5 ms`, `869 µs`."""
    if seconds == 0 or not isfinite(seconds):
        return f"{seconds:g} s"
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, scale = next(((unit, scale) for unit, scale in units if abs(seconds) >= scale), ("ns", 1e-9))
    return f"{_three(seconds / scale)} {unit}"


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


def _three(number: float) -> str:
    """Three significant digits."""
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f}"


def _short(number: float) -> str:
    text = f"{number:.2f}" if abs(number) < 100 else f"{number:.1f}"
    return text.rstrip("0").rstrip(".")
