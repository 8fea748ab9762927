"""The picture of the architecture page: the rooms of the code and their imports, drawn as SVG.

    python docs/rooms.py          # docs/images/rooms.svg; names every import that runs upwards

A room is a folder of `autoshard`, `search` or `costmodels`; the files beside the folders are the package's top. An arrow is an
import between two rooms. Arrows that follow from others (transitive imports) are left out. `tests/whole/test_docs.py` compares
the kept picture with this script.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

FLOORS: dict[str, str] = {
    "costmodels.machine": "chips, topologies, collectives",
    "costmodels.program": "operations over factors, regions",
    "costmodels": "costs of operations, formulas",
    "search.formulation": "nodes, edges, costs",
    "search.memory": "memory constraints",
    "search.answer": "assignment, checker",
    "search.presolve": "lower bound, first plans",
    "search.cpsat": "CP-SAT, branching",
    "search": "solve, phases, k best",
    "autoshard.errors": "every error",
    "autoshard.workload": "a function and its arguments",
    "autoshard._util": "tables, files",
    "autoshard.rules": "a sharding rule per primitive",
    "autoshard.tracing": "function to program",
    "autoshard.annotating": "pins, names, HBM traffic",
    "autoshard.naming": "names of strategies",
    "autoshard.planning": "solution to plan, plan files",
    "autoshard.emitting": "plan to sharded function",
    "autoshard.auditing": "compiled program against plan",
    "autoshard.carrying": "specs, constraints, by hand",
    "autoshard.explaining": "tables, formulas, rooflines",
    "autoshard.export": "specs, rules, Flax, MaxText",
    "autoshard": "search(), Plan, decorator",
    "autoshard.comparing": "diff, k best, what-if, verify",
    "autoshard.calibrating": "measured topologies",
    "autoshard.sweep": "jobs, points, frontier",
    "autoshard.report": "HTML pages, plots",
    "autoshard.cli": "the commands",
}
"""The rooms from the lowest floor to the highest, with their contents. A room may import only rooms above it in this list."""
PASSES = {
    "autoshard.tracing": "1 trace",
    "autoshard.annotating": "2 annotate",
    "search": "3 search",
    "autoshard.emitting": "4 emit",
    "autoshard.auditing": "5 audit",
}
_PACKAGES = ("costmodels", "search", "autoshard")
_COLOURS = {"costmodels": "#e9edf1", "search": "#e3eefb", "autoshard": "#fdf1e3"}
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 196, 46, 16, 44


def room_of(module: str) -> str:
    """The room of a module: its folder, or the package's top."""
    parts = module.split(".")
    name = ".".join(parts[:2])
    return name if name in FLOORS else parts[0]


def imports() -> Iterator[tuple[str, str]]:
    """Every import between two modules of the three packages, lazy and type-only ones included.

    The doors of packages and `__main__` stand outside of the floors.
    """
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if module.count(".") == 1 and path.stem in ("__init__", "__main__"):
                continue
            for target in _imported(path):
                if target.split(".")[0] in _PACKAGES:
                    yield module.removesuffix(".__init__"), target


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            is_folder = (ROOT / node.module.replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if is_folder else (node.module,)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def upward() -> list[str]:
    """The imports that run from a room to a higher one, as `module -> module`."""
    floor = {name: i for i, name in enumerate(FLOORS)}
    return [f"{a} -> {b}" for a, b in imports() if floor[room_of(a)] < floor[room_of(b)]]


def arrows() -> dict[str, set[str]]:
    """Per room the rooms that it imports, without those that it reaches through another."""
    floor = {name: i for i, name in enumerate(FLOORS)}
    pairs = {(room_of(a), room_of(b)) for a, b in imports()}
    direct = {name: {b for a, b in pairs if a == name and floor[b] < floor[a]} for name in FLOORS}
    reached: dict[str, set[str]] = {}
    for name in FLOORS:
        reached[name] = direct[name] | {far for near in direct[name] for far in reached[near]}
    return {
        name: {b for b in below if not any(b in reached[other] for other in below if other != b)}
        for name, below in direct.items()
    }


def svg() -> str:
    """The picture: a row per depth, importers above what they import."""
    below = arrows()
    depth: dict[str, int] = {}
    for name in FLOORS:
        depth[name] = 1 + max((depth[other] for other in below[name]), default=-1)
    rows = [[name for name in FLOORS if depth[name] == level] for level in range(max(depth.values()) + 1)]
    widest = max(map(len, rows))
    width = widest * (_WIDTH + _GAP_X) + 2 * _GAP_X
    height = len(rows) * (_HEIGHT + _GAP_Y) + 64
    place: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        near = {name: sum(place[b][0] for b in below[name]) / max(len(below[name]), 1) for name in row}
        left = (width - len(row) * (_WIDTH + _GAP_X) + _GAP_X) / 2
        for i, name in enumerate(sorted(row, key=lambda name: near[name])):
            place[name] = left + i * (_WIDTH + _GAP_X), height - 20 - _HEIGHT - level * (_HEIGHT + _GAP_Y)
    parts = [_arrow(place[a], place[b]) for a in FLOORS for b in sorted(below[a])]
    parts += [_box(name, *place[name]) for name in FLOORS]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
        f' font-family="system-ui, sans-serif" fill="#1c2126">\n<title>The rooms of autoshard and their imports</title>\n'
        f'<rect width="{width:g}" height="{height:g}" rx="10" fill="#f9fafb"/>\n'
        f'<text x="{2 * _GAP_X}" y="28" font-size="13">Arrows point from a room to the rooms that it imports.'
        " The five passes are framed.</text>\n"
        f"{body}\n</svg>\n"
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y = start[0] + _WIDTH / 2, start[1] + _HEIGHT
    to_x, to_y = end[0] + _WIDTH / 2, end[1]
    bend = (to_y - y) / 2
    return (
        f'<path d="M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}m-4 -6l4 6l4 -6"'
        ' fill="none" stroke="#8a96a3" stroke-width="1.1"/>'
    )


def _box(name: str, x: float, y: float) -> str:
    title = PASSES.get(name, "")
    stroke = ' stroke="#c2410c" stroke-width="2.5"' if title else ' stroke="#b6c0ca"'
    label = f"{title}: {name.removeprefix('autoshard.')}" if title else name
    fill = _COLOURS[name.split(".")[0]]
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="7" fill="{fill}"{stroke}/>\n'
        f'<text x="{x + _WIDTH / 2:g}" y="{y + 19:g}" font-size="12" text-anchor="middle" font-weight="600">'
        f"{escape(label)}</text>\n"
        f'<text x="{x + _WIDTH / 2:g}" y="{y + 36:g}" font-size="11" text-anchor="middle">{escape(FLOORS[name])}</text>'
    )


if __name__ == "__main__":
    PICTURE.write_text(svg())
    for line in upward():
        print(f"upwards: {line}")
    print(f"Wrote {PICTURE.relative_to(ROOT)}.")
