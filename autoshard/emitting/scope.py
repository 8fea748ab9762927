"""The arrays of a block on one chip, each in the layouts that its uses need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autoshard.emitting.collectives.reshard_steps import run_step
from autoshard.emitting.collectives.rings import Arrived, gather_in_ring, join
from autoshard.emitting.tpu_workarounds.argument_copies import copy_argument
from autoshard.tracing.blocks import Atom, BarrierStep, Literal
from costmodels.machine.rings import has_two_ways
from costmodels.machine.topology import Topology
from costmodels.program.program import Program
from search.answer.assignment import Choice, Ring, kept_layout, produced_layout
from search.formulation.layouts import Layout, local_shape
from search.formulation.reshard import reshard_table


class Resharder:
    """The planned collectives of a program's values, run on local shards.

    `copied` are the values that a gather may have to copy first (`argument_copies`), `resting` those behind a barrier.
    """

    def __init__(
        self,
        program: Program,
        choice: Choice,
        topology: Topology,
        copied: frozenset[int] = frozenset(),
        resting: frozenset[int] = frozenset(),
    ) -> None:
        self.program, self.choice, self.topology = program, choice, topology
        self.sizes = topology.axis_sizes
        self.copied, self.resting = copied, resting

    def reshard(self, value: int, piece: Any, source: Layout, target: Layout) -> Any:
        """Runs the planned collectives of a reshard."""
        if source == target:
            return piece
        array = self.program.values[value]
        if 0 in array.shape:  # JAX does not lower a gather of an empty array
            return jnp.zeros(local_shape(array.shape, target, self.sizes), piece.dtype)
        with jax.named_scope(f"{source}->{target}"):
            return self.run(self.path(value, source, target), piece)

    def run(self, steps: Sequence[Any], piece: Any) -> Any:
        """Runs some steps of a reshard."""
        for step in steps:
            piece = run_step(step, piece, self.sizes)
        return piece

    def path(self, value: int, source: Layout, target: Layout) -> Sequence[Any]:
        """The collectives of a reshard, in order."""
        if source == target:
            return ()
        array = self.program.values[value]
        table = reshard_table(array.shape, array.itemsize, self.topology, bool(source.partial or target.partial))
        return table.path(source, target)


class Scope:
    """The arrays of one block: per value, its shard in each layout made so far."""

    def __init__(self, resharder: Resharder) -> None:
        self.resharder = resharder
        self.arrays: dict[int, dict[Layout, Any]] = {}
        self.arrived: dict[tuple[int, Layout], Arrived] = {}
        self.scattered: dict[int, Ring] = {}

    def put(self, value: int, piece: Any) -> None:
        """Stores a produced value, resharded to the layout in which it is kept."""
        resharder = self.resharder
        made, home = (
            produced_layout(resharder.program, resharder.choice, value),
            kept_layout(resharder.program, resharder.choice, value),
        )
        piece = resharder.reshard(value, piece, made, home)
        self.arrays[value] = {home: lax.optimization_barrier(piece) if value in resharder.resting else piece}

    def get(self, atom: Atom, layout: Layout, hidden: bool = False) -> Any:
        """A value's shard in the layout that a use needs, or a literal; `hidden` if a matmul may hide the reshard."""
        if isinstance(atom, Literal):
            return atom.value
        found = self.arrays[atom]
        if layout not in found:
            home = next(iter(found))
            piece = found[home]
            if hidden and home != layout and atom in self.resharder.copied:
                piece = copy_argument(piece)
            if (atom, layout) in self.arrived:
                found[layout] = join(self.arrived[atom, layout])
            elif atom in self.scattered:
                found[layout] = self.resharder.run(self.scattered[atom].others, piece)
            else:
                found[layout] = self.resharder.reshard(atom, piece, home, layout)
        return found[layout]

    def put_scattered(self, value: int, piece: Any, ring: Ring) -> None:
        """Stores a product that its ring has scattered."""
        if ring.move.operation is None:
            self.arrays[value] = {ring.move.target: self.resharder.run(ring.others, piece)}
        else:  # the other steps run where the value is needed
            self.arrays[value] = {ring.step.target: piece}
            self.scattered[value] = ring

    def get_pieces(self, value: int, ring: Ring) -> Any:
        """The pieces of a value in a ring, which other products may share, or the whole shard if there is one."""
        target, found = ring.step.target, self.arrays[value]
        if target in found:
            return found[target]
        if (value, target) not in self.arrived:
            piece, others = self.stored(value), ring.others
            if value in self.resharder.copied:
                piece = copy_argument(piece)
            others = others[1:] if value in self.scattered else others
            with jax.named_scope(f"ring {ring.step.source}->{target}"):
                piece = self.resharder.run(others, piece)
                two_ways = has_two_ways(self.resharder.topology.axis(ring.step.axes[0]))
                self.arrived[value, target] = gather_in_ring(ring.step, piece, self.resharder.sizes, two_ways)
        return self.arrived[value, target]

    def stored(self, value: int) -> Any:
        """A value's shard in the layout in which it is kept."""
        return next(iter(self.arrays[value].values()))

    def add_barrier(self, step: BarrierStep) -> None:
        """Passes the values through an `optimization_barrier`, so XLA cannot merge later recomputation with earlier results."""
        homes = {value: next(iter(self.arrays[value])) for value in step.values}
        plain = [v for v in homes if not jnp.issubdtype(self.stored(v).dtype, jax.dtypes.extended)]
        for value, piece in zip(plain, lax.optimization_barrier([self.stored(v) for v in plain]), strict=True):
            self.arrays[value] = {homes[value]: piece}
