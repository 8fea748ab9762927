"""Rules of convolutions and of reductions over sliding windows."""

from __future__ import annotations

from math import prod

from autoshard.rules.rule import Dims, Factors, Pieces, Rule, register
from costmodels.program.program import Output


def _local_convolution(eqn, rule: Rule, pieces: Pieces, image, kernel):
    names = ("feature_group_count", "batch_group_count")
    counts = {name: pieces.size(group) for group, name in enumerate(names)}
    return [eqn.primitive.bind(image, kernel, **{**eqn.params, **counts})]


@register("conv_general_dilated")
def convolution(inputs, outputs, *, dimension_numbers, feature_group_count, batch_group_count, **_):
    """`[n,ai,h],[ao,i,k] -> [n,ao,j] sum={i}`: batch, features and feature groups may be split; spatial dimensions may not.

    With `batch_group_count`, batch groups replace feature groups: `[bn,i,h],[bo,i,k] -> [n,bo,j]`.
    """
    image, kernel = inputs
    of_image, of_kernel, of_result = dimension_numbers.lhs_spec, dimension_numbers.rhs_spec, dimension_numbers.out_spec
    factors = Factors()
    features, batches = factors.new(feature_group_count), factors.new(batch_group_count)
    batch = factors.new(image.shape[of_image[0]] // batch_group_count)
    summed = factors.new(kernel.shape[of_kernel[1]], "sum")
    made = factors.new(kernel.shape[of_kernel[0]] // (feature_group_count * batch_group_count))
    result = [(batch,), (features, batches, made)]
    space = [
        [(factors.new(aval.shape[i], "whole"),) for i in spec[2:]]
        for aval, spec in zip((image, kernel, outputs[0]), (of_image, of_kernel, of_result), strict=True)
    ]
    sides = (
        _in_array_order(of_image, [(batches, batch), (features, summed), *space[0]]),
        _in_array_order(of_kernel, [(features, batches, made), (summed,), *space[1]]),
    )
    return Rule(
        factors.done(),
        sides,
        (_in_array_order(of_result, [*result, *space[2]]),),
        op_class="matmul",
        traffic=(0, 1, Output()),
        flops_per_point=2.0 / max(1, prod(image.shape[i] for i in of_image[2:])),  # the image is not a loop of its own
        local=_local_convolution,
    )


def _in_array_order(spec, dims) -> Dims:
    """Dimensions given as batch, feature, space, in the order of the array."""
    return tuple(dim for _, dim in sorted(zip(spec, dims, strict=True)))


def _windows(whole, part, *shifted) -> tuple[Factors, Dims, Dims]:
    """Dimensions of an array and of one element per window; dimensions with windows of size 1 are shared."""
    factors = Factors()
    left, right = [], []
    for i, (n, m) in enumerate(zip(whole.shape, part.shape, strict=True)):
        crossed = any(values[i] != still for values, still in shifted)
        left.append((factors.new(n, "whole" if crossed else "parallel"),))
        right.append((factors.new(m, "whole"),) if crossed else left[-1])
    return factors, tuple(left), tuple(right)


def _window_rule(inputs, outputs, params, linear=()):
    """`[a,b] -> [a,c]`, the same for every operand; initial values, which are scalars, follow the operands."""
    shifted = (
        (params["window_dimensions"], 1),
        (params["window_strides"], 1),
        (params["padding"], (0, 0)),
        (params["base_dilation"], 1),
        (params["window_dilation"], 1),
    )
    factors, before, after = _windows(inputs[0], outputs[0], *shifted)
    sides = tuple(before if aval.shape else () for aval in inputs)
    return Rule(
        factors.done(),
        sides,
        (after,) * len(outputs),
        linear,
        flops_per_point=_work(before, after, params["window_dimensions"], inputs[0]),
    )


def _work(full: Dims, windowed: Dims, window, whole) -> float:
    """The operations per point of the factors: a window has its own elements, not all of the array's."""
    crossed = [n for n, dim, other in zip(whole.shape, full, windowed, strict=True) if dim != other]
    return prod(window) / max(1, prod(crossed))


@register("reduce_window", "reduce_window_max", "reduce_window_min", "select_and_gather_add")
def reduce_window(inputs, outputs, **params):
    """`[a,b] -> [a,c]`: dimensions along which windows slide stay whole."""
    return _window_rule(inputs, outputs, params)


@register("reduce_window_sum")
def reduce_window_sum(inputs, outputs, **params):
    """As `reduce_window`, and linear."""
    return _window_rule(inputs, outputs, params, (frozenset({0}),))


@register("select_and_scatter_add")
def select_and_scatter_add(inputs, outputs, *, window_dimensions, window_strides, padding, **_):
    """`[a,c],[a,b] -> [a,b]`: each element of the first operand is added at its window's maximum."""
    shifted = ((window_dimensions, 1), (window_strides, 1), (padding, (0, 0)))
    factors, full, picked = _windows(outputs[0], inputs[0], *shifted)
    work = _work(full, picked, window_dimensions, outputs[0])
    return Rule(factors.done(), (picked, full), (full,), (frozenset({0}),), flops_per_point=work)
