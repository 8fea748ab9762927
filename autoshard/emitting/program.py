"""Emission: the planned program on every chip's shards, with explicit collectives.

The whole function becomes one fully manual `jax.shard_map`. Each equation runs in its planned strategy on local shards.
Each reshard is the planned sequence of collectives, inside loops too. The partitioner has no decisions left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.sharding import PartitionSpec

from autoshard.emitting.memory_orders import Order, as_written, in_order, order_of_operand, orders_of_values
from autoshard.emitting.min_max_reduce import over_chips
from autoshard.emitting.reshard_steps import run_step
from autoshard.emitting.sharding import spec_of
from autoshard.emitting.tpu_workarounds.argument_copies import as_a_result
from autoshard.emitting.tpu_workarounds.argument_layout import as_an_argument
from autoshard.emitting.tpu_workarounds.conversion_barriers import waits
from autoshard.emitting.tpu_workarounds.residual_barriers import resting
from autoshard.emitting.tpu_workarounds.vector_matmul import product
from autoshard.planning.emission import BY_DEFAULT, Emission
from autoshard.rules import Rule
from autoshard.tracing.blocks import Atom, BarrierStep, Block, Boundary, BranchStep, Literal, LoopStep, OpStep, Traced
from costmodels.machine.topology import Topology
from costmodels.program.program import REDUCED_INSIDE, Program
from search.answer.assignment import Choice, collectives, kept, needed, produced
from search.formulation.intra_op import gathers
from search.formulation.layouts import Layout, local_shape
from search.formulation.reshard import reshard_table
from search.formulation.strategies import Strategy
from search.memory.views import IN_PLACE


@dataclass(frozen=True)
class _Pieces:
    """One operation's strategy, as an argument of its rule's `local` function."""

    rule: Rule
    strategy: Strategy
    topology: Topology
    order: Order = ()

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.topology.axis_sizes

    @property
    def on_tpu(self) -> bool:
        return self.topology.chip.kind == "tpu"

    def size(self, factor: int) -> int:
        return self.rule.factors[factor].size // prod(self.sizes[axis] for axis in self.strategy.splits[factor])

    def start(self, factor: int) -> Any:
        if not self.is_split(factor):
            return jnp.int32(0)
        return lax.axis_index(self.strategy.splits[factor]) * self.size(factor)

    def is_split(self, factor: int) -> bool:
        return bool(self.strategy.splits[factor])

    def gathered(self, factor: int, piece: Any) -> Any:
        row = lax.optimization_barrier(lax.reshape(piece, (1, piece.size)))
        for step in gathers(self.strategy.splits[factor], self.topology):
            row = run_step(step, row, self.sizes)
        # Without the barriers the TPU compiler (libtpu 0.0.42) maps few elements to lanes, and emits an all-reduce.
        return lax.reshape(lax.optimization_barrier(row), (row.shape[0], *piece.shape))

    def permuted(self, factor: int, piece: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        if all(sender == receiver for sender, receiver in pairs):
            return piece
        axes, in_order = self.strategy.splits[factor], tuple(a for a in self.sizes if a in self.strategy.splits[factor])
        numbers = np.arange(prod(self.sizes[axis] for axis in axes)).reshape([self.sizes[axis] for axis in axes])
        place = np.argsort(np.transpose(numbers, [axes.index(axis) for axis in in_order]).ravel())
        return lax.ppermute(piece, in_order, [(int(place[a]), int(place[b])) for a, b in pairs])


class _Scope:
    """The arrays of one block: per value, its shard in each layout made so far."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.arrays: dict[int, dict[Layout, Any]] = {}

    def put(self, value: int, piece: Any) -> None:
        """Stores a produced value, resharded to the layout in which it is kept."""
        runner = self.runner
        made, home = produced(runner.program, runner.choice, value), kept(runner.program, runner.choice, value)
        piece = runner.reshard(value, piece, made, home)
        self.arrays[value] = {home: lax.optimization_barrier(piece) if value in runner.resting else piece}

    def get(self, atom: Atom, layout: Layout, hidden: bool = False) -> Any:
        """A value's shard in the layout that a use needs, or a literal; `hidden` if a matmul may hide the reshard."""
        if isinstance(atom, Literal):
            return atom.value
        found = self.arrays[atom]
        if layout not in found:
            home = next(iter(found))
            piece = found[home]
            if hidden and home != layout and atom in self.runner.copied:
                piece = as_a_result(piece)
            found[layout] = self.runner.reshard(atom, piece, home, layout)
        return found[layout]

    def kept(self, value: int) -> Any:
        """A value's shard in the layout in which it is kept."""
        return next(iter(self.arrays[value].values()))

    def keep_apart(self, step: BarrierStep) -> None:
        """Passes the values through an `optimization_barrier`, so XLA cannot merge later recomputation with earlier results."""
        homes = {value: next(iter(self.arrays[value])) for value in step.values}
        plain = [v for v in homes if not jnp.issubdtype(self.kept(v).dtype, jax.dtypes.extended)]
        for value, piece in zip(plain, lax.optimization_barrier([self.kept(v) for v in plain]), strict=True):
            self.arrays[value] = {homes[value]: piece}


