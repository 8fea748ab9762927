"""The walk over a jaxpr: equations become operations over factors, loops and branches become regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from autoshard._util.dtypes import dtype_name
from autoshard.errors import TraceError, UnsupportedPrimitiveError
from autoshard.rules import Rule, named_kernel, rule_of_equation
from autoshard.rules.pin import pinned_by
from autoshard.tracing.blocks import (
    Atom,
    BarrierStep,
    Block,
    BranchStep,
    Literal,
    LoopStep,
    OpStep,
    Step,
)
from autoshard.tracing.builder import Builder, End, inside_of, is_zero
from autoshard.tracing.jaxprs import (
    CALLS,
    INLINED,
    KERNELS,
    is_rematerialised,
    live_equations,
    scan_counts,
    unbatch_predicate,
    without_sharding,
)
from autoshard.tracing.loops.invariants import hoist, variables_read
from autoshard.tracing.loops.trip_counts import Scalars, trip_count
from autoshard.tracing.rewrites.decompositions import can_decompose, compose_chains, decompose
from autoshard.tracing.rewrites.repeated_operands import group_repeats
from autoshard.tracing.rewrites.row_updates import row_form, writes_windows
from autoshard.tracing.rewrites.vector_products import elementwise_form, is_vector_product
from autoshard.tracing.shard_maps import global_form, mesh_text
from autoshard.tracing.source_lines import is_jax_own, source_of
from costmodels.program.program import Operation, Output, Pinned, Region, Use


class Tracer:
    """Walker of equations, which adds what it finds to a `Builder` and returns executable blocks."""

    def __init__(self, builder: Builder, strict: bool, chains: bool = False) -> None:
        self.builder = builder
        self.strict, self.chains = strict, chains
        self.warnings: list[str] = []
        self.caller = ""
        self.call: Any = None
        self.read: set[int] = set()
        self.scalars = Scalars(lambda atom: atom.value)

    # --- walking ------------------------------------------------------------------------------------------------

    def block(self, jaxpr: Any, env: dict[Any, Atom], region: int) -> Block:
        """Walks the equations that the outputs or effects need."""
        steps: list[Step] = []
        eqns = group_repeats(jaxpr, live_equations(jaxpr))
        for eqn in compose_chains(jaxpr, eqns) if self.chains else eqns:
            operands = tuple(_read(env, atom) for atom in eqn.invars)
            results = self._equation(eqn, operands, region, steps)
            env.update(zip(eqn.outvars, results, strict=True))
        return Block(tuple(steps), tuple(_read(env, atom) for atom in jaxpr.outvars))

    def _equation(self, eqn, operands, region, steps) -> Sequence[Atom]:
        eqn = named_kernel(eqn) or eqn
        name = eqn.primitive.name
        if name in CALLS:
            inner = next(eqn.params[key] for key in INLINED if key in eqn.params)
            given = _values(operands)
            if is_rematerialised(eqn) and not self.read.isdisjoint(given):  # else no earlier result to keep apart
                steps.append(BarrierStep(eqn, given))
            return self._call(eqn, inner, operands, region, steps)
        if name == "shard_map":
            return self._shard_map(eqn, operands, region, steps)
        if can_decompose(eqn):
            return self._call(eqn, decompose(eqn), operands, region, steps)
        if is_vector_product(eqn):
            return self._call(eqn, elementwise_form(eqn), operands, region, steps)
        if writes_windows(eqn):
            return self._call(eqn, row_form(eqn), operands, region, steps)
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

    def _shard_map(self, eqn, operands, region, steps) -> Sequence[Atom]:
        """Walks a `shard_map` as its equivalent on global arrays; all of it has the source line of the `shard_map`."""
        where = self._location(eqn)
        self.warnings.append(
            f"the shard_map at {where} ({mesh_text(eqn)}) is planned as its equivalent on global arrays; its specs are"
            " pins if the topology has its axes, its collectives are replanned"
        )
        return self._call(eqn, global_form(eqn), operands, region, steps)

    def _call(self, eqn, inner, operands, region, steps) -> Sequence[Atom]:
        """Inlines a call: its equations become the caller's."""
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, jex.ClosedJaxpr) else (inner, ())
        env: dict[Any, Atom] = dict(zip(jaxpr.invars, operands, strict=True))
        env.update(zip(jaxpr.constvars, (self.builder.constant(c, region) for c in consts), strict=True))
        caller, call = self.caller, self.call
        own = is_jax_own(jaxpr)
        self.caller, self.call = (self._location(eqn), call or eqn) if own else ("", None)
        block = self.block(jaxpr, env, region)
        self.caller, self.call = caller, call
        steps += block.steps
        return block.outputs

    def _location(self, eqn) -> str:
        """The user's line; inside a function of JAX, the line that called it, because JAX keeps only the first caller."""
        return self.caller or source_of(eqn)

    def _operation(self, eqn, operands, region) -> OpStep:
        name = eqn.primitive.name
        where = self._location(eqn)
        if eqn.params.get("ordered") and name.startswith("debug"):
            raise TraceError(
                f"{name} at {where} must have ordered=False, got ordered=True: JAX orders effects on one device only."
            )
        if eqn.effects:
            self.warnings.append(f"{name} at {where} has side effects, which run once per chip")
        rule = rule_of_equation(eqn)
        if not rule.exact:
            if self.strict:
                raise UnsupportedPrimitiveError(
                    f"{_full_name(eqn)} at {where} has no sharding rule; register one (autoshard.rule), or trace without"
                    " strict."
                )
            self.warnings.append(_replicated_text(eqn, where, rule))
        pinned = pinned_by(name, eqn.params, len(eqn.outvars[0].aval.shape)) if eqn.outvars else None
        eqn = without_sharding(eqn)
        index = self.builder.reserve()
        origin = self._origin(name, operands)
        results = tuple(self.builder.add_value(v.aval, f"{name} ({where})", region, origin) for v in eqn.outvars)
        self.builder.operations[index] = self._costed(eqn, rule, operands, results, region, where, pinned)
        self.scalars.note(name, operands, results)
        return OpStep(index, eqn, rule, operands, results, self.call or eqn)

    def _costed(self, eqn, rule: Rule, operands, results, region, where, pinned: Pinned | None) -> Operation:
        """The operation as the search sees it, without literal operands."""
        place = {k: n for n, k in enumerate(k for k, atom in enumerate(operands) if not isinstance(atom, Literal))}
        sums = all(self.builder.values[value].dtype.startswith(("float", "bfloat", "complex")) for value in results)
        linear = tuple(
            frozenset(place[k] for k in group if k in place)
            for group in rule.linear
            if all(k in place or (sums and is_zero(operands[k])) for k in group)
        )
        traffic = tuple(
            k if isinstance(k, Output) else place[k] for k in rule.traffic if isinstance(k, Output) or k in place
        )
        inputs = tuple(Use(operands[k], rule.inputs[k], region) for k in place)
        outputs = tuple(Use(value, dims, region) for value, dims in zip(results, rule.outputs, strict=True))
        dtype = next((dtype_name(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)), "")
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
            pinned,
            rounded=tuple(place[k] for k in rule.rounded if k in place),
        )

    def _label(self, eqn, operands, where) -> str:
        origins = [self.builder.values[a].origin for a in operands if not isinstance(a, Literal)]
        names = dict.fromkeys(self.builder.values[origin].name for origin in origins if origin is not None)
        return f"{eqn.primitive.name} {' · '.join(names)} ({where})".replace("  ", " ")

    def _origin(self, name: str, operands) -> int | None:
        """A view or cast of an argument keeps the argument as its origin."""
        views = "convert_element_type transpose reshape squeeze broadcast_in_dim slice dynamic_slice copy".split()
        first = operands[0] if operands else Literal(0)
        return self.builder.values[first].origin if name in views and not isinstance(first, Literal) else None

    # --- regions ------------------------------------------------------------------------------------------------

    def _hoist_invariants(
        self, body: Any, known: dict[Any, Atom], region: int, steps: list
    ) -> tuple[Any, dict[Any, Atom]]:
        """Walks the loop-invariant equations of a body; returns the rest of the body, and the atoms of its constants."""
        found = hoist(body, known)
        if not found.before:
            return body, known
        env = dict(known)
        for eqn in found.before:
            results = self._equation(eqn, tuple(_read(env, atom) for atom in eqn.invars), region, steps)
            env.update(zip(eqn.outvars, results, strict=True))
        read, idle = (
            variables_read(found.rest),
            {v for eqn in found.before for v in eqn.invars if not isinstance(v, jex.Literal)},
        )
        return found.rest, {v: env[v] for v in (*known, *found.entering) if v in read or v not in idle}

    def _scan(self, eqn, operands, region, steps) -> tuple[LoopStep, list[Atom]]:
        params = eqn.params
        if params.get("unroll", 1) not in (1, False):
            self.warnings.append(
                f"scan at {self._location(eqn)}: planned and run without its unroll={params['unroll']}, which would keep the"
                " slices of several iterations live at once"
            )
        body = params["jaxpr"].jaxpr
        n_const, n_carry = scan_counts(params)
        variables = body.invars
        body, fixed = self._hoist_invariants(
            body, dict(zip(variables[:n_const], operands[:n_const], strict=True)), region, steps
        )
        inner = self.builder.add_region(Region("loop", region, params["length"], f"scan ({self._location(eqn)})"))
        entered = self.builder.enter_constants(fixed, region, inner)
        begun = [self.builder.begin_carry(var, inner) for var in variables[n_const : n_const + n_carry]]
        slices = [
            self.builder.enter(atom, var.aval, region, inner, "loop_slice", sliced=True)
            for atom, var in zip(operands[n_const + n_carry :], variables[n_const + n_carry :], strict=True)
        ]
        env = {v: inside_of(b) for v, b in entered.items()}
        env.update(zip(variables[n_const:], (*(value for _, value in begun), *map(inside_of, slices)), strict=True))
        constants = [*entered.values(), *self.builder.enter_held([params["jaxpr"]], region, inner, "loop_constant")]
        env.update(zip(body.constvars, (self.builder.constant(c, inner) for c in params["jaxpr"].consts), strict=True))
        block = self.block(body, env, inner)
        inits = operands[n_const : n_const + n_carry]
        carries = [
            self.builder.end_carry(*each, init, after, region, inner)
            for each, init, after in zip(begun, inits, block.outputs[:n_carry], strict=True)
        ]
        stacks = [
            self.builder.stack(atom, var, region, inner)
            for atom, var in zip(block.outputs[n_carry:], eqn.outvars[n_carry:], strict=True)
        ]
        step = LoopStep(eqn, tuple(constants), tuple(carries), tuple(slices), tuple(stacks), block)
        return step, [b.outer_result for b in (*carries, *stacks)]

    def _while(self, eqn, operands, region, steps) -> tuple[LoopStep, list[Atom]]:
        params = eqn.params
        where = self._location(eqn)
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        rounds = self._trip_count(params, operands, where)
        closed = params["cond_jaxpr"], params["body_jaxpr"]
        if closed[0].out_avals[0].shape:
            closed = unbatch_predicate(*closed, n_cond, n_body)
            operands, n_body = (*operands[:n_cond], *operands), n_cond + n_body
        condition, body = (each.jaxpr for each in closed)
        fixed = dict(zip(body.invars[:n_body], operands[n_cond : n_cond + n_body], strict=True))
        body, fixed = self._hoist_invariants(body, fixed, region, steps)
        inner = self.builder.add_region(Region("loop", region, rounds, f"while ({where})"))
        tested = self.builder.enter_constants(
            dict(zip(condition.invars[:n_cond], operands[:n_cond], strict=True)), region, inner
        )
        entered = self.builder.enter_constants(fixed, region, inner)
        begun = [self.builder.begin_carry(var, inner) for var in body.invars[n_body:]]
        going = [value for _, value in begun]
        constants = [
            *tested.values(),
            *entered.values(),
            *self.builder.enter_held(closed, region, inner, "loop_constant"),
        ]
        known = {
            var: self.builder.constant(c, inner)
            for each in closed
            for var, c in zip(each.jaxpr.constvars, each.consts, strict=True)
        }
        known.update((v, inside_of(b)) for v, b in (*tested.items(), *entered.items()))
        test = self.block(condition, known | dict(zip(condition.invars[n_cond:], going, strict=True)), inner)
        self.builder.add_boundary(
            "condition",
            "while_condition",
            [End(a, inner) for a in test.outputs if not isinstance(a, Literal)],
            [],
            inner,
        )
        block = self.block(body, known | dict(zip(body.invars[n_body:], going, strict=True)), inner)
        carries = [
            self.builder.end_carry(*each, init, after, region, inner)
            for each, init, after in zip(begun, operands[n_cond + n_body :], block.outputs, strict=True)
        ]
        step = LoopStep(eqn, tuple(constants), tuple(carries), (), (), block, test)
        return step, [b.outer_result for b in carries]

    def _trip_count(self, params, operands, where: str) -> int:
        """The trip count at which a `while` is costed; warns if it may not be the real one."""
        n_cond = params["cond_nconsts"]
        first = n_cond + params["body_nconsts"]
        found = trip_count(
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
        where = self._location(eqn)
        self.warnings.append(f"cond at {where}: all branches are costed")
        selector, *rest = operands
        selects = [] if isinstance(selector, Literal) else [End(selector, region)]
        select = self.builder.add_boundary(f"cond ({where})", "branch_select", selects, [], region)
        entries, blocks, inners = [], [], []
        for closed in eqn.params["branches"]:
            inner = self.builder.add_region(Region("branch", region, 1, f"branch ({where})"))
            entry = [
                self.builder.enter(atom, var.aval, region, inner, "branch_constant")
                for atom, var in zip(rest, closed.jaxpr.invars, strict=True)
            ]
            env = dict(zip(closed.jaxpr.invars, (inside_of(b) for b in entry), strict=True))
            entry += self.builder.enter_held([closed], region, inner, "branch_constant")
            env.update(
                zip(closed.jaxpr.constvars, (self.builder.constant(c, inner) for c in closed.consts), strict=True)
            )
            blocks.append(self.block(closed.jaxpr, env, inner))
            entries.append(tuple(entry))
            inners.append(inner)
        joins = []
        for k, var in enumerate(eqn.outvars):
            result = self.builder.add_value(var.aval, f"cond ({where})", region)
            inputs = [
                End(block.outputs[k], inner)
                for block, inner in zip(blocks, inners, strict=True)
                if not isinstance(block.outputs[k], Literal)
            ]
            joins.append(
                (
                    self.builder.add_boundary(f"cond ({where})", "branch_join", inputs, [End(result, region)], region),
                    result,
                )
            )
        step = BranchStep(eqn, selector, select, tuple(entries), tuple(blocks), tuple(joins))
        return step, [result for _, result in joins]


def _values(atoms: Sequence[Atom]) -> tuple[int, ...]:
    """The distinct values among the atoms."""
    return tuple(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))


def _full_name(eqn: Any) -> str:
    """A primitive's name, followed by the kernel's own name if it has one."""
    kernel = eqn.params.get("name") if eqn.primitive.name in KERNELS else None
    return f"{eqn.primitive.name} {kernel}" if kernel else eqn.primitive.name


def _replicated_text(eqn: Any, where: str, rule: Rule) -> str:
    text = f"{_full_name(eqn)} at {where} has no sharding rule: its arrays are replicated"
    if not rule.reason:
        return text
    return f"{text}; {rule.reason}. Call the kernel in a function with a rule (`autoshard.rule`) to split it"


def _read(env: dict[Any, Atom], atom: Any) -> Atom:
    if not isinstance(atom, jex.Literal):
        return env[atom]
    aval: Any = atom.aval
    return Literal(np.asarray(atom.val, aval.dtype))
