"""Rules of elementwise primitives."""

from __future__ import annotations

from autoshard.rules.rule import Factors, Rule, inexact, register

NONLINEAR = """
abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz cos cosh digamma eq eq_to erf
erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow is_finite le le_to lgamma log log1p log2
logistic lt lt_to max min mulhi ne nextafter not one_minus_square or polygamma population_count pow
regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
tan tanh xor zeta
""".split()
LINEAR = "conj copy imag name neg real reduce_precision stop_gradient".split()
MARKERS = """
autoshard_pin device_put layout_constraint pvary reshard shard_map_layout sharding_constraint with_memory_space_constraint
""".split()


def pointwise(inputs, outputs, linear=(), **fields) -> Rule:
    """`[a,b],[a,1] -> [a,b]`; dimensions of size 1 are broadcast, scalars have none."""
    factors = Factors()
    shape = outputs[0].shape
    dims = factors.each(shape)
    sides = tuple(
        tuple(dim if n == m else () for dim, n, m in zip(dims, aval.shape, shape, strict=True)) if aval.shape else ()
        for aval in inputs
    )
    return Rule(factors.done(), sides, (dims,) * len(outputs), linear, **fields)


@register(*NONLINEAR)
def nonlinear(inputs, outputs, **_):
    """Any elementwise function: partial sums may not pass."""
    return pointwise(inputs, outputs)


@register(*LINEAR)
def linear(inputs, outputs, **_):
    """$f(a + b) = f(a) + f(b)$: a partial sum passes."""
    return pointwise(inputs, outputs, (frozenset({0}),))


@register(*MARKERS)
def marker(inputs, outputs, **_):
    """A placement marker: an identity, since the plan decides the placement."""
    if len(inputs) > 1:  # one device_put of several arrays
        return _several(inputs)
    linear = (frozenset({0}),)
    return pointwise(inputs, outputs, linear, flops_per_point=0.0, local=_local_marker)


def _several(arrays) -> Rule:
    factors = Factors()
    sides = tuple(factors.each(aval.shape) for aval in arrays)
    return Rule(factors.done(), sides, sides, flops_per_point=0.0, local=_local_marker)


def _local_marker(eqn, rule: Rule, pieces, *operands):
    return list(operands)


@register("convert_element_type")
def convert(inputs, outputs, **_):
    """A cast between floating types is linear up to rounding; any other is not."""
    floating = all(inexact(aval) for aval in (*inputs, *outputs))
    return linear(inputs, outputs) if floating else nonlinear(inputs, outputs)


@register("bitcast_convert_type")
def bitcast(inputs, outputs, **_):
    """`[a] -> [a]`, or `[a] -> [a,b]` and back if the elements' widths differ."""
    if inputs[0].ndim == outputs[0].ndim:
        return nonlinear(inputs, outputs)
    factors = Factors()
    longer = max(inputs[0].shape, outputs[0].shape, key=len)
    dims = factors.each(longer, whole=[len(longer) - 1])
    sides = [dims if aval.ndim == len(longer) else dims[:-1] for aval in (inputs[0], outputs[0])]
    return Rule(factors.done(), (sides[0],), (sides[1],), flops_per_point=0.0)


@register("add", "add_any", "sub", "complex")
def add(inputs, outputs, **_):
    """A sum of two partial sums is a partial sum; both must be partial."""
    return pointwise(inputs, outputs, (frozenset({0, 1}),))


@register("mul")
def mul(inputs, outputs, **_):
    """A product is linear in either operand."""
    return pointwise(inputs, outputs, (frozenset({0}), frozenset({1})))


@register("div")
def div(inputs, outputs, **_):
    """A quotient is linear in its numerator, except for integers, which are rounded."""
    return pointwise(inputs, outputs, (frozenset({0}),) if inexact(outputs[0]) else ())


@register("select_n")
def select(inputs, outputs, **_):
    """A choice among cases is linear in all of them together."""
    return pointwise(inputs, outputs, (frozenset(range(1, len(inputs))),))
