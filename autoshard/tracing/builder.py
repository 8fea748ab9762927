"""The program under construction: values, regions, and the boundary operations that own a layout.

A value that crosses a region's boundary, or is a loop carry, has a boundary operation, which owns its layout there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from autoshard._util.dtypes import dtype_name, itemsize_of
from autoshard._util.identity import IdentityMap
from autoshard.tracing.blocks import Atom, Carry, Entry, Literal, LiteralEntry, StackedResult
from autoshard.tracing.closed_over import closed_over
from autoshard.tracing.jaxprs import distinct_arrays, is_held
from costmodels.program.program import Factor, OpClass, Operation, Output, Region, Use, Value


class End(NamedTuple):
    """A value at a boundary operation, in the region that reads or writes it there."""

    value: int
    region: int
    stacked: bool = False
    """Whether the value has a leading stack axis that the other ends lack."""


class Builder:
    """Collector of values, operations and regions during the walk.

    `operations` has `None` at the positions that are reserved and not yet filled. `held` has, by region, the values of the
    arrays that calls and loops close over.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.operations: list[Operation | None] = []
        self.regions: list[Region] = [Region("main")]
        self.held: dict[int, IdentityMap[Atom]] = {0: IdentityMap()}

    # --- values and regions -------------------------------------------------------------------------------------

    def add_value(self, aval: Any, name: str, region: int, origin: int | None = None) -> int:
        """A new value with the shape and type of `aval`."""
        dtype = aval.dtype
        self.values.append(Value(name, tuple(aval.shape), dtype_name(dtype), itemsize_of(dtype), region, origin))
        return len(self.values) - 1

    def add_region(self, region: Region) -> int:
        self.regions.append(region)
        return len(self.regions) - 1

    def add_source(self, aval: Any, path: str) -> int:
        """The value of an argument, which is its own origin."""
        index = self.add_value(aval, path, 0, len(self.values))
        self.add_boundary(path, "argument", [], [End(index, 0)], 0, "source")
        return index

    def add_sink(self, atom: Atom, path: str) -> int:
        """The operation that owns the layout of a result."""
        operands = [] if isinstance(atom, Literal) else [End(atom, 0)]
        return self.add_boundary(path, "result", operands, [], 0, "sink")

    def hold(self, array: Any, name: str) -> int:
        """The source of an array that a call or a loop closes over."""
        self.held[0][array] = self.add_source(jax.typeof(array), name)
        return self.held[0][array]

    def constant(self, array: Any, region: int) -> Atom:
        """A constant that a call or a loop closes over: a scalar as a literal, anything else as a value of the region."""
        return self.held[region][array] if is_held(array) else Literal(np.asarray(array))

    # --- boundary operations ------------------------------------------------------------------------------------

    def add_boundary(
        self,
        name: str,
        primitive: str,
        inputs: Sequence[End],
        outputs: Sequence[End],
        region: int,
        op_class: OpClass = "boundary",
        traffic: tuple[int | Output, ...] = (),
        linear: tuple[frozenset[int], ...] = (),
    ) -> int:
        """The index of a new operation whose dimensions all pass through, except stack axes: it owns one layout."""
        index = self.reserve()
        self.fill(index, name, primitive, inputs, outputs, region, op_class, traffic, linear)
        return index

    def reserve(self) -> int:
        """The index of an operation that is filled later."""
        self.operations.append(None)
        return len(self.operations) - 1

    def fill(
        self,
        index: int,
        name: str,
        primitive: str,
        inputs: Sequence[End],
        outputs: Sequence[End],
        region: int,
        op_class: OpClass = "boundary",
        traffic: tuple[int | Output, ...] = (),
        linear: tuple[frozenset[int], ...] = (),
    ) -> None:
        """Completes a reserved boundary operation."""
        ends = [*inputs, *outputs]
        shape = self.values[ends[0].value].shape[ends[0].stacked :] if ends else ()
        factors = [Factor(n) for n in shape]
        dims = tuple((i,) for i in range(len(shape)))
        uses = []
        for value, where, stacked in ends:
            if stacked:
                factors.append(Factor(self.values[value].shape[0], "whole"))
                uses.append(Use(value, ((len(factors) - 1,), *dims), where))
            else:
                uses.append(Use(value, dims, where))
        self.operations[index] = Operation(
            name,
            primitive,
            tuple(factors),
            tuple(uses[: len(inputs)]),
            tuple(uses[len(inputs) :]),
            region,
            op_class,
            linear=linear,
            traffic=traffic,
        )

    # --- into regions and out of them ---------------------------------------------------------------------------

    def enter(
        self, atom: Atom, aval: Any, outer: int, inner: int, primitive: str, sliced: bool = False
    ) -> Entry | LiteralEntry:
        """A constant of a region, or a slice of a stacked array: one layout, with reshards outside or inside."""
        if isinstance(atom, Literal):
            return LiteralEntry(atom)
        given = self.values[atom]
        value = self.add_value(aval, given.name, inner, given.origin)
        op = self.add_boundary(given.name, primitive, [End(atom, outer, sliced)], [End(value, inner)], outer)
        return Entry(op, atom, value)

    def enter_constants(self, fixed: dict[Any, Atom], outer: int, inner: int) -> dict[Any, Entry | LiteralEntry]:
        """Brings loop constants into a loop."""
        return {v: self.enter(atom, v.aval, outer, inner, "loop_constant") for v, atom in fixed.items()}

    def enter_held(self, closed: Sequence[Any], outer: int, inner: int, primitive: str) -> list[Entry | LiteralEntry]:
        """Brings the arrays that a region's jaxprs close over into the region."""
        arrays = distinct_arrays(array for inside in closed for array in (*inside.consts, *closed_over(inside.jaxpr)))
        entering = [self.enter(self.held[outer][array], jax.typeof(array), outer, inner, primitive) for array in arrays]
        self.held[inner] = IdentityMap(zip(arrays, map(inside_of, entering), strict=True))
        return entering

    def begin_carry(self, var: Any, inner: int) -> tuple[int, int]:
        """Reserves the operation of a loop carry, and makes its value inside the loop."""
        index = self.reserve()
        return index, self.add_value(var.aval, f"carry {var.aval.str_short()}", inner)

    def end_carry(self, operation: int, value: int, init: Atom, after: Atom, outer: int, inner: int) -> Carry:
        """Completes a loop carry: its initial value, its value in the loop and its result have one layout.

        They may be partial sums, unless one is a literal other than zero.
        """
        before = self.values[value]
        name = before.name if isinstance(init, Literal) else f"carry {self.values[init].name}"
        result = len(self.values)
        self.values.append(dataclasses.replace(before, name=name, region=outer))
        self.values[value] = dataclasses.replace(before, name=name)
        inputs = [End(atom, at) for atom, at in ((init, outer), (after, inner)) if not isinstance(atom, Literal)]
        outputs = [End(value, inner), End(result, outer)]
        sums = _is_summable(before) and all(not isinstance(atom, Literal) or is_zero(atom) for atom in (init, after))
        linear = (frozenset(range(len(inputs))),) if sums else ()
        self.fill(operation, name, "loop_carry", inputs, outputs, outer, linear=linear)
        return Carry(operation, init, value, after, result)

    def stack(self, atom: Atom, var: Any, outer: int, inner: int) -> StackedResult:
        """The stacked result of a loop, of which each iteration writes one slice."""
        name = "stacked " + ("literal" if isinstance(atom, Literal) else self.values[atom].name)
        result = self.add_value(var.aval, name, outer)
        inputs = [] if isinstance(atom, Literal) else [End(atom, inner)]
        linear = (frozenset({0}),) if inputs and _is_summable(self.values[result]) else ()
        op = self.add_boundary(
            name, "loop_stack", inputs, [End(result, outer, stacked=True)], outer, traffic=(Output(),), linear=linear
        )
        return StackedResult(op, atom, result)


def inside_of(entry: Entry | LiteralEntry) -> Atom:
    """The value that a region sees of what enters it."""
    return entry.outer if isinstance(entry, LiteralEntry) else entry.inner


def is_zero(atom: Atom) -> bool:
    """Whether an operand is a literal zero, which is a partial sum as it stands."""
    return isinstance(atom, Literal) and not np.any(atom.value)


def _is_summable(value: Value) -> bool:
    return value.dtype != "bool" and not value.dtype.startswith("key<")
