"""The walk over a jaxpr: equations become operations over factors, loops and branches become regions.

A value that crosses a region's boundary, or is a loop carry, has a boundary operation, which owns its layout there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from autoshard.errors import TraceError, UnsupportedPrimitiveError
from autoshard.rules import Rule, rule_for
from autoshard.rules.pin import pinned_by
from autoshard.tracing.blocks import Atom, BarrierStep, Block, Boundary, BranchStep, Literal, LoopStep, OpStep, Step
from autoshard.tracing.closed_over import closed_over
from autoshard.tracing.decompositions import expandable, expanded
from autoshard.tracing.jaxprs import (
    CALLS,
    INLINED,
    KERNELS,
    computed_again,
    is_held,
    needed,
    scan_counts,
    unbatched,
    unique,
    without_sharding,
)
from autoshard.tracing.loops.invariants import split, used
from autoshard.tracing.loops.trip_counts import Scalars, rounds
from autoshard.tracing.shard_maps import described, meaning
from autoshard.tracing.source_lines import is_jax_own, itemsize_of, source_of
from costmodels.program.program import Factor, OpClass, Operation, Region, Use, Value


class Tracer:
    """Collector of values, operations and regions during the walk."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.values: list[Value] = []
        self.operations: list[Operation | None] = []
        self.regions: list[Region] = [Region("main")]
        self.warnings: list[str] = []
        self.held: dict[int, dict[int, Atom]] = {0: {}}
        self.caller = ""
        self.read: set[int] = set()
        self.scalars = Scalars(lambda atom: atom.value)

    # --- values and boundary operations -------------------------------------------------------------------------

    def value(self, aval: Any, name: str, region: int, origin: str = "") -> int:
        self.values.append(Value(name, tuple(aval.shape), str(aval.dtype), itemsize_of(aval.dtype), region, origin))
        return len(self.values) - 1

    def source(self, aval: Any, path: str) -> int:
        index = self.value(aval, path, 0, path)
        self._identity(path, "argument", [], [(index, 0)], 0, "source")
        return index

    def hold(self, array: Any, name: str) -> int:
        """The source of an array that a call or a loop closes over."""
        self.held[0][id(array)] = self.source(jax.typeof(array), name)
        return self.held[0][id(array)]

    def constant(self, array: Any, region: int) -> Atom:
        """A constant that a call or a loop closes over: a scalar as a literal, anything else as a value of the region."""
        return self.held[region][id(array)] if is_held(array) else Literal(np.asarray(array))

    def _enter_held(self, closed: Sequence[Any], outer: int, inner: int, primitive: str) -> list[Boundary]:
        """Brings the arrays that a region's jaxprs close over into the region."""
        arrays = unique([array for inside in closed for array in (*inside.consts, *closed_over(inside.jaxpr))])
        entering = [
            self._enter(self.held[outer][id(array)], jax.typeof(array), outer, inner, primitive) for array in arrays
        ]
        self.held[inner] = {id(array): _inner(boundary) for array, boundary in zip(arrays, entering, strict=True)}
        return entering

    def sink(self, atom: Atom, path: str) -> int:
        operands = [] if isinstance(atom, Literal) else [(atom, 0)]
        return self._identity(path, "result", operands, [], 0, "sink")

    def _identity(
        self, name, primitive, inputs, outputs, region, op_class: OpClass = "boundary", lead=(), traffic=()
    ) -> int:
        """An operation that owns one layout; `lead` has the positions (operands 0, 1, results -1, -2) with a stack axis."""
        index = self.reserve()
        self.fill(index, name, primitive, inputs, outputs, region, op_class, lead, traffic)
        return index

    def reserve(self) -> int:
        self.operations.append(None)
        return len(self.operations) - 1

    def fill(
        self, index, name, primitive, inputs, outputs, region, op_class: OpClass = "boundary", lead=(), traffic=()
    ) -> None:
        """Completes a reserved operation whose dimensions all pass through, except a leading stack axis."""
        at = [*range(len(inputs)), *(-1 - k for k in range(len(outputs)))]
        every = [*inputs, *outputs]
        plain = [
            self.values[value].shape[1:] if k in lead else self.values[value].shape
            for k, (value, _) in zip(at, every, strict=True)
        ]
        shape = plain[0] if plain else ()
        factors = [Factor(n) for n in shape]
        dims = tuple((i,) for i in range(len(shape)))
        uses = []
        for k, (value, where) in zip(at, every, strict=True):
            if k in lead:
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
            traffic=traffic,
        )

    # --- walking ------------------------------------------------------------------------------------------------

    def block(self, jaxpr: Any, env: dict[Any, Atom], region: int) -> Block:
        """Walks the equations that the outputs or effects need."""
        steps: list[Step] = []
        for eqn in needed(jaxpr):
            operands = tuple(_read(env, atom) for atom in eqn.invars)
            results = self._equation(eqn, operands, region, steps)
            env.update(zip(eqn.outvars, results, strict=True))
        return Block(tuple(steps), tuple(_read(env, atom) for atom in jaxpr.outvars))

    def _equation(self, eqn, operands, region, steps) -> Sequence[Atom]:
        name = eqn.primitive.name
        if name in CALLS:
            inner = next(eqn.params[key] for key in INLINED if key in eqn.params)
            given = _values(operands)
            if computed_again(eqn) and not self.read.isdisjoint(given):  # else no earlier result to keep apart
                steps.append(BarrierStep(eqn, given))
            return self._call(eqn, inner, operands, region, steps)
        if name == "shard_map":
            return self._mapped(eqn, operands, region, steps)
        if expandable(eqn):
            return self._call(eqn, expanded(eqn), operands, region, steps)
        if name == "optimization_barrier":
            steps.append(BarrierStep(eqn, _values(operands)))
            return operands
        self.read.update(_values(operands))
        if name == "scan":
            step, results = self._scan(eqn, operands, region, steps)
        elif name == "while":
            step, results = self._while(eqn, operands, region, steps)
        elif name == "cond":
            step, results = self._cond(eqn, operands, region)
        else:
            step = self._operation(eqn, operands, region)
            results = step.results
        steps.append(step)
        return results

    def _mapped(self, eqn, operands, region, steps) -> Sequence[Atom]:
        """Walks a `shard_map` as its equivalent on global arrays; all of it has the source line of the `shard_map`."""
        where = self._where(eqn)
        self.warnings.append(
            f"the shard_map at {where} ({described(eqn)}) is planned as its equivalent on global arrays; its specs are"
            " pins if the topology has its axes, its collectives are replanned"
        )
        return self._call(eqn, meaning(eqn), operands, region, steps)

    def _call(self, eqn, inner, operands, region, steps) -> Sequence[Atom]:
        """Inlines a call: its equations become the caller's."""
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, jex.ClosedJaxpr) else (inner, ())
        env: dict[Any, Atom] = dict(zip(jaxpr.invars, operands, strict=True))
        env.update(zip(jaxpr.constvars, (self.constant(c, region) for c in consts), strict=True))
        caller, self.caller = self.caller, self._where(eqn) if is_jax_own(jaxpr) else ""
        block = self.block(jaxpr, env, region)
        self.caller = caller
        steps += block.steps
        return block.outputs

    def _where(self, eqn) -> str:
        """The user's line; inside a function of JAX, the line that called it, because JAX keeps only the first caller."""
        return self.caller or source_of(eqn)

    def _operation(self, eqn, operands, region) -> OpStep:
        name = eqn.primitive.name
        where = self._where(eqn)
        if eqn.params.get("ordered") and name.startswith("debug"):
            raise TraceError(
                f"{name} at {where} must have ordered=False, got ordered=True: JAX orders effects on one device only."
            )
        if eqn.effects:
            self.warnings.append(f"{name} at {where} has side effects, which run once per chip")
        rule = rule_for(name, [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars], eqn.params)
        if not rule.exact:
            if self.strict:
                raise UnsupportedPrimitiveError(
                    f"{_called(eqn)} at {where} has no sharding rule; register one (autoshard.rule), or trace without strict."
                )
            self.warnings.append(f"{_called(eqn)} at {where} has no sharding rule: its arrays are replicated")
        pinned = pinned_by(name, eqn.params, len(eqn.outvars[0].aval.shape)) if eqn.outvars else None
        eqn = without_sharding(eqn)
        index = self.reserve()
        origin = self._origin(name, operands)
        results = tuple(self.value(v.aval, f"{name} ({where})", region, origin) for v in eqn.outvars)
        op = self._costed(eqn, rule, operands, results, region, where)
        self.operations[index] = dataclasses.replace(op, pinned=pinned)
        self.scalars.note(name, operands, results)
        return OpStep(index, eqn, rule, operands, results)

    def _costed(self, eqn, rule: Rule, operands, results, region, where) -> Operation:
        """The operation as the search sees it, without literal operands."""
        place = {k: n for n, k in enumerate(k for k, atom in enumerate(operands) if not isinstance(atom, Literal))}
        linear = tuple(frozenset(place[k] for k in group) for group in rule.linear if all(k in place for k in group))
        traffic = tuple(place[k] if k >= 0 else k for k in rule.traffic if k < 0 or k in place)
        inputs = tuple(Use(operands[k], rule.inputs[k], region) for k in place)
        outputs = tuple(Use(value, dims, region) for value, dims in zip(results, rule.outputs, strict=True))
        dtype = next((str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)), "")
        return Operation(
            self._label(eqn, operands, where),
            eqn.primitive.name,
            rule.factors,
            inputs,
            outputs,
            region,
            rule.op_class,
            linear,
            traffic,
            rule.flops_per_point,
            dtype,
            where,
            rule.exact,
        )

    def _label(self, eqn, operands, where) -> str:
        origins = [self.values[a].origin for a in operands if not isinstance(a, Literal) and self.values[a].origin]
        return f"{eqn.primitive.name} {' · '.join(dict.fromkeys(origins))} ({where})".replace("  ", " ")

    def _origin(self, name: str, operands) -> str:
        """A view or cast of an argument keeps the argument's name."""
        views = "convert_element_type transpose reshape squeeze broadcast_in_dim slice dynamic_slice copy".split()
        first = operands[0] if operands else Literal(0)
        return self.values[first].origin if name in views and not isinstance(first, Literal) else ""

    # --- regions ------------------------------------------------------------------------------------------------

    def region(self, kind, parent, count, name) -> int:
        self.regions.append(Region(kind, parent, count, name))
        return len(self.regions) - 1

    def _enter(self, atom: Atom, aval, outer: int, inner: int, primitive: str, sliced: bool = False) -> Boundary:
        """A constant of a region, or a slice of a stacked array: one layout, with reshards outside or inside."""
        if isinstance(atom, Literal):
            return Boundary(-1, atom)
        stacked = self.values[atom]
        value = self.value(aval, stacked.name, inner, stacked.origin)
        lead = (0,) if sliced else ()
        op = self._identity(stacked.name, primitive, [(atom, outer)], [(value, inner)], outer, lead=lead)
        return Boundary(op, atom, value)

    def _before(self, body: Any, known: dict[Any, Atom], region: int, steps: list) -> tuple[Any, dict[Any, Atom]]:
        """Walks the loop-invariant equations of a body; returns the rest of the body, and the atoms of its constants."""
        found = split(body, known)
        if not found.before:
            return body, known
        env = dict(known)
        for eqn in found.before:
            results = self._equation(eqn, tuple(_read(env, atom) for atom in eqn.invars), region, steps)
            env.update(zip(eqn.outvars, results, strict=True))
        read, idle = used(found.rest), {v for eqn in found.before for v in eqn.invars if not isinstance(v, jex.Literal)}
        return found.rest, {v: env[v] for v in (*known, *found.entering) if v in read or v not in idle}

    def _entering(self, fixed: dict[Any, Atom], outer: int, inner: int) -> dict[Any, Boundary]:
        """Brings loop constants into a loop."""
        return {v: self._enter(atom, v.aval, outer, inner, "loop_constant") for v, atom in fixed.items()}

    def _scan(self, eqn, operands, region, steps) -> tuple[LoopStep, list[Atom]]:
        params = eqn.params
        if params.get("unroll", 1) not in (1, False):
            self.warnings.append(
                f"scan at {self._where(eqn)}: planned and run without its unroll={params['unroll']}, which would keep the"
                " slices of several iterations live at once"
            )
        body = params["jaxpr"].jaxpr
        n_const, n_carry = scan_counts(params)
        variables = body.invars
        body, fixed = self._before(body, dict(zip(variables[:n_const], operands[:n_const], strict=True)), region, steps)
        inner = self.region("loop", region, params["length"], f"scan ({self._where(eqn)})")
        entered = self._entering(fixed, region, inner)
        carries = [self._carry_in(var, inner) for var in variables[n_const : n_const + n_carry]]
        slices = [
            self._enter(atom, var.aval, region, inner, "loop_slice", sliced=True)
            for atom, var in zip(operands[n_const + n_carry :], variables[n_const + n_carry :], strict=True)
        ]
        env = {v: _inner(b) for v, b in entered.items()}
        env.update(zip(variables[n_const:], (_inner(b) for b in (*carries, *slices)), strict=True))
        constants = [*entered.values(), *self._enter_held([params["jaxpr"]], region, inner, "loop_constant")]
        env.update(zip(body.constvars, (self.constant(c, inner) for c in params["jaxpr"].consts), strict=True))
        block = self.block(body, env, inner)
        inits = operands[n_const : n_const + n_carry]
        carries = [
            self._carry_out(boundary, init, after, region, inner)
            for boundary, init, after in zip(carries, inits, block.outputs[:n_carry], strict=True)
        ]
        stacks = [
            self._stack(atom, var, region, inner)
            for atom, var in zip(block.outputs[n_carry:], eqn.outvars[n_carry:], strict=True)
        ]
        step = LoopStep(eqn, tuple(constants), tuple(carries), tuple(slices), tuple(stacks), block)
        return step, [b.outer_result for b in (*carries, *stacks)]

    def _carry_in(self, var, inner: int) -> Boundary:
        index = self.reserve()
        return Boundary(index, inner=self.value(var.aval, f"carry {var.aval.str_short()}", inner))

    def _carry_out(self, boundary: Boundary, init: Atom, after: Atom, outer: int, inner: int) -> Boundary:
        """Completes a loop carry: its initial value, its value in the loop and its result have one layout."""
        before = self.values[boundary.inner]
        name = before.name if isinstance(init, Literal) else f"carry {self.values[init].name}"
        result = len(self.values)
        self.values.append(dataclasses.replace(before, name=name, region=outer))
        self.values[boundary.inner] = dataclasses.replace(before, name=name)
        inputs = [(atom, at) for atom, at in ((init, outer), (after, inner)) if not isinstance(atom, Literal)]
        outputs = [(boundary.inner, inner), (result, outer)]
        self.fill(boundary.operation, name, "loop_carry", inputs, outputs, outer)
        return dataclasses.replace(boundary, outer=init, inner_next=after, outer_result=result)

    def _stack(self, atom: Atom, var, outer: int, inner: int) -> Boundary:
        name = "stacked " + ("literal" if isinstance(atom, Literal) else self.values[atom].name)
        result = self.value(var.aval, name, outer)
        inputs = [] if isinstance(atom, Literal) else [(atom, inner)]
        op = self._identity(name, "loop_stack", inputs, [(result, outer)], outer, lead=(-1,), traffic=(-1,))
        return Boundary(op, inner_next=atom, outer_result=result)

    def _while(self, eqn, operands, region, steps) -> tuple[LoopStep, list[Atom]]:
        params = eqn.params
        where = self._where(eqn)
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        rounds = self._rounds(params, operands, where)
        closed = params["cond_jaxpr"], params["body_jaxpr"]
        if closed[0].out_avals[0].shape:
            closed = unbatched(*closed, n_cond, n_body)
            operands, n_body = (*operands[:n_cond], *operands), n_cond + n_body
        condition, body = (each.jaxpr for each in closed)
        fixed = dict(zip(body.invars[:n_body], operands[n_cond : n_cond + n_body], strict=True))
        body, fixed = self._before(body, fixed, region, steps)
        inner = self.region("loop", region, rounds, f"while ({where})")
        tested = self._entering(dict(zip(condition.invars[:n_cond], operands[:n_cond], strict=True)), region, inner)
        entered = self._entering(fixed, region, inner)
        carries = [self._carry_in(var, inner) for var in body.invars[n_body:]]
        going = [_inner(b) for b in carries]
        constants = [*tested.values(), *entered.values(), *self._enter_held(closed, region, inner, "loop_constant")]
        known = {
            var: self.constant(c, inner)
            for each in closed
            for var, c in zip(each.jaxpr.constvars, each.consts, strict=True)
        }
        known.update((v, _inner(b)) for v, b in (*tested.items(), *entered.items()))
        test = self.block(condition, known | dict(zip(condition.invars[n_cond:], going, strict=True)), inner)
        self._identity(
            "condition", "while_condition", [(a, inner) for a in test.outputs if not isinstance(a, Literal)], [], inner
        )
        block = self.block(body, known | dict(zip(body.invars[n_body:], going, strict=True)), inner)
        carries = [
            self._carry_out(boundary, init, after, region, inner)
            for boundary, init, after in zip(carries, operands[n_cond + n_body :], block.outputs, strict=True)
        ]
        step = LoopStep(eqn, tuple(constants), tuple(carries), (), (), block, test)
        return step, [b.outer_result for b in carries]

    def _rounds(self, params, operands, where: str) -> int:
        """The trip count at which a `while` is costed; warns if it may not be the real one."""
        n_cond = params["cond_nconsts"]
        first = n_cond + params["body_nconsts"]
        found = rounds(
            params,
            lambda carry: self.scalars.number(operands[first + carry]),
            lambda constant: self.scalars.number(operands[constant]),
        )
        if found is None:
            self.warnings.append(f"while at {where}: its trip count is unknown, costed as 1")
            return 1
        if not found.exact:
            self.warnings.append(
                f"while at {where}: costed as {found.count} iterations, with a counter from {found.start} to {found.end} by"
                f" {found.step}; it may end earlier"
            )
        return max(1, found.count)

    def _cond(self, eqn, operands, region) -> tuple[BranchStep, list[Atom]]:
        where = self._where(eqn)
        self.warnings.append(f"cond at {where}: all branches are costed")
        selector, *rest = operands
        selects = [] if isinstance(selector, Literal) else [(selector, region)]
        select = self._identity(f"cond ({where})", "branch_select", selects, [], region)
        entries, blocks, inners = [], [], []
        for closed in eqn.params["branches"]:
            inner = self.region("branch", region, 1, f"branch ({where})")
            entry = [
                self._enter(atom, var.aval, region, inner, "branch_constant")
                for atom, var in zip(rest, closed.jaxpr.invars, strict=True)
            ]
            env = dict(zip(closed.jaxpr.invars, (_inner(b) for b in entry), strict=True))
            entry += self._enter_held([closed], region, inner, "branch_constant")
            env.update(zip(closed.jaxpr.constvars, (self.constant(c, inner) for c in closed.consts), strict=True))
            blocks.append(self.block(closed.jaxpr, env, inner))
            entries.append(tuple(entry))
            inners.append(inner)
        joins = []
        for k, var in enumerate(eqn.outvars):
            result = self.value(var.aval, f"cond ({where})", region)
            inputs = [
                (block.outputs[k], inner)
                for block, inner in zip(blocks, inners, strict=True)
                if not isinstance(block.outputs[k], Literal)
            ]
            joins.append((self._identity(f"cond ({where})", "branch_join", inputs, [(result, region)], region), result))
        step = BranchStep(eqn, selector, select, tuple(entries), tuple(blocks), tuple(joins))
        return step, [result for _, result in joins]


def _values(atoms: Sequence[Atom]) -> tuple[int, ...]:
    """The distinct values among the atoms."""
    return tuple(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))


def _called(eqn: Any) -> str:
    """A primitive's name, followed by the kernel's own name if it has one."""
    kernel = eqn.params.get("name") if eqn.primitive.name in KERNELS else None
    return f"{eqn.primitive.name} {kernel}" if kernel else eqn.primitive.name


def _inner(boundary: Boundary) -> Atom:
    return boundary.outer if boundary.inner < 0 else boundary.inner


def _read(env: dict[Any, Atom], atom: Any) -> Atom:
    if not isinstance(atom, jex.Literal):
        return env[atom]
    aval: Any = atom.aval
    return Literal(np.asarray(atom.val, aval.dtype))
