"""Padding that pins require: a pin on a dimension that its axes do not divide."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm

from autoshard.annotating.padding import Occurrences, Padding, dimensions_of, occurrences_of
from autoshard.annotating.pins import Undivided, undivided_pins
from autoshard.rules.pin import PinError, Pins
from costmodels.machine.topology import Topology
from costmodels.program.program import Program

Required = tuple[Occurrences, int, str]
"""A dimension, the least size that all pins on it divide, and a description of the first of them."""


def paddings_of_pins(
    program: Program, paths: Sequence[str], topology: Topology, pins: Pins | None
) -> tuple[Required, ...]:
    """The dimensions that pins require to be padded, each once.

    **Raises:** `PinError` for a dimension that cannot be padded, and as `pin_program` does.
    """
    found: list[tuple[Occurrences, list[Undivided]]] = []
    for each in undivided_pins(program, paths, topology, pins):
        place = each.value, each.dim
        known = next((pinned for occurrences, pinned in found if place in occurrences.values), None)
        if known is None:
            dimension = _dimension(program, each)
            crossed = next((pinned[0] for other, pinned in found if other.overlaps(dimension)), None)
            if crossed is not None:
                raise PinError(f"{each.words} and {crossed.words} need padding of two parts of one dimension.")
            found.append((dimension, [each]))
        else:
            known.append(each)
    return tuple((dimension, _least(dimension, pinned), pinned[0].words) for dimension, pinned in found)


def _dimension(program: Program, pinned: Undivided) -> Occurrences:
    """The dimension that a pin splits, or the major part of it that can be padded if it merges several.

    **Raises:** `PinError` if neither can be padded.
    """
    if pinned.size < 2:
        raise PinError(f"{pinned.text}, and dimensions of {pinned.size} are not padded.")
    place = pinned.value, pinned.dim
    whole = occurrences_of(program, Padding(*place, pinned.size, pinned.size))
    if not whole.refusal:
        return whole
    parts = [each for each in dimensions_of(program) if place in each.values and not each.refusal]
    if not parts:
        raise PinError(f"{pinned.text}, and it cannot be padded, because {whole.refusal}.")
    return max(parts, key=lambda each: each.values[place])


def _least(dimension: Occurrences, pinned: Sequence[Undivided]) -> int:
    """The least size of a dimension for which the axes of all pins divide the dimensions that contain it."""
    spans = [(each.size // dimension.size, each.pieces) for each in pinned]
    most = dimension.size + lcm(*(pieces for _, pieces in spans))
    return next(n for n in range(dimension.size, most + 1) if all(n * span % pieces == 0 for span, pieces in spans))
