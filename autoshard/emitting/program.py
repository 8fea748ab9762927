"""Emission: the planned program on every chip's shards, with explicit collectives.

The whole function becomes one fully manual `jax.shard_map`. Each equation runs in its planned strategy on local shards.
Each reshard is the planned sequence of collectives, inside loops too. The partitioner has no decisions left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.sharding import PartitionSpec

from autoshard.annotating.masks import Cut
from autoshard.emitting.collectives.rings import Arrived, multiply_pieces, scatter_in_ring
from autoshard.emitting.local_operation import StrategyPieces, all_reduce_inside, run_locally
from autoshard.emitting.memory_orders import (
    Order,
    order_of_operand,
    orders_of_values,
    to_memory_order,
    to_program_order,
)
from autoshard.emitting.padding import masked, resize_cut
from autoshard.emitting.scope import Resharder, Scope
from autoshard.emitting.sharding import spec_of
from autoshard.emitting.tpu_workarounds.argument_copies import copy_argument
from autoshard.emitting.tpu_workarounds.argument_layout import with_argument_layout
from autoshard.emitting.tpu_workarounds.conversion_barriers import find_conversion_barriers
from autoshard.emitting.tpu_workarounds.query_rows import find_few_rows
from autoshard.emitting.tpu_workarounds.residual_barriers import residual_barriers
from autoshard.emitting.tpu_workarounds.score_barriers import score_barriers
from autoshard.planning.emission import BY_DEFAULT, Emission
from autoshard.tracing.blocks import (
    Atom,
    Block,
    BranchStep,
    Carry,
    Entry,
    Literal,
    LiteralEntry,
    LoopStep,
    OpStep,
    StackedResult,
    Traced,
)
from costmodels.machine.topology import Topology
from search.answer.assignment import Choice, Ring, collectives, kept_layout, needed_layout, produced_layout, rings
from search.formulation.layouts import Layout, local_shape
from search.memory.views import IN_PLACE


class Runner(Resharder):
    """Runner of a traced program under a choice, on local shards; to be called inside `shard_map`."""

    def __init__(
        self,
        traced: Traced,
        choice: Choice,
        topology: Topology,
        emission: Emission = BY_DEFAULT,
        orders: Sequence[Order] = (),
    ) -> None:
        values = (*traced.argument_values, *traced.constant_values)
        barriers = (residual_barriers, score_barriers)
        super().__init__(
            traced.program,
            choice,
            topology,
            copied=frozenset(values) if topology.chip.kind == "tpu" else frozenset(),
            resting=frozenset[int]().union(*(f(traced.program, choice, topology, emission) for f in barriers)),
        )
        self.traced = traced
        self.orders = orders_of_values(traced.program, orders)
        self.rings = {} if emission.rings is False else rings(traced.program, topology, choice)
        self.few_rows = find_few_rows(traced, choice, topology)
        self.waits = find_conversion_barriers(traced.program) if collectives(traced.program, topology, choice) else {}

    def __call__(self, *pieces: Any) -> list[Any]:
        """Computes the flat results from the flat arguments and constants, all in their planned layouts."""
        scope = Scope(self)
        values = (*self.traced.argument_values, *self.traced.constant_values)
        for value, piece in zip(values, pieces, strict=True):
            scope.put(value, piece)
        self.block(self.traced.block, scope)
        return [self._result(scope, k, atom) for k, atom in enumerate(self.traced.block.outputs)]

    def _result(self, scope: Scope, k: int, atom: Atom) -> Any:
        if isinstance(atom, Literal):
            return jnp.asarray(atom.value)
        layout = needed_layout(self.program, self.choice, self.program.results[k], 0)
        piece = scope.get(atom, layout)
        overwrites = any(result == k for _, result in self.program.donated)
        return copy_argument(piece) if overwrites and self._is_sent(atom, layout) else piece

    def _is_sent(self, value: int, layout: Layout) -> bool:
        """Whether a result comes directly from a collective.

        The TPU compiler (libtpu 0.0.42) does not write it into the result's buffer. It copies the result at the end, and
        the argument that the result overwrites at the start, and keeps all these copies live.
        """
        if self.topology.chip.kind != "tpu" or 0 in self.program.values[value].shape:
            return False
        made, home = (each(self.program, self.choice, value) for each in (produced_layout, kept_layout))
        steps = [*self.path(value, made, home), *self.path(value, home, layout)]
        return bool(steps) and steps[-1].kind != "slice"

    def block(self, block: Block, scope: Scope) -> None:
        """Runs a block's steps in order."""
        for step in block.steps:
            with _source_line_of(step.eqn):
                if isinstance(step, OpStep):
                    self._operation(step, scope)
                elif isinstance(step, LoopStep):
                    self._loop(step, scope)
                elif isinstance(step, BranchStep):
                    self._branch(step, scope)
                else:
                    scope.add_barrier(step)

    # --- operations ---------------------------------------------------------------------------------------------

    def _operation(self, step: OpStep, scope: Scope) -> None:
        strategy = self.choice.strategies[step.operation]
        op = self.program.operations[step.operation]
        cuts = self.traced.cuts.get(step.operation, ())
        whole = {cut.factor: step.rule.factors[cut.factor] for cut in cuts}
        factors = tuple(whole.get(k, factor) for k, factor in enumerate(op.factors))
        few = self.few_rows.get(step.operation)
        factors = factors if few is None else few.factors(factors)
        pieces = StrategyPieces(step.rule, factors, strategy, self.topology, order_of_operand(op, self.orders))
        ring = self._ring(step)
        operands = self._masked(step, pieces, self._cut(step, cuts, self._operands(step, scope, ring)))
        if ring is not None:
            self._run_ring(step, pieces, operands, ring, scope)
            return
        if few is None:
            results = run_locally(step.eqn, step.rule, pieces, operands)
        else:
            with few.name():
                results = run_locally(step.eqn, step.rule, pieces, few.operands(step.rule, operands))
            results = few.results(step.rule, results)
        for value, piece, dims in zip(step.results, results, step.rule.outputs, strict=True):
            scope.put(value, resize_cut(all_reduce_inside(step.rule, strategy, piece), dims, cuts, longer=True))

    def _operands(self, step: OpStep, scope: Scope, ring: Ring | None) -> list[Any]:
        """The operands in the layouts that they must have; of one that a ring gathers, its pieces."""
        op = self.program.operations[step.operation]
        layouts = iter(needed_layout(self.program, self.choice, step.operation, k) for k in range(len(op.inputs)))
        hidden = op.op_class == "matmul" and self.program.matmul_before[step.operation] is not None
        awaited = scope.stored(self.waits[step.operation]) if step.operation in self.waits else None
        found = []
        for k, atom in enumerate(step.operands):
            if isinstance(atom, Literal):
                found.append(atom.value)
            elif ring is not None and ring.side == k:
                next(layouts)
                found.append(scope.get_pieces(atom, ring))
            else:
                found.append(_barrier_after(awaited, scope.get(atom, next(layouts), hidden)))
        return found

    def _ring(self, step: OpStep) -> Ring | None:
        """The ring of a product; none for empty arrays, and where padding of the gathered operand must be masked."""
        ring = self.rings.get(step.operation)
        empty = ring is not None and 0 in self.program.values[ring.move.value].shape
        return None if ring is None or empty or (step.operation, ring.side) in self.traced.masks else ring

    def _run_ring(self, step: OpStep, pieces: StrategyPieces, operands: list[Any], ring: Ring, scope: Scope) -> None:
        """Runs a product piece by piece, with the hops of its ring between them."""
        op, (value,) = self.program.operations[step.operation], step.results

        def multiply(left: Any, right: Any) -> Any:
            return run_locally(step.eqn, step.rule, pieces, (left, right))[0]

        if ring.side == "result":
            with jax.named_scope(f"ring {ring.step.source}->{ring.step.target}"):
                scattered = scatter_in_ring(op, ring.step, operands, self.sizes, multiply)
            scope.put_scattered(value, scattered, ring)
        elif isinstance(operands[ring.side], Arrived):
            found, other = operands[ring.side], operands[1 - ring.side]
            scope.put(value, multiply_pieces(op, ring.side, found, other, multiply))
        else:  # the whole operand was gathered for another operation before
            scope.put(value, multiply(*operands))

    def _cut(self, step: OpStep, cuts: Sequence[Cut], operands: list[Any]) -> list[Any]:
        """The operands without the padding of what the operation has whole."""
        if not cuts:
            return operands
        pairs = zip(step.operands, operands, step.rule.inputs, strict=True)
        return [
            each if isinstance(atom, Literal) else resize_cut(each, dims, cuts, False) for atom, each, dims in pairs
        ]

    def _masked(self, step: OpStep, pieces: StrategyPieces, operands: list[Any]) -> list[Any]:
        """The operands with neutral values in their padding, where the operation needs them."""
        found, place = list(operands), -1
        for k, atom in enumerate(step.operands):
            place += not isinstance(atom, Literal)
            masks = () if isinstance(atom, Literal) else self.traced.masks.get((step.operation, place), ())
            found[k] = masked(operands[k], step.rule.inputs[k], masks, pieces) if masks else operands[k]
        return found

    # --- regions ------------------------------------------------------------------------------------------------

    def _layout(self, boundary: Entry | Carry | StackedResult, outer: bool) -> Layout:
        """The layout outside or inside a boundary: its operation's strategy, with or without the stack axis."""
        op = self.program.operations[boundary.operation]
        strategy = self.choice.strategies[boundary.operation]
        partial = tuple(sorted(axis for axes in strategy.carried for axis in axes))
        plain = Layout(strategy.splits[: len(op.factors) - _stack_axes(op)], partial)
        return Layout(((), *plain.dims), partial) if outer and _stack_axes(op) else plain

    def _enter_all(self, entries: Sequence[Entry | LiteralEntry], scope: Scope) -> list[Any]:
        return [
            each.outer.value if isinstance(each, LiteralEntry) else scope.get(each.outer, self._layout(each, True))
            for each in entries
        ]

    def _enter_scope(self, boundaries: Sequence[Entry | LiteralEntry | Carry], pieces: Sequence[Any]) -> Scope:
        scope = Scope(self)
        self._bring_in(scope, boundaries, pieces)
        return scope

    def _bring_in(
        self, scope: Scope, boundaries: Sequence[Entry | LiteralEntry | Carry], pieces: Sequence[Any]
    ) -> None:
        for boundary, piece in zip(boundaries, pieces, strict=True):
            if not isinstance(boundary, LiteralEntry):
                scope.put(boundary.inner, piece)

    def _initial(self, boundary: Carry, scope: Scope) -> Any:
        piece = scope.get(boundary.outer, self._layout(boundary, True))
        return (
            jnp.asarray(piece, self.program.values[boundary.inner].dtype)
            if isinstance(boundary.outer, Literal)
            else piece
        )

    def _reshard_carry(self, boundary: Carry, scope: Scope) -> Any:
        after: Any = boundary.inner_next
        piece = scope.get(after, self._layout(boundary, False))
        if isinstance(after, Literal):
            return jnp.asarray(piece, self.program.values[boundary.inner].dtype)
        made_by = self.program.operations[self.program.producers[after][0]]
        if self.orders.get(boundary.inner):
            return piece
        return self._in_argument_layout(piece, boundary.inner) if made_by.primitive in IN_PLACE else piece

    def _in_argument_layout(self, piece: Any, value: int) -> Any:
        return with_argument_layout(piece)

    def _loop(self, step: LoopStep, scope: Scope) -> None:
        held = self._enter_all(step.constants, scope)
        carry = self._to_memory_order(step, [self._initial(b, scope) for b in step.carries])
        if step.condition is None:
            results = self._scan(step, scope, held, carry)
        else:
            results = self._while(step, step.condition, held, carry)
        results[: len(carry)] = self._to_program_order(step, results)
        for boundary, piece in zip((*step.carries, *step.stacks), results, strict=True):
            scope.put(boundary.outer_result, piece)

    def _to_memory_order(self, step: LoopStep, carry: Sequence[Any]) -> list[Any]:
        return [to_memory_order(c, self.orders.get(b.inner, ())) for b, c in zip(step.carries, carry, strict=True)]

    def _to_program_order(self, step: LoopStep, carry: Sequence[Any]) -> list[Any]:
        return [to_program_order(c, self.orders.get(b.inner, ())) for b, c in zip(step.carries, carry, strict=False)]

    def _scan(self, step: LoopStep, scope: Scope, held: list[Any], carry: list[Any]) -> list[Any]:
        params = step.eqn.params

        def body(carry, slices):
            carry = self._to_program_order(step, carry)
            inner = self._enter_scope((*step.constants, *step.carries, *step.slices), (*held, *carry, *slices))
            self.block(step.body, inner)
            after = self._to_memory_order(step, [self._reshard_carry(b, inner) for b in step.carries])
            return after, [inner.get(b.inner_next, self._layout(b, False)) for b in step.stacks]

        stacks = self._enter_all(step.slices, scope)
        carry, piled = lax.scan(body, carry, stacks, length=params["length"], reverse=params["reverse"])
        return [*carry, *piled]

    def _while(self, step: LoopStep, test: Block, held: list[Any], carry: list[Any]) -> list[Any]:
        def enter_body(carry):
            return self._enter_scope((*step.constants, *step.carries), (*held, *self._to_program_order(step, carry)))

        def condition(carry):
            inner = enter_body(carry)
            self.block(test, inner)
            return inner.get(test.outputs[0], Layout(()))

        def body(carry):
            inner = enter_body(carry)
            self.block(step.body, inner)
            return self._to_memory_order(step, [self._reshard_carry(b, inner) for b in step.carries])

        return list(lax.while_loop(condition, body, carry))

    def _branch(self, step: BranchStep, scope: Scope) -> None:
        entering = [self._enter_all(entry, scope) for entry in step.entries]
        joined = [Layout(self.choice.strategies[at].splits) for at, _ in step.joins]

        def branch(k: int) -> Callable[[list[list[Any]]], list[Any]]:
            def run(operands):
                inner = self._enter_scope(step.entries[k], operands[k])
                self.block(step.blocks[k], inner)
                return [jnp.asarray(inner.get(a, at)) for a, at in zip(step.blocks[k].outputs, joined, strict=True)]

            return run

        selector = scope.get(step.selector, Layout(()))
        results = lax.switch(selector, [branch(k) for k in range(len(step.blocks))], entering)
        for (_, value), piece in zip(step.joins, results, strict=True):
            scope.put(value, piece)


