"""Rules of contractions, reductions and scans along a dimension."""

from __future__ import annotations

from dataclasses import replace

from autoshard.rules.rule import Factors, Rule, register


@register("dot_general")
def dot_general(inputs, outputs, *, dimension_numbers, **_):
    """`[b,i,k],[b,k,j] -> [b,i,j] sum={k}`, in whatever order the dimension numbers say."""
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
    lhs, rhs = inputs
    factors = Factors()
    left: dict[int, int] = {i: factors.new(lhs.shape[i]) for i in lhs_batch}
    right = {j: left[i] for i, j in zip(lhs_batch, rhs_batch, strict=True)}
    result = [left[i] for i in lhs_batch]
    for i in range(lhs.ndim):
        if i not in lhs_batch and i not in lhs_sum:
            left[i] = factors.new(lhs.shape[i])
            result.append(left[i])
    for j in range(rhs.ndim):
        if j not in rhs_batch and j not in rhs_sum:
            right[j] = factors.new(rhs.shape[j])
            result.append(right[j])
    for i, j in zip(lhs_sum, rhs_sum, strict=True):
        left[i] = right[j] = factors.new(lhs.shape[i], "sum")
    sides = tuple(tuple((found[i],) for i in range(len(found))) for found in (left, right))
    dims = tuple((i,) for i in result)
    return Rule(factors.done(), sides, (dims,), op_class="matmul", traffic=(0, 1, -1), flops_per_point=2.0)


def _reduce(inputs, outputs, axes, kind):
    """`[a,b] -> [a]`, `b` reduced; reductions of several operands share their factors."""
    factors = Factors()
    dims = tuple((factors.new(n, kind if i in axes else "parallel"),) for i, n in enumerate(inputs[0].shape))
    kept = tuple(dim for i, dim in enumerate(dims) if i not in axes)
    linear = (frozenset({0}),) if kind == "sum" else ()
    return Rule(factors.done(), (dims,) * len(inputs), (kept,) * len(outputs), linear)


@register("reduce_sum")
def reduce_sum(inputs, outputs, *, axes, **_):
    """A sum leaves a partial sum over the axes that split it."""
    return _reduce(inputs, outputs, axes, "sum")


@register("reduce_max")
def reduce_max(inputs, outputs, *, axes, **_):
    """A maximum over a split dimension: an all-reduce of that kind runs within the operation."""
    return _reduce(inputs, outputs, axes, "max")


@register("reduce_min")
def reduce_min(inputs, outputs, *, axes, **_):
    """A minimum, as `reduce_max`."""
    return _reduce(inputs, outputs, axes, "min")


@register("reduce_and")
def reduce_and(inputs, outputs, *, axes, **_):
    """A conjunction, as `reduce_max`; that of integers is bit by bit, for which there is no all-reduce."""
    return _reduce(inputs, outputs, axes, "and" if inputs[0].dtype == bool else "whole")


@register("reduce_or")
def reduce_or(inputs, outputs, *, axes, **_):
    """A disjunction, as `reduce_and`."""
    return _reduce(inputs, outputs, axes, "or" if inputs[0].dtype == bool else "whole")


@register("argmax", "argmin", "reduce_prod", "reduce_xor")
def reduce_whole(inputs, outputs, *, axes, **_):
    """Reductions whose dimension stays whole."""
    return _reduce(inputs, outputs, axes, "whole")


@register("reduce")
def reduce_by(inputs, outputs, *, dimensions, **_):
    """`[a,b],[] -> [a]`: a reduction by the user's function, from an initial value; the dimension stays whole."""
    count = len(outputs)
    rule = _reduce(inputs[:count], outputs, dimensions, "whole")
    return replace(rule, inputs=(*rule.inputs, *((),) * count))


def _cumulative(inputs, axis, linear=()):
    factors = Factors()
    dims = factors.each(inputs[0].shape, whole=[axis])
    return Rule(factors.done(), (dims,), (dims,), linear)


@register("cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(inputs, outputs, *, axis, **_):
    """Running reductions: the dimension they run along stays whole."""
    return _cumulative(inputs, axis)


@register("cumsum")
def cumsum(inputs, outputs, *, axis, **_):
    """A running sum is linear; the dimension it runs along stays whole."""
    return _cumulative(inputs, axis, (frozenset({0}),))


@register("sort")
def sort(inputs, outputs, *, dimension, **_):
    """The sorted dimension stays whole."""
    factors = Factors()
    dims = factors.each(inputs[0].shape, whole=[dimension])
    sides = (dims,) * len(inputs)
    return Rule(factors.done(), sides, sides, op_class="memory", traffic=(0, -1))


def _top(inputs, outputs, axis):
    factors = Factors()
    axis %= len(inputs[0].shape)
    dims = factors.each(inputs[0].shape, whole=[axis])
    chosen = (factors.new(outputs[0].shape[axis], "whole"),)
    kept = (*dims[:axis], chosen, *dims[axis + 1 :])
    return Rule(
        factors.done(), (dims,), (kept,) * len(outputs), op_class="memory", traffic=(0, -1), flops_per_point=0.0
    )


@register("top_k")
def top_k(inputs, outputs, *, axis=-1, **_):
    """The searched dimension stays whole; the others pass."""
    return _top(inputs, outputs, axis)


@register("approx_top_k")
def approx_top_k(inputs, outputs, *, reduction_dimension, **_):
    """As `top_k`."""
    return _top(inputs, outputs, reduction_dimension)
