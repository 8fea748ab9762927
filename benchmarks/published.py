"""The cost model against published numbers: one table, paper or book / ours / ratio.

    python benchmarks/published.py                       # all parts, and benchmarks/results/published.json
    python benchmarks/published.py --only book --only crossovers

Each part is a script of its own (`published_*.py`) with its own rows. A run of some parts leaves the rows of the others in the
file unchanged. A row is judged by its targets, if any:

- `within`: the allowed difference of ours from the reference; `bound`: ours may not be above the reference;
- `same_layout`: the free search has the paper's layout, or one that costs less;
- `slip`: the book's own formula gives ours, or the book's misprint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
RESULTS = Path(__file__).parent / "results" / "published.json"
Rows = list[dict[str, Any]]


def _crossovers() -> Rows:
    from benchmarks.published_crossovers import crossover_rows

    return [{**row, "within": 1e-9} if row["reference"] else row for row in crossover_rows()]


def _book() -> Rows:
    from benchmarks.published_book import rows

    return rows()


def _pope() -> Rows:
    from benchmarks.published_pope import rows

    return rows()


def _programs() -> Rows:
    from benchmarks.published_programs import rows

    return rows()


def _measured() -> Rows:
    from benchmarks.published_measured import rows

    return rows()


PARTS: dict[str, Callable[[], Rows]] = {
    "crossovers": _crossovers,
    "book": _book,
    "programs": _programs,
    "pope": _pope,
    "measured elsewhere": _measured,
}


def judged(row: dict[str, Any]) -> bool | None:
    """Whether a row meets its targets; None if it has none."""
    ours, reference = row["ours"], row["reference"]
    if ours is None:
        return False
    if "same_layout" in row:
        return row["same_layout"] or ours <= reference
    if row.get("bound"):
        return ours <= reference
    if "slip" in row or row["part"] == "book":
        from benchmarks.published_book import shown

        return shown(row)
    return abs(ours / reference - 1) <= row["within"] if "within" in row else None


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    ours, reference = row["ours"], row["reference"]
    ratio = f"{ours / reference:8.3f}" if ours is not None and reference else f"{'-':>8s}"
    verdict = {True: "ok", False: "MISS", None: ""}[judged(row)]
    note = row.get("why") or row.get("note") or row.get("slip") or row.get("formula") or ""
    if row.get("fitted"):
        note = f"fitted; {note}".removesuffix("; ")
    return f"{row['row']:112.112s} {_number(reference):>11s} {_number(ours):>11s} {ratio} {verdict:4s} {note}".rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e8 else f"{value:.4g}"


def run(parts: Sequence[str]) -> int:
    """Runs parts, prints the whole table of those, and writes them to the file; the number of rows that miss their targets."""
    rows: dict[str, Rows] = {}
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        rows[part] = [{"part": part, **row} for row in PARTS[part]()]
        for row in rows[part]:
            row["ok"] = judged(row)
        _keep(part, rows[part])
    print(f"{'':112s} {'published':>11s} {'ours':>11s} {'ratio':>8s}")
    for part in parts:
        print(f"\n{part}")
        print("\n".join(map(line, rows[part])))
    asked = [row for part in parts for row in rows[part] if row["ok"] is not None]
    missed = [row for row in asked if not row["ok"]]
    print(f"\n{len(asked) - len(missed)} of {len(asked)} rows of which something is asked are as asked.")
    return len(missed)


def _keep(part: str, rows: Rows) -> None:
    """Writes the rows of a part among those of the others."""
    kept: Rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    by_part = {name: [row for row in kept if row["part"] == name] for name in PARTS} | {part: rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([row for some in by_part.values() for row in some], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; may be given several times")
    run(parser.parse_args().only or list(PARTS))


if __name__ == "__main__":
    main()
