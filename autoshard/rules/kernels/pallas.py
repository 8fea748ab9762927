"""The rule of a `pallas_call`: batch-like dimensions derived from its grid, and the kernel on one chip's shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from autoshard._util.tables import size
from autoshard.rules.kernels.body import count_flops, has_matmul, is_unused
from autoshard.rules.kernels.grids import Axes, Grid, read_grid, refusal, steps_of
from autoshard.rules.rule import Dims, Factors, Pieces, Rule, whole_rule
from costmodels.program.program import Output


def kernel_rule(eqn: Any) -> Rule:
    """The rule of a `pallas_call` equation.

    Each independent grid dimension is a factor, and the blocks' own dimensions stay whole: `[ab,c],[d,c] -> [ab,d]` for steps
    `a` over blocks of `b` rows. If no grid dimension is independent, all arrays stay whole, and the rule says why.
    """
    inputs, outputs = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
    unused = [is_unused(v) for v in eqn.outvars]
    flops = _flops(eqn.params)
    reason, grid = refusal(eqn.params), None
    try:
        grid = None if reason else read_grid(eqn.params, unused)
    except (AttributeError, KeyError):  # its private form, which this module reads, may change
        reason = f"JAX {jax.__version__} describes its grid in another way than JAX 0.10"
    if grid is None or not grid.splittable:
        reason = reason or _list_reasons(grid)
        return dataclasses.replace(whole_rule(inputs, outputs), reason=_describe(flops, (*inputs, *outputs), reason))
    factors = Factors()
    split = {g: _factors_of_steps(factors, grid, g, eqn.params["grid_mapping"].grid[g]) for g in grid.splittable}
    dims = [
        _dims(factors, aval.shape, axes, split) for aval, axes in zip((*inputs, *outputs), grid.arrays, strict=True)
    ]
    made = factors.done()
    traffic = (*_arrays(eqn), *(Output(k) for k, idle in enumerate(unused) if not idle))
    return Rule(
        made,
        tuple(dims[: len(inputs)]),
        tuple(dims[len(inputs) :]),
        op_class="matmul" if has_matmul(eqn.params["jaxpr"]) else "memory",
        traffic=traffic,
        flops_per_point=flops / prod(each.size for each in made),
        local=partial(_run_pieces, split),
    )


def _factors_of_steps(factors: Factors, grid: Grid, dimension: int, size: int) -> tuple[int, ...]:
    """The factors of the steps of a grid dimension: the groups of steps that share blocks, and the steps of a group."""
    divisor = grid.splittable[dimension]
    if divisor == 1:
        return (factors.new(size),)
    return factors.new(size // divisor), factors.new(divisor, "whole" if dimension in grid.in_groups else "parallel")


def _arrays(eqn: Any) -> range:
    """The positions of the operands that are arrays in HBM: those after the sizes of the grid and the tables."""
    mapping = eqn.params["grid_mapping"]
    return range(mapping.num_dynamic_grid_bounds + mapping.num_index_operands, len(eqn.invars))


def _dims(factors: Factors, shape: Sequence[int], axes: Axes, split: Mapping[int, tuple[int, ...]]) -> Dims:
    dims = []
    for n, axis in zip(shape, axes, strict=True):
        if axis is None:
            dims.append((factors.new(n, "whole"),))
            continue
        steps = split[axis.grid] if axis.divisor == 1 else split[axis.grid][:1]
        dims.append(steps if axis.block == 1 else (*steps, factors.new(axis.block, "whole")))
    return tuple(dims)


def _flops(params: Mapping[str, Any]) -> float:
    """The FLOPs of a kernel: its author's estimate, or those of its body times the steps of its grid."""
    estimate = params.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    return count_flops(params["jaxpr"]) * steps_of(params["grid_mapping"])


def _describe(flops: float, arrays: Sequence[Any], why: str) -> str:
    """The cost of a replicated kernel on every chip, and the reason why it is replicated."""
    moved = sum(aval.size * aval.dtype.itemsize for aval in arrays)
    work = f"{flops:.2e} FLOPs and " if flops else ""
    return f"every chip computes all of it, {work}{size(moved)} of HBM traffic, because {why}"


def _list_reasons(grid: Grid | None) -> str:
    if grid is None or not grid.kept:
        return "its grid has one step"
    return "; ".join(f"grid dimension {g} is not split because {why}" for g, why in grid.kept.items())


# --- the kernel on one chip's shards


def _run_pieces(
    split: Mapping[int, tuple[int, ...]], eqn: Any, rule: Rule, pieces: Pieces, *operands: Any
) -> Sequence[Any]:
    """The same kernel on shards, with a smaller grid."""
    params, mapping = eqn.params, eqn.params["grid_mapping"]
    steps = tuple(prod(map(pieces.size, split[g])) if g in split else n for g, n in enumerate(mapping.grid))
    first = mapping.num_dynamic_grid_bounds + mapping.num_index_operands
    shapes = [tuple(prod(map(pieces.size, dim)) for dim in dims) for dims in (*rule.inputs[first:], *rule.outputs)]
    # Where groups of steps share a block, steps of a group are split only if each chip has one group: its step // divisor is 0.
    blocks = [
        block.replace(array_aval=block.array_aval.update(shape=shape))
        for block, shape in zip(mapping.block_mappings, shapes, strict=True)
    ]
    share = prod(steps[g] / mapping.grid[g] for g in split)
    changed = {
        "grid_mapping": mapping.replace(grid=steps, block_mappings=tuple(blocks)),
        "out_avals": tuple(
            aval.update(shape=shape)
            for aval, shape in zip(params["out_avals"], shapes[mapping.num_inputs :], strict=True)
        ),
        "cost_estimate": _scaled(params["cost_estimate"], share),
    }
    lead = mapping.num_dynamic_grid_bounds
    tables = [_fill(table, v.aval.shape) for table, v in zip(operands[lead:first], eqn.invars[lead:first], strict=True)]
    return eqn.primitive.bind(*operands[:lead], *tables, *operands[first:], **{**params, **changed})


def _fill(table: Any, shape: Sequence[int]) -> Any:
    """A shard of a table, filled with zeros to the shape that the kernel was traced with: its steps end before them."""
    if jnp.shape(table) == tuple(shape):
        return table
    return jnp.pad(table, [(0, n - own) for own, n in zip(table.shape, shape, strict=True)])


def _scaled(estimate: Any, share: float) -> Any:
    if estimate is None:
        return None
    numbers = {each.name: int(getattr(estimate, each.name) * share) for each in dataclasses.fields(estimate)}
    return dataclasses.replace(estimate, **numbers)
