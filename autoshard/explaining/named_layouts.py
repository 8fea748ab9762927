"""Layouts of the literature as plans: pinned on a program by the names of its dimensions, with their volumes.

Pope et al. 2022, §3.2, on axes x, y, z, for a feed-forward block that contracts E into F and back, of tokens BL:

| family | stored weights | matmuls | activations between blocks |
|---|---|---|---|
| `WS-1D` | $E F_{xyz}$ | F over xyz | $BLE_{xyz}$ |
| `WS-2D` | $E_x F_{yz}$ | E over x, F over yz | $BLE_{xyz}$ |
| `WG-X` | $E_x F_{yz}$ | B over x, F over yz | $B_x L E_{yz}$ |
| `WG-XY` | $E_x F_{yz}$ | B over xy, F over z | $B_{xy} L E_z$ |
| `WG-XYZ` | $E_x F_{yz}$ | B over xyz | $B_{xyz} L E$ |

This module has no cost formulas: the collectives are the reshards of the pinned program, each by the steps that send least.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import NamedTuple

from autoshard.explaining.formulas import array_bytes
from costmodels.dimensions import Dimensions
from costmodels.machine.lazy_sympy import sympy
from costmodels.program.program import Operation, Program
from costmodels.symbols import Expr, pieces, volume
from search.answer.assignment import Choice, moves, needed_layout, produced_layout
from search.formulation.collective_steps import CollectiveStep, permuted_axes, steps_from
from search.formulation.layouts import Axes, Layout
from search.formulation.strategies import Strategy

Split = Mapping[str, Axes]
"""Mesh axes by the name of the dimension they split."""


@dataclass(frozen=True)
class Family:
    """A named layout of a block of matmuls: the axes of each dimension, by role.

    Roles are "contracted" (E), "output" (F) and "tokens" (the first dimension of the batch).

    - `stored`: stored weights; `used`: the matmuls.
    - `hidden`: activations between the matmuls; `outside`: inputs and results of the block.
    """

    name: str
    stored: Split
    used: Split
    hidden: Split
    outside: Split


def families(axes: Sequence[str]) -> tuple[Family, ...]:
    """The weight-stationary and weight-gathered layouts on a mesh with these axes.

    The first axis splits E, the others F, in an order in which gathering over the first axes leaves the rest in place.
    """
    every, first, others = tuple(axes), tuple(axes[:1]), tuple(axes[:0:-1])
    stored = {"contracted": first, "output": others}
    found = [Family("WS-1D", {"output": every}, {"output": every}, {"output": every}, {"contracted": every})]
    if others:
        hidden, outside = {"output": (*others, *first)}, {"contracted": (*first, *others)}
        found.append(Family("WS-2D", stored, stored, hidden, outside))
    for gathered in range(1, len(every) + 1):
        over, rest = every[:gathered], tuple(axis for axis in others if axis not in every[:gathered])
        used = {"tokens": over, "output": rest}
        outside = {"tokens": over, "contracted": rest}
        found.append(Family(f"WG-{''.join(over).upper()}", stored, used, used, outside))
    return tuple(found)


def pin_by_name(
    program: Program, dimensions: Dimensions, splits: Callable[[int, Operation], Split], axes: Sequence[str]
) -> Choice:
    """The plan that splits named dimensions as given.

    **Arguments:**

    - `splits`: per operation the axes of each dimension, by name. If two factors have one name, the first is split.
    - `axes`: the mesh axes.

    **Raises:** `ValueError` for an axis that is not in the mesh.
    """
    strategies = []
    for i, op in enumerate(program.operations):
        table = dict(splits(i, op))
        unknown = {axis for split in table.values() for axis in split} - set(axes)
        if unknown:
            raise ValueError(f"The axes of {op.name} must be among {', '.join(axes)}, got {', '.join(sorted(unknown))}")
        chosen = tuple(
            table.pop(name, ()) if factor.kind != "whole" else ()
            for name, factor in zip(dimensions.factors[i], op.factors, strict=True)
        )
        strategies.append(Strategy(chosen, ((),) * len(op.linear)))
    choice = Choice(tuple(strategies), {})
    hubs = {value: _stored_layout(program, choice, value) for value, uses in program.consumers.items() if len(uses) > 1}
    return Choice(choice.strategies, hubs)


def _stored_layout(program: Program, choice: Choice, value: int) -> Layout:
    """The stored layout of an array: that of its uses, if they agree, or that of its producer."""
    wanted = {needed_layout(program, choice, operation, operand) for operation, operand in program.consumers[value]}
    return wanted.pop() if len(wanted) == 1 else produced_layout(program, choice, value)


# --- Volumes


class Moved(NamedTuple):
    """A collective of a pinned plan: `payload` in bytes by the collectives' convention, `runs` in one step."""

    kind: str
    axes: Axes
    value: int
    payload: Expr
    runs: Expr

    def volume(self, exact: bool) -> Expr:
        """The bytes that one chip sends in one step; without `exact` by the convention of Pope et al., $(N-1)/N = 1$."""
        return self.runs * volume(self.kind, self.axes, self.payload, exact)