class Runner:
    """Runner of a traced program under a choice, on local shards; to be called inside `shard_map`."""

    def __init__(
        self,
        traced: Traced,
        choice: Choice,
        topology: Topology,
        emission: Emission = BY_DEFAULT,
        orders: Sequence[Order] = (),
    ) -> None:
        self.traced, self.choice, self.topology = traced, choice, topology
        self.program: Program = traced.program
        self.sizes = topology.axis_sizes
        self.orders = orders_of_values(traced.program, orders)
        values = (*traced.argument_values, *traced.constant_values)
        self.copied = frozenset(values) if topology.chip.kind == "tpu" else frozenset()
        rests = topology.chip.kind == "tpu" and emission.residual_barriers
        self.resting = resting(traced.program) if rests else frozenset()
        self.waits = waits(traced.program) if collectives(traced.program, topology, choice) else {}

    def __call__(self, *pieces: Any) -> list[Any]:
        """Computes the flat results from the flat arguments and constants, all in their planned layouts."""
        scope = _Scope(self)
        values = (*self.traced.argument_values, *self.traced.constant_values)
        for value, piece in zip(values, pieces, strict=True):
            scope.put(value, piece)
        self.block(self.traced.block, scope)
        return [self._result(scope, k, atom) for k, atom in enumerate(self.traced.block.outputs)]

    def _result(self, scope: _Scope, k: int, atom: Atom) -> Any:
        if isinstance(atom, Literal):
            return jnp.asarray(atom.value)
        layout = needed(self.program, self.choice, self.program.results[k], 0)
        piece = scope.get(atom, layout)
        overwrites = any(result == k for _, result in self.program.donated)
        return as_a_result(piece) if overwrites and self._sent(atom, layout) else piece

    def _sent(self, value: int, layout: Layout) -> bool:
        """Whether a result comes directly from a collective.

        The TPU compiler (libtpu 0.0.42) does not write it into the result's buffer. It copies the result at the end, and
        the argument that the result overwrites at the start, and keeps all these copies live.
        """
        if self.topology.chip.kind != "tpu" or 0 in self.program.values[value].shape:
            return False
        made, home = (each(self.program, self.choice, value) for each in (produced, kept))
        steps = [*self._path(value, made, home), *self._path(value, home, layout)]
        return bool(steps) and steps[-1].kind != "slice"

    def reshard(self, value: int, piece: Any, source: Layout, target: Layout) -> Any:
        """Runs the planned collectives of a reshard."""
        if source == target:
            return piece
        array = self.program.values[value]
        if 0 in array.shape:  # JAX does not lower a gather of an empty array
            return jnp.zeros(local_shape(array.shape, target, self.sizes), piece.dtype)
        with jax.named_scope(f"{source}->{target}"):
            for step in self._path(value, source, target):
                piece = run_step(step, piece, self.sizes)
        return piece

    def _path(self, value: int, source: Layout, target: Layout) -> Sequence[Any]:
        """The steps of a reshard."""
        if source == target:
            return ()
        array = self.program.values[value]
        table = reshard_table(array.shape, array.itemsize, self.topology, bool(source.partial or target.partial))
        return table.path(source, target)

    def block(self, block: Block, scope: _Scope) -> None:
        """Runs a block's steps in order."""
        for step in block.steps:
            with _as_written(step.eqn):
                if isinstance(step, OpStep):
                    self._operation(step, scope)
                elif isinstance(step, LoopStep):
                    self._loop(step, scope)
                elif isinstance(step, BranchStep):
                    self._branch(step, scope)
                else:
                    scope.keep_apart(step)

    # --- operations ---------------------------------------------------------------------------------------------

    def _operation(self, step: OpStep, scope: _Scope) -> None:
        strategy = self.choice.strategies[step.operation]
        op = self.program.operations[step.operation]
        layouts = iter(needed(self.program, self.choice, step.operation, k) for k in range(len(op.inputs)))
        hidden = op.op_class == "matmul" and self.program.matmul_before[step.operation] >= 0
        awaited = scope.kept(self.waits[step.operation]) if step.operation in self.waits else None
        operands = [
            a.value if isinstance(a, Literal) else _after(awaited, scope.get(a, next(layouts), hidden))
            for a in step.operands
        ]
        pieces = _Pieces(step.rule, strategy, self.topology, order_of_operand(op, self.orders))
        results = run_locally(step.eqn, step.rule, pieces, operands)
        for value, piece in zip(step.results, results, strict=True):
            scope.put(value, _reduced_inside(step.rule, strategy, piece))

    # --- regions ------------------------------------------------------------------------------------------------

    def _layout(self, boundary: Boundary, outer: bool) -> Layout:
        """The layout outside or inside a boundary: its operation's strategy, with or without the stack axis."""
        op = self.program.operations[boundary.operation]
        strategy = self.choice.strategies[boundary.operation]
        plain = Layout(strategy.splits[: len(op.factors) - _stacked(op)])
        return Layout(((), *plain.dims)) if outer and _stacked(op) else plain

    def _entering(self, boundaries: Sequence[Boundary], scope: _Scope) -> list[Any]:
        return [
            b.outer.value
            if isinstance(b.outer, Literal) and b.operation < 0
            else scope.get(b.outer, self._layout(b, True))
            for b in boundaries
        ]

    def _inside(self, boundaries: Sequence[Boundary], pieces: Sequence[Any]) -> _Scope:
        scope = _Scope(self)
        self._bring_in(scope, boundaries, pieces)
        return scope

    def _bring_in(self, scope: _Scope, boundaries: Sequence[Boundary], pieces: Sequence[Any]) -> None:
        for boundary, piece in zip(boundaries, pieces, strict=True):
            if boundary.inner >= 0:
                scope.put(boundary.inner, piece)

    def _initial(self, boundary: Boundary, scope: _Scope) -> Any:
        piece = scope.get(boundary.outer, self._layout(boundary, True))
        return (
            jnp.asarray(piece, self.program.values[boundary.inner].dtype)
            if isinstance(boundary.outer, Literal)
            else piece
        )

    def _going_round(self, boundary: Boundary, scope: _Scope) -> Any:
        after: Any = boundary.inner_next
        piece = scope.get(after, self._layout(boundary, False))
        if isinstance(after, Literal):
            return jnp.asarray(piece, self.program.values[boundary.inner].dtype)
        made_by = self.program.operations[self.program.producers[after][0]]
        if self.orders.get(boundary.inner):
            return piece
        return as_an_argument(piece) if made_by.primitive in IN_PLACE else piece

    def _loop(self, step: LoopStep, scope: _Scope) -> None:
        held = self._entering(step.constants, scope)
        carry = self._in_order(step, [self._initial(b, scope) for b in step.carries])
        if step.condition is None:
            results = self._scan(step, scope, held, carry)
        else:
            results = self._while(step, step.condition, held, carry)
        results[: len(carry)] = self._as_written(step, results)
        for boundary, piece in zip((*step.carries, *step.stacks), results, strict=True):
            scope.put(boundary.outer_result, piece)

    def _in_order(self, step: LoopStep, carry: Sequence[Any]) -> list[Any]:
        return [in_order(c, self.orders.get(b.inner, ())) for b, c in zip(step.carries, carry, strict=True)]

    def _as_written(self, step: LoopStep, carry: Sequence[Any]) -> list[Any]:
        return [as_written(c, self.orders.get(b.inner, ())) for b, c in zip(step.carries, carry, strict=False)]

    def _scan(self, step: LoopStep, scope: _Scope, held: list[Any], carry: list[Any]) -> list[Any]:
        params = step.eqn.params

        def body(carry, slices):
            carry = self._as_written(step, carry)
            inner = self._inside((*step.constants, *step.carries, *step.slices), (*held, *carry, *slices))
            self.block(step.body, inner)
            after = self._in_order(step, [self._going_round(b, inner) for b in step.carries])
            return after, [inner.get(b.inner_next, self._layout(b, False)) for b in step.stacks]

        stacks = self._entering(step.slices, scope)
        carry, piled = lax.scan(body, carry, stacks, length=params["length"], reverse=params["reverse"])
        return [*carry, *piled]

    def _while(self, step: LoopStep, test: Block, held: list[Any], carry: list[Any]) -> list[Any]:
        def inside(carry):
            return self._inside((*step.constants, *step.carries), (*held, *self._as_written(step, carry)))

        def condition(carry):
            inner = inside(carry)
            self.block(test, inner)
            return inner.get(test.outputs[0], Layout(()))

        def body(carry):
            inner = inside(carry)
            self.block(step.body, inner)
            return self._in_order(step, [self._going_round(b, inner) for b in step.carries])

        return list(lax.while_loop(condition, body, carry))

    def _branch(self, step: BranchStep, scope: _Scope) -> None:
        entering = [self._entering(entry, scope) for entry in step.entries]
        joined = [Layout(self.choice.strategies[at].splits) for at, _ in step.joins]

        def branch(k: int) -> Callable[[list[list[Any]]], list[Any]]:
            def run(operands):
                inner = self._inside(step.entries[k], operands[k])
                self.block(step.blocks[k], inner)
                return [jnp.asarray(inner.get(a, at)) for a, at in zip(step.blocks[k].outputs, joined, strict=True)]

            return run

        selector = scope.get(step.selector, Layout(()))
        results = lax.switch(selector, [branch(k) for k in range(len(step.blocks))], entering)
        for (_, value), piece in zip(step.joins, results, strict=True):
            scope.put(value, piece)


