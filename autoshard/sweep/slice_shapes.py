"""The shapes of slices with a given number of chips, as a chip's torus or nodes allow."""

from __future__ import annotations

from collections.abc import Iterator

from costmodels.machine.chips import Chip
from costmodels.machine.interconnects import Switch, Torus
from costmodels.machine.offered import is_offered

_CUBE = 4
"""Chips along a side of the blocks that optical switches join (the wraparound rule "all axes multiples of 4")."""
_ROW = 16
"""Chips along a side of a whole pod of a fixed torus (the wraparound rule "axis of 16")."""
_BUS_AXES = 2


def shapes(chip: Chip, count: int, any_shape: bool = True) -> tuple[tuple[int, ...], ...]:
    """Every shape of `count` chips, without axes of size 1 and with rising sizes.

        shapes(chip("v4"), 16)          # ((2, 2, 4), (4, 4)): parts of a cube
        shapes(chip("v4"), 16, False)   # ((2, 2, 4),): Cloud TPU lists no 4x4x1
        shapes(chip("v4"), 128)         # ((4, 4, 8),): whole cubes
        shapes(chip("h100"), 16)        # ((2, 8),): nodes × GPUs

    A torus of cubes has slices inside one cube, of sides 1, 2 and 4, and slices of whole cubes; a torus with fixed links has
    sides of powers of two up to a full row ("How To Scale Your Model", part 2, and Cloud TPU's list of slices). GPUs fill
    whole nodes. Other chips may have any two sides. Empty if there is no such slice.

    **Arguments:**

    - `any_shape`: whether shapes that no vendor lists are included (`costmodels.machine.offered`).
    """
    match chip.interconnect:
        case Torus() as torus:
            found = [sides for sides in _factorisations(count, int(torus.axes)) if _is_allowed(torus, sides)]
        case Switch() as switch:
            node = int(switch.chips_per_node)
            found = [(count,)] if count <= node else [(count // node, node)] if count % node == 0 else []
        case _:
            found = list(_factorisations(count, _BUS_AXES))
    return tuple(sides or (1,) for sides in found if any_shape or is_offered(chip, sides))


def _is_allowed(torus: Torus, sides: tuple[int, ...]) -> bool:
    if torus.wraparound == "all axes multiples of 4":
        whole = len(sides) == torus.axes and all(side % _CUBE == 0 for side in sides)
        return whole or all(side in (2, _CUBE) for side in sides)
    if torus.wraparound == "axis of 16":
        return all(side <= _ROW and side & (side - 1) == 0 for side in sides)
    return True


def _factorisations(count: int, axes: int, least: int = 2) -> Iterator[tuple[int, ...]]:
    """Products of up to `axes` sizes of `least` or more, in rising order."""
    if count == 1:
        yield ()
        return
    if axes == 0:
        return
    for side in range(least, count + 1):
        if count % side == 0 and (side == count or side * side <= count):
            for rest in _factorisations(count // side, axes - 1, side):
                yield (side, *rest)