def find_collectives(
    program: Program, dimensions: Dimensions, sizes: Mapping[str, int], choice: Choice
) -> tuple[Moved, ...]:
    """The collectives of a pinned plan, with each reshard by the steps that send least.

    Consecutive gathers are one gather over all their axes, and so are scatters: the volume is the same,
    $\\frac{V}{Y}\\frac{X-1}{X} + V\\frac{Y-1}{Y} = V\\frac{XY-1}{XY}$.

    **Arguments:**

    - `sizes`: mesh axes with their sizes.
    """
    found = []
    for move in moves(program, choice):
        total, runs = array_bytes(program, dimensions, move.value), dimensions.runs(program, move.region)
        for kind, axes, of in _merge(least_steps(move.source, move.target, sizes)):
            found.append(Moved(kind, axes, move.value, total / pieces(of.axes), runs))
    return tuple(found)


def total_volume(collectives: Sequence[Moved], exact: bool = False) -> Expr:
    """The bytes that one chip sends in one step."""
    return sympy.Add(*(each.volume(exact) for each in collectives))


def _merge(steps: Sequence[CollectiveStep]) -> Iterator[tuple[str, Axes, Layout]]:
    """Kind, axes and the layout of the payload, without slices, which send nothing."""
    sending = [step for step in steps if step.kind != "slice"]
    at = 0
    while at < len(sending):
        end = at + 1
        while sending[at].kind in ("all-gather", "reduce-scatter") and end < len(sending):
            if sending[end].kind != sending[at].kind:
                break
            end += 1
        run = sending[at:end]
        axes = tuple(axis for step in run for axis in step.axes)
        of = run[-1] if run[0].kind == "all-gather" else run[0]
        yield run[0].kind, axes, of.payload_layout
        at = end


def least_steps(source: Layout, target: Layout, sizes: Mapping[str, int]) -> tuple[CollectiveStep, ...]:
    """The single collectives from one layout to another that send least, by Dijkstra's algorithm; the fewest of
    equal ones.

    **Raises:** `ValueError` if there are none.
    """
    order = count()
    frontier: list[tuple[float, int, int, Layout, tuple[CollectiveStep, ...]]] = [(0.0, 0, next(order), source, ())]
    done: set[Layout] = set()
    while frontier:
        sent, taken, _, layout, path = heapq.heappop(frontier)
        if layout == target:
            return path
        if layout in done:
            continue
        done.add(layout)
        for step in _steps_from(layout, target, sizes):
            if step.target not in done:
                more = _volume(step, sizes)
                heapq.heappush(frontier, (sent + more, taken + 1, next(order), step.target, (*path, step)))
    raise ValueError(f"no collectives lead from {source} to {target}")


def _steps_from(layout: Layout, target: Layout, sizes: Mapping[str, int]) -> Iterator[CollectiveStep]:
    yield from steps_from(layout, sizes)
    if layout.axes and _cuts(layout, sizes) == _cuts(target, sizes) and layout.partial == target.partial:
        yield CollectiveStep("collective-permute", permuted_axes(layout, target, sizes), layout, target)


def _cuts(layout: Layout, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(prod(sizes[axis] for axis in dim) for dim in layout.dims)


def _volume(step: CollectiveStep, sizes: Mapping[str, int]) -> float:
    """The bytes that a step sends per byte of the array."""
    chips = prod(sizes[axis] for axis in step.axes)
    if step.kind == "slice":
        return 0.0
    share = 1.0 if step.kind == "collective-permute" else (chips - 1) / chips
    return (2 if step.kind == "all-reduce" else 1) * share * step.payload(1.0, sizes)