def _as_written(eqn: Any) -> AbstractContextManager[None]:
    """A context that gives emitted operations the source line of their equation, which compiled programs keep."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def _stacked(op: Any) -> int:
    """1 if the operation has a leading stack axis, which is its last factor."""
    return int(op.primitive in ("loop_slice", "loop_stack"))


def run_locally(eqn: Any, rule: Rule, pieces: _Pieces, operands: Sequence[Any]) -> Sequence[Any]:
    """Runs one equation on local shards: unchanged, or by its rule's `local` function."""
    if rule.local is not None:
        return rule.local(eqn, rule, pieces, *operands)
    if eqn.primitive.name == "dot_general" and pieces.on_tpu:
        return [product(eqn, *operands)]
    results = eqn.primitive.bind(*operands, **eqn.params)
    return results if eqn.primitive.multiple_results else [results]


def _after(awaited: Any, piece: Any) -> Any:
    """A shard that the compiler cannot use before `awaited` exists; unchanged if that is `None`."""
    if awaited is None or jnp.issubdtype(piece.dtype, jax.dtypes.extended):
        return piece
    return lax.optimization_barrier((piece, awaited))[0]


def _reduced_inside(rule: Rule, strategy: Strategy, piece: Any) -> Any:
    """The result of the all-reduce inside the operation of a split maximum, minimum, conjunction or disjunction."""
    for factor, axes in zip(rule.factors, strategy.splits, strict=True):
        if axes and factor.kind in REDUCED_INSIDE:
            piece = over_chips(factor.kind, piece, axes)
    return piece


