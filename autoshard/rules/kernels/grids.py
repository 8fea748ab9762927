"""The grid dimensions of a Pallas kernel along which its steps are independent, and the array dimensions they divide.

A grid dimension of $n$ steps may be split over chips, each running the same kernel on a smaller grid, if:

- its step is the block's index along one dimension of every result, and along at most one of each operand. The index of an
  operand may also be the step divided by a constant, as for key-value heads that several query heads share;
- blocks are whole: $n$ times the block is the dimension;
- the body computes nothing else with the step. It may look it up in a table along a dimension of $n$ elements;
- no state passes from step to step: there is no scratch memory, or the author declares the dimension "parallel", or
  inner steps overwrite the scratch memory before they read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from autoshard.rules.kernels.body import Body, Firsts, read_body
from autoshard.rules.kernels.references import IndexMap


@dataclass(frozen=True)
class Axis:
    """An array dimension whose block at a step of a grid dimension has the index `step // divisor`."""

    grid: int
    block: int
    divisor: int = 1


Axes = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Grid:
    """A kernel's grid.

    - `splittable`: per independent grid dimension its `divisor`, 1 if no operand divides its steps.
    - `in_groups`: the grid dimensions whose groups of `divisor` steps stay together: they write one block of a result, or the
      body computes with the place in the group.
    - `arrays`: per operand of the equation, then per result, the `Axis` of each dimension.
    - `kept`: why each other grid dimension of several steps is not split.
    """

    splittable: Mapping[int, int]
    in_groups: frozenset[int]
    arrays: tuple[Axes, ...]
    kept: Mapping[int, str]


class _Refusal(Exception):
    """Why a grid dimension is not split."""


def read_grid(params: Mapping[str, Any], unused: Sequence[bool]) -> Grid:
    """The reading of the grid of a `pallas_call` with these parameters; `unused` are the results that nothing reads."""
    mapping = params["grid_mapping"]
    body = read_body(params["jaxpr"], _axes(mapping), mapping.num_index_operands)
    reader = _Reader(params, body, unused)
    found, kept = {}, {}
    for dimension, size in enumerate(mapping.grid):
        if size == 1:
            continue
        try:
            found[dimension] = reader.axes(dimension, size)
        except _Refusal as refusal:
            kept[dimension] = str(refusal)
    shapes = [*mapping.index_map_avals[len(mapping.grid) :], *(each.array_aval for each in mapping.block_mappings)]
    arrays = [[None] * len(each.shape) for each in shapes]
    for axes in found.values():
        for (array, at), axis in axes.items():
            arrays[array][at] = axis
    dynamic = mapping.num_dynamic_grid_bounds
    divisors = {dimension: max(axis.divisor for axis in axes.values()) for dimension, axes in found.items()}
    in_groups = frozenset(dimension for dimension, axes in found.items() if reader.is_in_groups(dimension, axes))
    return Grid(divisors, in_groups, (*[()] * dynamic, *map(tuple, arrays)), kept)


def _axes(mapping: Any) -> list[int]:
    """The grid dimensions that the author of the kernel has numbered: those without `vmap`'s."""
    return [i for i in range(len(mapping.grid)) if i not in mapping.vmapped_dims]


