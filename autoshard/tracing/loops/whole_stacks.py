"""Rewriting of a jaxpr on slices as one on whole stacks, which it reads and writes in place.

The stack replaces the slice among operands and results. Further operands, after all others, are the indices of the slice
in the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from autoshard.rules.kernels import named_kernel
from autoshard.tracing.equations import (
    equations,
    gather_slice,
    new_variables,
    rebuild_jaxpr,
    rename_atoms,
    rename_equation,
    scatter_slice,
    stacked_type,
    variables,
    window,
    write_slice,
)
from autoshard.tracing.jaxprs import CALLS, callee, scan_counts
from autoshard.tracing.loops.updates import Update, updates_of
from autoshard.tracing.source_lines import is_jax_own
from search.memory.views import IN_PLACE

READS = ("dynamic_slice", "gather")
"""Primitives that read a part of their first operand, and can read it from the stack."""


def write_whole_stacks(closed: Any, places: Sequence[tuple[int, int]], lead: Sequence[int]) -> Any:
    """A closed jaxpr whose operands and results at `places` are stacks; an index per leading dimension follows all operands.

    **Arguments:**

    - `places`: pairs of an operand and a result of the same shape and type. A result that updates its operand is written
      at the point of each update; any other is written whole, at the end.
    - `lead`: the sizes of the leading dimensions of stacks, which slices do not have.
    """
    closed = _inline_calls(closed, places)
    jaxpr = closed.jaxpr
    index = new_variables([jax.ShapeDtypeStruct((), jnp.int32) for _ in lead])
    stacks = new_variables([stacked_type(jaxpr.invars[operand].aval, lead) for operand, _ in places])
    chains = [updates_of(jaxpr, jaxpr.outvars[result]) for _, result in places]
    updates: dict[Any, list[Update]] = {}
    for (operand, _), (first, chain) in zip(places, chains, strict=True):
        for each in chain if first is jaxpr.invars[operand] else ():
            updates.setdefault(each.eqn, []).append(each)
    rewriting = _Rewriting(jaxpr, index, lead)
    rewriting.stacks |= {jaxpr.invars[operand]: stack for (operand, _), stack in zip(places, stacks, strict=True)}
    rewriting.run(_delay_updates(jaxpr.eqns, updates), updates)
    results, invars = list(jaxpr.outvars), list(jaxpr.invars)
    for (operand, result), stack, (first, _) in zip(places, stacks, chains, strict=True):
        if first is jaxpr.invars[operand]:
            results[result] = rewriting.stacks[jaxpr.outvars[result]]
        else:
            results[result] = rewriting.write_whole(stack, jaxpr.outvars[result])
        invars[operand] = stack
    taken = {result for _, result in places}
    results = [v if k in taken else rewriting.value(v) for k, v in enumerate(results)]
    return jex.ClosedJaxpr(rebuild_jaxpr(jaxpr, [*invars, *index], results, rewriting.eqns), closed.consts)


class _Rewriting:
    """The rewritten equations so far; `stacks` maps each variable that is a slice to its stack."""

    def __init__(self, jaxpr: Any, index: Sequence[Any], lead: Sequence[int]) -> None:
        self.jaxpr, self.index, self.lead = jaxpr, index, lead
        self.stacks: dict[Any, Any] = {}
        self.slices: dict[Any, Any] = {}
        self.eqns: list[Any] = []
        self.source: Any = None

    def run(self, eqns: Sequence[Any], updates: dict[Any, list[Update]]) -> None:
        for at, eqn in enumerate(eqns):
            self.source = eqn.source_info
            if eqn in updates:
                self.write(eqn, updates[eqn], eqns[:at], eqns[at + 1 :])
            elif eqn.primitive.name in READS and eqn.invars[0] in self.stacks:
                self.read(eqn)
            else:
                self.eqns.append(eqn.replace(invars=[self.value(v) for v in eqn.invars]))

    def value(self, atom: Any) -> Any:
        """An operand outside any stack; a slice is read from its stack at its first use."""
        if isinstance(atom, jex.Literal) or atom not in self.stacks:
            return atom
        if atom not in self.slices:
            shape = atom.aval.shape
            (self.slices[atom],) = self.emit(lambda at, *index: window(index, shape)(at), [self.stacks[atom]])
        return self.slices[atom]

    def read(self, eqn: Any) -> None:
        """Reads a part of a slice from the stack."""
        n, others = len(self.lead), [self.value(v) for v in eqn.invars[1:]]

        def part(stack: Any, *rest: Any) -> Any:
            if eqn.primitive.name == "gather":
                return gather_slice(eqn, stack, rest[0], rest[1:])
            return window(rest[-n:], eqn.params["slice_sizes"], rest[:-n])(stack)

        self.emit(part, [self.stacks[eqn.invars[0]], *others], eqn.outvars)

    def write(self, eqn: Any, updates: Sequence[Update], before: Sequence[Any], after: Sequence[Any]) -> None:
        """Redirects an equation's writes from slices to their stacks."""
        if eqn.primitive.name in IN_PLACE:
            self.write_part(eqn, before, after)
            return
        for each in updates:
            if _reads(after, self.jaxpr.outvars, eqn.invars[each.operand]):
                self.value(eqn.invars[each.operand])
        places = [(each.operand, each.result) for each in updates]
        at = {operand: self.stacks[eqn.invars[operand]] for operand, _ in places}
        operands = [at[k] if k in at else self.value(v) for k, v in enumerate(eqn.invars)]
        written = REGIONS[eqn.primitive.name](eqn, operands, places, self.index, self.lead)
        self._put(written, {eqn.outvars[result]: written.outvars[result] for _, result in places})

    def _put(self, eqn: Any, stacks: dict[Any, Any]) -> None:
        self.eqns.append(eqn)
        self.stacks |= stacks

    def write_part(self, eqn: Any, before: Sequence[Any], after: Sequence[Any]) -> None:
        """Writes a part of a slice into the stack, after all reads of the old slice."""
        n, old = len(self.lead), eqn.invars[0]
        others = [self.value(v) for v in eqn.invars[1:]]
        at = 0 if eqn.primitive.name == "dynamic_update_slice" else 1  # position of the update in `others`
        if _reads(after, self.jaxpr.outvars, old):
            others[at], self.slices[old] = self.wait(others[at], [self.value(old)])
        elif (made := _smaller_results(before, old)) and not _depends(before, eqn.invars[1 + at], made):
            others[at] = self.wait(others[at], made)[0]

        def part(stack: Any, *rest: Any) -> Any:
            if eqn.primitive.name == "dynamic_update_slice":
                return write_slice(stack, rest[0], rest[-n:], rest[1:-n])
            return scatter_slice(eqn, stack, rest[0], rest[1], rest[2:])

        (self.stacks[eqn.outvars[0]],) = self.emit(part, [self.stacks[old], *others])

    def wait(self, atom: Any, made: Sequence[Any]) -> list[Any]:
        """An operand and other values, tied by an `optimization_barrier`."""
        return self.emit(lambda *arrays: lax.optimization_barrier(arrays[: 1 + len(made)]), [atom, *made])

    def write_whole(self, stack: Any, variable: Any) -> Any:
        """Writes a whole slice into the stack."""
        return self.emit(lambda at, update, *index: write_slice(at, update, index), [stack, self.value(variable)])[0]

    def emit(self, fn: Callable[..., Any], atoms: Sequence[Any], results: Sequence[Any] = ()) -> list[Any]:
        """Adds the equations of a function of these operands and the indices, and returns its results."""
        eqns, found = equations(fn, [*atoms, *self.index], self.source, results)
        self.eqns += eqns
        return found