def emitted(
    traced: Traced,
    choice: Choice,
    topology: Topology,
    mesh: Any,
    emission: Emission = BY_DEFAULT,
    orders: Sequence[Order] = (),
) -> Callable[..., list[Any]]:
    """The planned program as a function of flat arguments and constants, each a global array.

    **Arguments:**

    - `orders`: per flat argument the order of its dimensions in memory, major to minor, empty for the device's default;
      loops that carry the argument keep it.
    """
    program = traced.program
    sources = (*program.arguments, *program.constants)
    in_specs = tuple(spec_of(produced(program, choice, program.operations[i].outputs[0].value)) for i in sources)
    out_specs = [
        spec_of(needed(program, choice, i, 0)) if program.operations[i].inputs else PartitionSpec()
        for i in program.results
    ]
    runner = Runner(traced, choice, topology, emission, orders)
    avals = [program.values[program.operations[i].outputs[0].value] for i in sources]
    given = [k for k, aval in enumerate(avals) if 0 not in aval.shape]
    if len(given) == len(avals):
        return jax.shard_map(runner, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def without_empty(*pieces: Any) -> list[Any]:
        known = dict(zip(given, pieces, strict=True))
        layouts = [produced(program, choice, program.operations[i].outputs[0].value) for i in sources]
        return runner(
            *(
                known[k] if k in known else jnp.zeros(local_shape(aval.shape, layout, runner.sizes), aval.dtype)
                for k, (aval, layout) in enumerate(zip(avals, layouts, strict=True))
            )
        )

    # XLA folds empty arrays away and then cannot lower a shard_map of them, so they are made inside.
    inside = jax.shard_map(
        without_empty, mesh=mesh, in_specs=tuple(in_specs[k] for k in given), out_specs=out_specs, check_vma=False
    )
    return lambda *arrays: inside(*(arrays[k] for k in given))
