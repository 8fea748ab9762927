"""Pins: layouts that the user fixes, for arguments by path and for intermediates inside the function.

A pattern over its path pins an argument, as does a tree of `PartitionSpec`s shaped like the arguments. `pin` inside the
function pins an intermediate. A pin holds where the array is made: a use with another layout pays for a reshard. A
`jax.lax.with_sharding_constraint` is a pin too if the topology has its mesh axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.sharding import PartitionSpec

from autoshard._util.paths import dotted, matches
from autoshard.rules.pin import PIN, PinError, Pins, dims_of
from costmodels.machine.topology import Topology
from costmodels.program.program import Pinned, Program

_WORDS = {
    PIN: "the pin at ",
    "sharding_constraint": "the sharding constraint at ",
    "shard_map_layout": "a layout of the shard_map at ",
}


@dataclass(frozen=True)
class Pin:
    """One pinned operation: the description for messages, and its position in the program."""

    words: str
    operation: int


@dataclass(frozen=True)
class Undivided:
    """A dimension of a pinned value, of `size` elements, that the pin splits into `pieces`, which do not divide it."""

    words: str
    value: int
    dim: int
    size: int
    pieces: int

    @property
    def text(self) -> str:
        """A clause on the pin, for errors."""
        return (
            f"{self.words} splits dimension {self.dim} of size {self.size} into {self.pieces} shards,"
            " which do not divide it"
        )


def parse_pin(text: str) -> tuple[str, PartitionSpec]:
    """`params.*.wq=None,x,yz` as a pattern and its spec; each letter of a part is an axis, `x+data` has longer names.

    **Raises:** `PinError`.
    """
    pattern, sign, parts = text.strip().partition("=")
    if not sign or not pattern:
        raise PinError(f"Invalid pin {text!r}: expected PATTERN=SPEC, for example 'params.*.wq=None,x,yz'.")

    def part(word: str) -> Any:
        word = word.strip()
        if word in ("", "-", "None"):
            return None
        axes = word.split("+") if "+" in word else [*word]
        return axes[0] if len(axes) == 1 else tuple(axes)

    return pattern, PartitionSpec(*map(part, parts.split(",")))


def pin_program(
    program: Program, paths: Sequence[str], topology: Topology, pins: Pins | None
) -> tuple[Program, tuple[Pin, ...]]:
    """The program with its pins resolved on the topology.

    **Returns:** the program, and the pins in it.

    **Raises:** `PinError` for a pattern that matches no argument, an axis that the topology lacks or that is used twice,
    a dimension that the axes do not divide, and two different pins for one argument.
    """
    program, found = _resolve(program, paths, topology, pins)
    for each in _undivided(program, found, topology):
        raise PinError(f"{each.text}. A search with padding pads it if it can.")
    return program, found


def undivided_pins(
    program: Program, paths: Sequence[str], topology: Topology, pins: Pins | None
) -> tuple[Undivided, ...]:
    """The pinned dimensions that the axes of their pins do not divide.

    **Raises:** `PinError` for the other faults of pins, as `pin_program` does.
    """
    return tuple(_undivided(*_resolve(program, paths, topology, pins), topology))


def _resolve(
    program: Program, paths: Sequence[str], topology: Topology, pins: Pins | None
) -> tuple[Program, tuple[Pin, ...]]:
    """`pin_program`, without the check that the axes divide the dimensions."""
    operations = list(program.operations)
    warnings: list[str] = []
    found: list[Pin] = []
    for at, op in enumerate(operations):
        if op.pinned is None:
            continue
        words = _WORDS[op.primitive] + op.source
        unknown = {axis for axes in op.pinned for axis in axes or ()} - set(topology.axis_sizes)
        if unknown and op.primitive != PIN:
            warnings.append(
                f"{words} names axes that {topology.name} does not have ({', '.join(sorted(unknown))}): it is ignored"
            )
            operations[at] = replace(op, pinned=None)
            continue
        operations[at] = replace(op, pinned=_fit_mesh(words, op.pinned, topology))
        found.append(Pin(words, at))
    for position, dims, words in _match_pins(program, paths, pins):
        at = program.arguments[position]
        fitting = _fit_mesh(words, dims, topology)
        if operations[at].pinned not in (None, fitting):
            raise PinError(f"{words} contradicts another pin of {paths[position]}; remove one of them.")
        if operations[at].pinned is None:
            found.append(Pin(words, at))
        operations[at] = replace(operations[at], pinned=fitting)
    program = replace(program, operations=tuple(operations), warnings=(*program.warnings, *warnings))
    return program, tuple(found)


def keep_pins(program: Program, keep: Sequence[Pin]) -> Program:
    """The program with only these pins."""
    kept = {pin.operation for pin in keep}
    operations = tuple(
        op if op.pinned is None or at in kept else replace(op, pinned=None) for at, op in enumerate(program.operations)
    )
    return replace(program, operations=operations)


def _match_pins(program: Program, paths: Sequence[str], pins: Pins | None) -> Iterator[tuple[int, Pinned, str]]:
    """Every pinned argument: its position, its axes, and the description of the pin."""
    ranks = [len(program.values[program.operations[at].outputs[0].value].shape) for at in program.arguments]
    if isinstance(pins, Mapping):
        for pattern, spec in pins.items():
            words = f"the pin {pattern}={spec}"
            hit = [i for i, path in enumerate(paths) if matches(pattern, path)]
            if not hit:
                some = ", ".join(dotted(path) for path in paths[:4])
                raise PinError(f"{words} matches no argument; the paths are {some}{', ...' if len(paths) > 4 else ''}.")
            for i in hit:
                yield i, dims_of(spec, ranks[i], f"{words}, for {paths[i]},"), words
    elif pins is not None:
        leaves = jax.tree_util.tree_leaves(tuple(pins), is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
        if len(leaves) != len(paths):
            raise PinError(
                f"The tree of pins has {len(leaves)} leaves, but the arguments have {len(paths)}; None leaves an array free."
            )
        for i, spec in enumerate(leaves):
            if spec is not None:
                yield i, dims_of(spec, ranks[i], f"the pin of {paths[i]}"), f"the pin of {paths[i]} to {spec}"


def _fit_mesh(words: str, dims: Pinned, topology: Topology) -> Pinned:
    """The axes of a pin without those of size 1."""
    sizes = topology.axis_sizes
    used = [axis for axes in dims for axis in axes or ()]
    for axis in used:
        if axis not in sizes:
            raise PinError(f"{words} names axis {axis!r}; {topology.name} has {', '.join(sizes)}.")
    if len(set(used)) < len(used):
        raise PinError(f"{words} uses an axis twice; each axis splits one dimension.")
    return tuple(axes and tuple(axis for axis in axes if sizes[axis] > 1) for axes in dims)


def _undivided(program: Program, pins: Sequence[Pin], topology: Topology) -> Iterator[Undivided]:
    for pin in pins:
        op = program.operations[pin.operation]
        value = op.outputs[0].value
        for dim, (axes, size) in enumerate(zip(op.pinned or (), program.values[value].shape, strict=True)):
            pieces = prod(topology.axis_sizes[axis] for axis in axes or ())
            if size % pieces:
                yield Undivided(pin.words, value, dim, size, pieces)