# --- Loops and branches that update a slice


def _scan_on_stacks(eqn: Any, operands: Sequence[Any], places: Any, index: Sequence[Any], lead: Sequence[int]) -> Any:
    constants, carries = scan_counts(eqn.params)
    closed = write_whole_stacks(eqn.params["jaxpr"], places, lead)
    body, n = closed.jaxpr, len(index)
    invars = [*body.invars[:constants], *body.invars[-n:], *body.invars[constants:-n]]
    params = {
        **eqn.params,
        "jaxpr": jex.ClosedJaxpr(rebuild_jaxpr(body, invars, body.outvars, body.eqns), closed.consts),
        "num_consts": constants + n,
        "num_carry": carries,
    }
    operands = [*operands[:constants], *index, *operands[constants:]]
    return eqn.replace(invars=operands, outvars=_results(eqn, places, lead), params=params)


def _while_on_stacks(eqn: Any, operands: Sequence[Any], places: Any, index: Sequence[Any], lead: Sequence[int]) -> Any:
    params, n = eqn.params, len(index)
    tested, constants = params["cond_nconsts"], params["body_nconsts"]
    closed = write_whole_stacks(params["body_jaxpr"], [(operand - tested, result) for operand, result in places], lead)
    body, condition = closed.jaxpr, params["cond_jaxpr"].jaxpr
    invars = [*body.invars[:constants], *body.invars[-n:], *body.invars[constants:-n]]
    unread = list(condition.invars)
    for _, result in places:
        (unread[tested + result],) = new_variables([stacked_type(unread[tested + result].aval, lead)])
    test = rebuild_jaxpr(condition, unread, condition.outvars, condition.eqns)
    params = {
        **params,
        "body_jaxpr": jex.ClosedJaxpr(rebuild_jaxpr(body, invars, body.outvars, body.eqns), closed.consts),
        "cond_jaxpr": jex.ClosedJaxpr(test, params["cond_jaxpr"].consts),
        "body_nconsts": constants + n,
    }
    before = tested + constants
    operands = [*operands[:before], *index, *operands[before:]]
    return eqn.replace(invars=operands, outvars=_results(eqn, places, lead), params=params)