def _source_line_of(eqn: Any) -> AbstractContextManager[None]:
    """A context that gives emitted operations the source line of their equation, which compiled programs keep."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return source_info_util.user_context(eqn.source_info.traceback, name_stack=names)


def _stack_axes(op: Any) -> int:
    """1 if the operation has a leading stack axis, which is its last factor."""
    return int(op.primitive in ("loop_slice", "loop_stack"))


def _barrier_after(awaited: Any, piece: Any) -> Any:
    """A shard that the compiler cannot use before `awaited` exists; unchanged if that is `None`."""
    if awaited is None or jnp.issubdtype(piece.dtype, jax.dtypes.extended):
        return piece
    return lax.optimization_barrier((piece, awaited))[0]


def emit(
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
    in_specs = tuple(spec_of(produced_layout(program, choice, program.operations[i].outputs[0].value)) for i in sources)
    out_specs = [
        spec_of(needed_layout(program, choice, i, 0)) if program.operations[i].inputs else PartitionSpec()
        for i in program.results
    ]
    runner = Runner(traced, choice, topology, emission, orders)
    avals = [program.values[program.operations[i].outputs[0].value] for i in sources]
    given = [k for k, aval in enumerate(avals) if 0 not in aval.shape]
    if len(given) == len(avals):
        return jax.shard_map(runner, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def without_empty(*pieces: Any) -> list[Any]:
        known = dict(zip(given, pieces, strict=True))
        layouts = [produced_layout(program, choice, program.operations[i].outputs[0].value) for i in sources]
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