class _Reader:
    """The conditions on one grid dimension."""

    def __init__(self, params: Mapping[str, Any], body: Body, unused: Sequence[bool]) -> None:
        self.params, self.body, self.unused = params, body, unused
        self.mapping = params["grid_mapping"]
        rank = len(self.mapping.grid)
        self.maps = [IndexMap.of(each.index_map_jaxpr, rank) for each in self.mapping.block_mappings]
        self.lookups = [*body.lookups, *(each for index_map in self.maps for each in index_map.lookups)]

    def axes(self, dimension: int, size: Any) -> dict[tuple[int, int], Axis]:
        """Per array and its dimension, the axes of a grid dimension.

        **Raises:** `_Refusal` if it may not be split.
        """
        if self.body.blocker:
            raise _Refusal(self.body.blocker)
        if not isinstance(size, int):
            raise _Refusal("its size is known at run time only")
        if dimension in self.body.uses:
            raise _Refusal(f"the kernel computes with its step in {self.body.uses[dimension]}")
        tables = self.mapping.num_index_operands
        found = {(table, at): Axis(dimension, 1) for table, at in self._tables(dimension, size)}
        for k in range(len(self.maps)):
            if (axis := self._axis(k, dimension, size)) is not None:
                found[tables + k, axis[0]] = axis[1]
        divisors = {axis.divisor for axis in found.values()} - {1}
        if len(divisors) > 1:
            raise _Refusal("operands divide its step by different numbers")
        if self.body.periods.get(dimension, divisors) != divisors:
            raise _Refusal("the kernel computes with its step in `rem`")
        self._check_results(dimension, {array - tables for array, _ in found}, *divisors)
        return found

    def is_in_groups(self, dimension: int, axes: Mapping[tuple[int, int], Axis]) -> bool:
        """Whether the steps of a group stay together (see `Grid`)."""
        results = self.mapping.num_index_operands + self.mapping.num_inputs
        written = any(array >= results and axis.divisor > 1 for (array, _), axis in axes.items())
        return written or dimension in self.body.periods

    def _axis(self, k: int, dimension: int, size: int) -> tuple[int, Axis] | None:
        """The dimension of an operand or result that a grid dimension indexes, if there is one."""
        block, index_map = self.mapping.block_mappings[k], self.maps[k]
        where, found = _name(block), []
        for at, source in enumerate(index_map.sources):
            if dimension not in source.direct:
                continue
            if source.direct != {dimension} or source.looked_up:
                raise _Refusal(f"the block of {where} along its dimension {at} also depends on other numbers")
            indices = index_map.values(at, dimension, size)
            if len(set(indices)) == 1:
                continue
            divisor = size // len(set(indices))
            length = _block_length(block.block_shape[at])
            if indices != [i // divisor for i in range(size)] or size % divisor or length is None:
                raise _Refusal(f"the blocks of {where} along its dimension {at} are not in the order of its steps")
            if length * (size // divisor) != block.array_aval.shape[at]:
                raise _Refusal(f"the last block of {where} along its dimension {at} is not whole")
            found.append((at, Axis(dimension, length, divisor)))
        if len(found) > 1:
            raise _Refusal(f"it indexes several dimensions of {where}")
        return found[0] if found else None

    def _check_results(self, dimension: int, indexed: set[int], divisor: int = 1) -> None:
        """Refuses a dimension whose steps, or groups of `divisor` steps, do not write blocks of their own."""
        mapping = self.mapping
        for k in range(mapping.num_inputs, len(self.maps)):
            if k not in indexed and not self.unused[k - mapping.num_inputs]:
                raise _Refusal(f"every step of it writes the same blocks of {_name(mapping.block_mappings[k])}")
        state = self._state(indexed)
        if state and not self._is_declared_parallel(dimension):
            resets = [self.body.resets.get(place) for place in state]
            if not all(self._is_reset(dimension, divisor, when) for when in resets):
                raise _Refusal("scratch memory may carry data from step to step of it, unless declared parallel")

    def _is_reset(self, dimension: int, divisor: int, when: Firsts | None) -> bool:
        """Whether a reference that is reset `when` steps are the first is reset before a new group of steps reads it."""
        return when is not None and all(g > dimension or (g == dimension and n == divisor) for g, n in when)

    def _state(self, indexed: set[int]) -> list[int]:
        """The references of the body that keep data between steps: scratch memory, and unused results used as such."""
        mapping = self.mapping
        first = mapping.num_index_operands
        blocks = len(self.maps)
        results = [first + k for k in range(mapping.num_inputs, blocks) if k not in indexed]
        return [*results, *range(first + blocks, first + blocks + len(mapping.scratch_avals))]

    def _is_declared_parallel(self, dimension: int) -> bool:
        if dimension in self.mapping.vmapped_dims:
            return True
        semantics = getattr(self.params.get("compiler_params"), "dimension_semantics", None)
        at = _axes(self.mapping).index(dimension)
        return semantics is not None and "parallel" in str(semantics[at]).lower()

    def _tables(self, dimension: int, size: int) -> list[tuple[int, int]]:
        """The tables that the step is looked up in, with the dimension."""
        found = []
        avals = self.mapping.index_map_avals[len(self.mapping.grid) :]
        for table, aval in enumerate(avals):
            reads = [each.steps for each in self.lookups if each.table == table]
            at = {i for steps in reads for i, step in enumerate(steps) if step == dimension}
            if not at:
                continue
            (place, *more) = sorted(at)
            if more or any(steps[place] != dimension for steps in reads) or aval.shape[place] != size:
                raise _Refusal(f"it does not look up all of table {table} in order")
            found.append((table, place))
        return found


def _name(block: Any) -> str:
    return str(block.origin) or "an array"


def _block_length(block: Any) -> int | None:
    """The elements of a block along one dimension; None for blocks that may overlap."""
    kind = type(block).__name__
    if kind == "Squeezed" or block is None:
        return 1
    if kind == "Blocked":
        return int(block.block_size)
    return block if isinstance(block, int) else None


def refusal(params: Mapping[str, Any]) -> str:
    """Why a kernel may not be split at all, by its parameters; empty if it may."""
    compiler = params.get("compiler_params")
    if params.get("input_output_aliases"):
        return "its results overwrite operands (input_output_aliases)"
    if params.get("mesh") is not None:
        return "it runs on a mesh of cores"
    if getattr(compiler, "has_side_effects", False) or getattr(compiler, "collective_id", None) is not None:
        return "it has side effects"
    return ""


def steps_of(mapping: Any) -> int:
    """The number of steps of a grid; sizes known at run time only count as 1."""
    return prod(size for size in mapping.grid if isinstance(size, int))