def _cond_on_stacks(eqn: Any, operands: Sequence[Any], places: Any, index: Sequence[Any], lead: Sequence[int]) -> Any:
    inside = [(operand - 1, result) for operand, result in places]
    branches = tuple(write_whole_stacks(each, inside, lead) for each in eqn.params["branches"])
    params = {**eqn.params, "branches": branches}
    return eqn.replace(invars=[*operands, *index], outvars=_results(eqn, places, lead), params=params)


REGIONS = {"scan": _scan_on_stacks, "while": _while_on_stacks, "cond": _cond_on_stacks}
"""Per primitive with regions, the function that rewrites its equation on stacks."""


def _results(eqn: Any, places: Sequence[tuple[int, int]], lead: Sequence[int]) -> list[Any]:
    found = list(eqn.outvars)
    for _, result in places:
        (found[result],) = new_variables([stacked_type(found[result].aval, lead)])
    return found


# --- Order: a write follows all reads of the old slice


def _delay_updates(eqns: Sequence[Any], updates: dict[Any, list[Update]]) -> list[Any]:
    """The equations with each update directly before the first use of its results, or at the end."""
    found: list[Any] = []
    for eqn in reversed(eqns):
        at = 0
        if eqn in updates:
            made = set(eqn.outvars)
            at = next((k for k, each in enumerate(found) if not made.isdisjoint(variables(each))), len(found))
        found.insert(at, eqn)
    return found


def _reads(eqns: Sequence[Any], results: Sequence[Any], variable: Any) -> bool:
    """Whether any equation or result is a use of a variable."""
    return any(variable in variables(eqn) for eqn in eqns) or any(variable is each for each in results)


def _smaller_results(eqns: Sequence[Any], variable: Any) -> list[Any]:
    """Values computed from a slice that are smaller than it: once they exist, the slice has been read."""
    of_it, found = {variable}, []
    for eqn in eqns:
        if not of_it.isdisjoint(variables(eqn)) and not (eqn.primitive.name in IN_PLACE and eqn.invars[0] in of_it):
            for var in eqn.outvars:
                if var.aval.size >= variable.aval.size:
                    of_it.add(var)
                elif not jnp.issubdtype(var.aval.dtype, jax.dtypes.extended):
                    found.append(var)
    return found


def _depends(eqns: Sequence[Any], variable: Any, sources: Sequence[Any]) -> bool:
    """Whether a variable depends on all of these."""
    missing, waiting = set(sources), set() if isinstance(variable, jex.Literal) else {variable}
    for eqn in reversed(eqns):
        if not waiting.isdisjoint(eqn.outvars):
            waiting |= variables(eqn)
    return missing <= waiting


# --- Inlined calls


def _inline_calls(closed: Any, places: Sequence[tuple[int, int]]) -> Any:
    """The jaxpr with the calls inlined that an update passes through, or that read a slice."""
    while True:
        jaxpr = closed.jaxpr
        slices, through = set(), set()
        for operand, result in places:
            first, chain = updates_of(jaxpr, jaxpr.outvars[result])
            slices.add(jaxpr.invars[operand])
            if first is jaxpr.invars[operand]:
                slices.update(each.eqn.outvars[each.result] for each in chain)
                through.update(each.eqn for each in chain)
        opened = next((eqn for eqn in jaxpr.eqns if _is_opened(eqn, slices, through)), None)
        if opened is None:
            return closed
        closed = _inline_call(closed, opened)


def _is_opened(eqn: Any, slices: set[Any], through: set[Any]) -> bool:
    if eqn in through:
        return eqn.primitive.name in CALLS
    reads = eqn.primitive.name in ("jit", "pjit") and not slices.isdisjoint(variables(eqn))
    return reads and named_kernel(eqn) is None  # a kernel reads all of the slice


def _inline_call(closed: Any, call: Any) -> Any:
    """The jaxpr with a call replaced by its equations."""
    jaxpr, (inner, arrays) = closed.jaxpr, callee(call)
    own = {v for eqn in inner.eqns for v in eqn.outvars}
    named: dict[Any, Any] = dict(zip(own, new_variables([v.aval for v in own]), strict=True))
    held = new_variables([v.aval for v in inner.constvars])
    named |= dict(zip((*inner.invars, *inner.constvars), (*call.invars, *held), strict=True))
    source = {"source_info": call.source_info} if is_jax_own(inner) else {}

    eqns: list[Any] = []
    after: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if eqn is call:
            eqns += [rename_equation(each, named).replace(**source) for each in inner.eqns]
            after = dict(zip(call.outvars, rename_atoms(inner.outvars, named), strict=True))
        else:
            eqns.append(rename_equation(eqn, after) if after else eqn)
    opened = rebuild_jaxpr(jaxpr, jaxpr.invars, rename_atoms(jaxpr.outvars, after), eqns)
    opened = opened.replace(constvars=[*jaxpr.constvars, *held])
    return jex.ClosedJaxpr(opened, (*closed.consts, *arrays))
