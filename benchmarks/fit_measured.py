"""The fit of each chip's constants to published wall-clock times, on the rows that `published_measured.py` marks.

Plans depend on the constants and the constants on the plans, so they alternate: search the plan of every marked program, then
fit to all marked rows of the chip (robust least squares of log ratios). Every constant has a weak prior at its catalogued
value, so one that no row determines stays. Prints the tables `[CHIP.measured]` of `costmodels/machine/chips.toml`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import least_squares

from benchmarks.published_measured import Row, Step, all_rows, machine, solved, traced
from costmodels.fitting import predict
from costmodels.machine.chips import Chip, chip
from costmodels.machine.topology import Topology, complete_axes
from search.answer.assignment import Choice
from search.answer.check import check

ROUNDS = 1
"""Searches and fits; in a published layout, plans hardly depend on the constants."""
SAME = 1e-3
"""The change of a logarithm below which the rows do not determine a constant; it is not printed."""
EVALUATIONS = 8
LARGE = 0.05
"""The log ratio from which on an error counts in proportion, not squared: outliers count little."""
PRIOR = 0.03
"""The weight of the distance of a constant's logarithm from its catalogued value, beside log ratios of times."""
EFFICIENCIES = ("matmul_efficiency", "hbm_efficiency", "wire_efficiency")
OVERHEADS = ("op_overhead_seconds", "collective_overhead_seconds")
LEAST_OVERHEAD, MOST_OVERHEAD = 1e-8, 1e-4


def names(of: Chip) -> tuple[str, ...]:
    """The fitted constants of a chip."""
    hop = "torus.hop_seconds" if "torus.hop_seconds" in of.constants else "switch.hop_seconds"
    eighths = tuple(
        f"flops_per_second.{dtype}" for dtype in ("float8",) if of.kind == "gpu" and dtype in of.flops_per_second
    )
    rows = ("weight_load_rows",) if of.kind == "tpu" else ()
    return (*EFFICIENCIES, *OVERHEADS, hop, *eighths, *rows)


def start_of(of: Chip, name: str) -> float:
    """The catalogued value of a constant."""
    return of.load_rows if name == "weight_load_rows" else max(of.constants[name].value, LEAST_OVERHEAD)


def bound(of: Chip, name: str) -> tuple[float, float]:
    """The least and the most that a constant may be."""
    if name in EFFICIENCIES:
        return (0.6, 0.95) if name == "hbm_efficiency" else (0.3, 1.0)
    if name == "weight_load_rows":
        return 8.0, of.matrix_tile
    if name.startswith("flops_per_second"):
        return 0.3 * of.constants[name].value, of.constants[name].value * (1 + 1e-5)
    return LEAST_OVERHEAD, MOST_OVERHEAD


def with_constants(where: Topology, values: dict[str, float]) -> Topology:
    """The topology with other constants of its chip."""
    return complete_axes(replace(where, chip=where.chip.override(values, "a fit")))


def fit(rows: Sequence[Row], say=print) -> dict[str, float]:
    """The constants of the chip that these rows determine."""
    bare = chip(rows[0].chip)
    fitted = names(bare)
    start = np.log([start_of(bare, name) for name in fitted])
    low, high = (np.log([bound(bare, name)[side] for name in fitted]) for side in (0, 1))
    at = np.clip(start, low + 1e-6, high - 1e-6)
    for turn in range(ROUNDS):
        now = dict(zip(fitted, np.exp(at), strict=True))
        choices = [
            solved(row, with_constants(machine(row), now)).choice if isinstance(row.what, Step) else None
            for row in rows
        ]

        def errors(x: np.ndarray, choices=choices) -> np.ndarray:
            values = dict(zip(fitted, np.exp(x), strict=True))
            found = [
                np.log(_seconds(row, values, choice) / row.seconds) for row, choice in zip(rows, choices, strict=True)
            ]
            return np.array([*found, *(PRIOR * (x - start))])

        found = least_squares(
            errors, at, bounds=(low, high), diff_step=1e-3, loss="soft_l1", f_scale=LARGE, max_nfev=EVALUATIONS
        )
        at = np.clip(found.x, low + 1e-6, high - 1e-6)
        ratios = np.exp(errors(at)[: len(rows)])
        say(f"{bare.name}, round {turn + 1}: {np.round(ratios, 3).tolist()}", file=sys.stderr, flush=True)
    moved = np.abs(at - start) > SAME
    return {name: value for name, value, new in zip(fitted, np.exp(at), moved, strict=True) if new}


def _seconds(row: Row, values: dict[str, float], choice: Choice | None) -> float:
    where = with_constants(machine(row), values)
    if choice is None:
        return predict(row.what, where)  # pyright: ignore[reportArgumentType]
    return check(traced(row), where, choice).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a chip; may be given several times")
    only = parser.parse_args().only
    marked = [row for row in all_rows() if row.fitted]
    for name in only or dict.fromkeys(row.chip for row in marked):
        rows = [row for row in marked if row.chip == name]
        source = f"benchmarks/fit_measured.py, to the {len(rows)} rows of {name} that published_measured.py marks"
        print(f"[{name}.measured]  # fitted to: {'; '.join(row.name for row in rows)}")
        for constant, value in fit(rows).items():
            print(f'{constant} = {{ value = {value:.4g}, status = "fitted", source = "{source}" }}', flush=True)


if __name__ == "__main__":
    main()
