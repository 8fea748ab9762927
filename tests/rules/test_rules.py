"""One line of text per primitive, its einsum, and the law that no strategy changes what the primitive computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autoshard.rules.rule import REGISTRY
from search.answer.assignment import Choice
from tests.support.effort import tries
from tests.support.layout_strategies import (
    assert_equal,
    cpu_topology,
    problem_of,
    random_choice,
    run_planned,
    traced_on,
)
from tests.support.rules.decompositions import DEFINED
from tests.support.rules.examples import EXAMPLES, Example, draw

TABLE = """
abs                          [a,b] -> [a,b]
acos                         [a,b] -> [a,b]
acosh                        [a,b] -> [a,b]
add                          [a,b],[a,b] -> [a,b] linear=[[0, 1]]
add_any                      [a,b],[a,b] -> [a,b] linear=[[0, 1]]
and                          [a,b],[a,b] -> [a,b]
approx_top_k                 [a,b] -> [c,b],[c,b] whole={a,c}
argmax                       [a,b] -> [a] whole={b}
argmin                       [a,b] -> [a] whole={b}
asin                         [a,b] -> [a,b]
asinh                        [a,b] -> [a,b]
atan                         [a,b] -> [a,b]
atan2                        [a,b],[a,b] -> [a,b]
atanh                        [a,b] -> [a,b]
autoshard_pin                [a,b] -> [a,b] linear=[[0]]
bessel_i0e                   [a,b] -> [a,b]
bessel_i1e                   [a,b] -> [a,b]
bitcast_convert_type         [a,b] -> [a,b]
bitcast_convert_type         [a,b] -> [a,b,c] whole={c}
bitcast_convert_type         [a,b] -> [a] whole={b}
broadcast_in_dim             [a,b] -> [a,c,b] linear=[[0]]
broadcast_in_dim             [1,a] -> [b,a] linear=[[0]]
broadcast_in_dim             [] -> [a,b] linear=[[0]]
cbrt                         [a,b] -> [a,b]
ceil                         [a,b] -> [a,b]
cholesky                     [a,b,c] -> [a,d,e] whole={b,c,d,e}
clamp                        [],[a,b],[] -> [a,b]
clamp                        [a,b],[a,b],[a,b] -> [a,b]
clz                          [a,b] -> [a,b]
complex                      [a,b],[a,b] -> [a,b] linear=[[0, 1]]
concatenate                  [a,b],[a,c] -> [a,d] whole={b,c,d} linear=[[0, 1]]
concatenate                  [a,b],[a,b] -> [a,bc] exchanged={b} whole={c} linear=[[0, 1]]
conj                         [a,b] -> [a,b] linear=[[0]]
conv_general_dilated         [ab,cd,e,f],[cag,d,h,i] -> [b,cag,j,k] sum={d} whole={e,f,h,i,j,k}
conv_general_dilated         [ab,cd,e],[caf,d,g] -> [b,caf,h] sum={d} whole={e,g,h}
conv_general_dilated         [ab,c,de],[b,f,adg] -> [adg,h,e] sum={b} whole={c,f,h}
convert_element_type         [a,b] -> [a,b] linear=[[0]]
convert_element_type         [a,b] -> [a,b]
copy                         [a,b] -> [a,b] linear=[[0]]
cos                          [a,b] -> [a,b]
cosh                         [a,b] -> [a,b]
cumlogsumexp                 [a,b] -> [a,b] gathered={b}
cummax                       [a,b] -> [a,b] gathered={b}
cummin                       [a,b] -> [a,b] gathered={b}
cumprod                      [a,b] -> [a,b] gathered={b}
cumsum                       [a,b] -> [a,b] gathered={b} linear=[[0]]
device_put                   [a,b] -> [a,b] linear=[[0]]
device_put                   [a,b],[c] -> [a,b],[c]
digamma                      [a,b] -> [a,b]
div                          [a,b],[a,b] -> [a,b] linear=[[0]]
div                          [a,b],[a,b] -> [a,b]
dot_general                  [a,b],[b,c] -> [a,c] sum={b}
dot_general                  [a,b,c,d],[a,e,b,d] -> [a,b,c,e] sum={d}
dot_general                  [a,b,c],[c,d,b] -> [a,d] sum={b,c}
dot_general                  [a,b],[b,c] -> [a,c] sum={b}
dynamic_slice                [a,b,c],[],[],[] -> [a,d,1] sum={b,c} whole={d} linear=[[0]]
dynamic_slice                [a,b,c],[],[],[] -> [d,e,1] sum={b,c} whole={a,d,e} linear=[[0]]
dynamic_slice                [a,b],[],[] -> [a,1] or={b} linear=[[0]]
dynamic_update_slice         [a,b,c],[a,d,1],[],[],[] -> [a,b,c] whole={d} linear=[[0, 1]]
dynamic_update_slice         [a,b,c],[d,e,1],[],[],[] -> [a,b,c] whole={d,e} linear=[[0, 1]]
eig                          [a,b,c] -> [a,d],[a,e,f],[a,g,h] whole={b,c,d,e,f,g,h}
eigh                         [a,b,c] -> [a,d,e],[a,f] whole={b,c,d,e,f}
empty                         -> [a,b]
empty2                        -> [a,b]
eq                           [a,b],[a,b] -> [a,b]
eq_to                        [a,b],[a,b] -> [a,b]
erf                          [a,b] -> [a,b]
erf_inv                      [a,b] -> [a,b]
erfc                         [a,b] -> [a,b]
exp                          [a,b] -> [a,b]
exp2                         [a,b] -> [a,b]
expm1                        [a,b] -> [a,b]
fft                          [a,b] -> [a,c] whole={b,c} linear=[[0]]
fft                          [a,b,c] -> [a,d,e] whole={b,c,d,e} linear=[[0]]
floor                        [a,b] -> [a,b]
gather                       [a,b],[c,d] -> [c,b] sum={a} whole={d}
gather                       [a,b],[c,d] -> [c,b] sum={a} whole={d} linear=[[0]]
gather                       [a,b],[c,d,e] -> [c,d,b] sum={a} whole={e} linear=[[0]]
gather                       [a,b],[c,d] -> [c,b] sum={a} whole={d}
gather                       [a,b],[c,d] -> [c,b] or={a} whole={d}
gather                       [a,b,c],[d,e] -> [d,b] sum={a,c} whole={e}
gather                       [a,b],[a,c,d] -> [a,c] sum={b} whole={d}
gather                       [a,b],[c,d] -> [c,b] sum={a} whole={d}
gather                       [a,b,c],[d,e] -> [d,a,f] sum={b} whole={c,e,f}
ge                           [a,b],[a,b] -> [a,b]
gt                           [a,b],[a,b] -> [a,b]
hessenberg                   [a,b,c] -> [a,d,e],[a,f] whole={b,c,d,e,f}
householder_product          [a,b,c],[a,d] -> [a,e,f] whole={b,c,d,e,f}
igamma                       [a,b],[a,b] -> [a,b]
igamma_grad_a                [a,b],[a,b] -> [a,b]
igammac                      [a,b],[a,b] -> [a,b]
imag                         [a,b] -> [a,b] linear=[[0]]
integer_pow                  [a,b] -> [a,b]
iota                          -> [a,b]
iota                          -> [a,b]
is_finite                    [a,b] -> [a,b]
layout_constraint            [a,b] -> [a,b] linear=[[0]]
le                           [a,b],[a,b] -> [a,b]
le_to                        [a,b],[a,b] -> [a,b]
lgamma                       [a,b] -> [a,b]
log                          [a,b] -> [a,b]
log1p                        [a,b] -> [a,b]
log2                         [a,b] -> [a,b]
logistic                     [a,b] -> [a,b]
lt                           [a,b],[a,b] -> [a,b]
lt_to                        [a,b],[a,b] -> [a,b]
lu                           [a,b,c] -> [a,d,e],[a,f],[a,g] whole={b,c,d,e,f,g}
lu_pivots_to_permutation     [a,b] -> [a,c] whole={b,c}
max                          [a,b],[a,b] -> [a,b]
min                          [a,b],[a,b] -> [a,b]
mul                          [a,b],[a,b] -> [a,b] linear=[[0], [1]]
mul                          [a,b],[1,b] -> [a,b] linear=[[0], [1]]
mulhi                        [a,b],[a,b] -> [a,b]
name                         [a,b] -> [a,b] linear=[[0]]
ne                           [a,b],[a,b] -> [a,b]
neg                          [a,b] -> [a,b] linear=[[0]]
nextafter                    [a,b],[a,b] -> [a,b]
not                          [a,b] -> [a,b]
one_minus_square             [a,b] -> [a,b]
or                           [a,b],[a,b] -> [a,b]
pad                          [a,b],[] -> [a,c] whole={b,c}
pad                          [a,b],[] -> [a,b] whole={a}
platform_index                -> []
polygamma                    [a,b],[a,b] -> [a,b]
population_count             [a,b] -> [a,b]
pow                          [a,b],[a,b] -> [a,b]
pvary                        [a,b] -> [a,b] linear=[[0]]
qr                           [a,b,c] -> [a,d,e],[a,f,g] whole={b,c,d,e,f,g}
ragged_chain                 [a,b],[c,b,d],[c,d,e],[f] -> [a,e] sum={c,d} whole={b,e,f}
ragged_chain                 [a,b],[c,1],[d,b,e],[d,e,f],[g] -> [a,f] dispatched={a} sum={c,d,e} whole={b,f,g}
ragged_chain                 [a,b],[c,1],[d,b,e],[d,e,f],[c,1],[g] -> [h,f] sum={c,d,e} whole={a,b,f,g,h}
ragged_dot_general           [a,b],[c,b,d],[e] -> [a,d] sum={b,c} whole={e} linear=[[0], [1]]
ragged_dot_general           [a,b,c],[a,d,c,e],[a,f] -> [a,b,e] sum={c} whole={d,f} linear=[[0], [1]]
ragged_dot_general           [a,b],[a,c],[d] -> [e,b,c] sum={a} whole={d} linear=[[0], [1]]
random_bits                  [] -> [a,b]
random_bits                  [a] -> [b,c,d] whole={a}
random_bits                  [] -> [a,b] whole={a,b}
random_clone                 [] -> []
random_fold_in               [a],[b] -> [c] whole={a,b,c}
random_gamma                 [],[a] -> [b] whole={a,b}
random_seed                  [] -> []
random_split                 [] -> [a] whole={a}
random_unwrap                [a] -> [b,c] whole={a,b,c}
random_wrap                  [a,b] -> [c] whole={a,b,c}
real                         [a,b] -> [a,b] linear=[[0]]
reduce                       [a,b],[] -> [a] whole={b}
reduce_and                   [a,b] -> [] and={a,b}
reduce_and                   [a,b] -> [b] gathered={a}
reduce_max                   [a,b,c] -> [a,c] max={b}
reduce_max                   [a,b] -> [b] max={a}
reduce_min                   [a,b,c] -> [a,c] min={b}
reduce_or                    [a,b] -> [] or={a,b}
reduce_or                    [a,b] -> [b] gathered={a}
reduce_precision             [a,b] -> [a,b] linear=[[0]]
reduce_prod                  [a,b,c] -> [a,c] gathered={b}
reduce_sum                   [a,b,c] -> [a,c] sum={b} linear=[[0]]
reduce_sum                   [a,b] -> [b] sum={a} linear=[[0]]
reduce_window                [a,b],[] -> [a,c] whole={b,c}
reduce_window_max            [a,b] -> [a,c] whole={b,c}
reduce_window_min            [a,b] -> [c,b] whole={a,c}
reduce_window_sum            [a,b] -> [a,c] whole={b,c} linear=[[0]]
reduce_xor                   [a,b] -> [b] gathered={a}
regularized_incomplete_beta  [a,b],[a,b],[a,b] -> [a,b]
rem                          [a,b],[a,b] -> [a,b]
reshape                      [a,b,c] -> [a,bc] linear=[[0]]
reshape                      [ab,cd] -> [a,b,c,1,d] linear=[[0]]
reshape                      [ab,c] -> [ad,e] whole={b,c,d,e} linear=[[0]]
reshape                      [a,b,c,d,1] -> [1,abc,d] linear=[[0]]
reshape                      [a,b] -> [c,d] whole={a,b,c,d} linear=[[0]]
reshard                      [a,b] -> [a,b] linear=[[0]]
rev                          [a,b] -> [a,b] whole={b} linear=[[0]]
rng_bit_generator            [a] -> [b],[c,d] whole={a,b,c,d}
round                        [a,b] -> [a,b]
rsqrt                        [a,b] -> [a,b]
scatter                      [a,b],[c,d],[c,b] -> [a,b] whole={c,d}
scatter                      [a,b],[c],[b] -> [a,b] whole={c}
scatter                      [a,b,c],[d,e],[d,c] -> [a,b,c] whole={d,e}
scatter                      [a,b],[c,d],[c,b] -> [a,b] whole={c,d}
scatter-add                  [a,b],[c,d],[c,b] -> [a,b] sum={c} whole={d} linear=[[0, 2]]
scatter-add                  [a,b],[c],[b] -> [a,b] whole={c} linear=[[0, 2]]
scatter-add                  [a,b],[c,d],[c,b] -> [a,b] sum={c} whole={d} linear=[[0, 2]]
scatter-add                  [a,b],[a,c,d],[a,c] -> [a,b] sum={c} whole={d} linear=[[0, 2]]
scatter-add                  [a,b,c],[d,e,f],[d,e,a] -> [a,b,c] sum={d,e} whole={f} linear=[[0, 2]]
scatter-max                  [a,b],[c,d],[c,b] -> [a,b] whole={c,d}
scatter-max                  [a,b],[c],[b] -> [a,b] whole={c}
scatter-min                  [a,b],[c,d],[c,b] -> [a,b] whole={c,d}
scatter-mul                  [a,b],[c,d],[c,b] -> [a,b] whole={c,d}
scatter-mul                  [a,b],[c],[b] -> [a,b] whole={c}
scatter-sub                  [a,b],[c,d],[c,b] -> [a,b] sum={c} whole={d} linear=[[0, 2]]
schur                        [a,b,c] -> [a,d,e],[a,f,g] whole={b,c,d,e,f,g}
select_and_gather_add        [a,b],[a,b] -> [a,c] whole={b,c}
select_and_scatter_add       [a,b],[a,c] -> [a,c] whole={b,c} linear=[[0]]
select_n                     [a,b],[a,b],[a,b] -> [a,b] linear=[[1, 2]]
select_n                     [],[a,b],[a,b] -> [a,b] linear=[[1, 2]]
shard_map_layout             [a,b] -> [a,b] linear=[[0]]
sharding_constraint          [a,b] -> [a,b] linear=[[0]]
shift_left                   [a,b],[a,b] -> [a,b]
shift_right_arithmetic       [a,b],[a,b] -> [a,b]
shift_right_logical          [a,b],[a,b] -> [a,b]
sign                         [a,b] -> [a,b]
sin                          [a,b] -> [a,b]
sinh                         [a,b] -> [a,b]
slice                        [a,b,c] -> [a,d,1] sum={b,c} whole={d} linear=[[0]]
slice                        [a,b,c] -> [a,d,1] sum={b,c} whole={d} linear=[[0]]
slice                        [a,b] -> [a,1] or={b} linear=[[0]]
sort                         [a,b] -> [a,b] whole={b}
sort                         [a,b],[a,b] -> [a,b],[a,b] whole={a}
split                        [a,b] -> [a,c],[a,d] whole={b,c,d} linear=[[0]]
split                        [a,bc] -> [a,b],[a,b],[a,b] exchanged={b} whole={c} linear=[[0]]
sqrt                         [a,b] -> [a,b]
square                       [a,b] -> [a,b]
squeeze                      [a,1,b] -> [a,b] linear=[[0]]
stack                        [a,b],[a,b] -> [a,c,b] whole={c} linear=[[0, 1]]
stop_gradient                [a,b] -> [a,b] linear=[[0]]
sub                          [a,b],[a,b] -> [a,b] linear=[[0, 1]]
svd                          [a,b,c] -> [a,d],[a,e,f],[a,g,h] whole={b,c,d,e,f,g,h}
tan                          [a,b] -> [a,b]
tanh                         [a,b] -> [a,b]
threefry2x32                 [a],[a],[a],[a] -> [a],[a]
tile                         [a,b] -> [ca,db] linear=[[0]]
top_k                        [a,b] -> [a,c],[a,c] gathered={b} whole={c}
transpose                    [a,b,c] -> [c,a,b] linear=[[0]]
triangular_solve             [a,b,c],[a,d,e] -> [a,f,e] whole={b,c,d,f} linear=[[1]]
triangular_solve             [a,b,c],[a,d,e] -> [a,d,f] whole={b,c,e,f} linear=[[1]]
tridiagonal                  [a,b,c] -> [a,d,e],[a,f],[a,g],[a,h] whole={b,c,d,e,f,g,h}
tridiagonal_solve            [a,b],[a,c],[a,d],[a,e,f] -> [a,g,f] whole={b,c,d,e,g} linear=[[3]]
unstack                      [a,b] -> [b],[b] whole={a} linear=[[0]]
with_memory_space_constraint [a,b] -> [a,b] linear=[[0]]
xor                          [a,b],[a,b] -> [a,b]
zeta                         [a,b],[a,b] -> [a,b]
"""

CALLED = [pytest.param(example, id=f"{example.primitive}-{i}") for i, example in enumerate(EXAMPLES) if example.fn]
FIRST = {each.text(): each for each in reversed(EXAMPLES) if each.fn}
"""The first example of each einsum."""
FEW = [
    pytest.param(
        example, id=f"{example.primitive}-{i}", marks=[] if FIRST[example.text()] is example else [pytest.mark.slow]
    )
    for i, example in enumerate(EXAMPLES)
    if example.fn
]


def test_table() -> None:
    lines = [f"{example.primitive:29}{example.text()}" for example in EXAMPLES]
    assert "\n".join(lines) == TABLE.strip()


def test_every_rule_is_in_the_table() -> None:
    assert {example.primitive for example in EXAMPLES} == {name for name in REGISTRY if not name.startswith("rule:")}


@pytest.mark.parametrize("example", FEW)
def test_no_strategy_changes_the_result(example: Example) -> None:
    Law(example, "2x2x2").check(tries(4, least=2))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["2x2x2", "4x2"])
@pytest.mark.parametrize("example", CALLED)
def test_no_strategy_of_all_changes_the_result(example: Example, shape: str) -> None:
    Law(example, shape).check(None)


class Law:
    """A primitive under its strategies, with random layouts around it, computes what it computes on one chip."""

    def __init__(self, example: Example, shape: str) -> None:
        assert example.fn is not None
        linear = example.step(example.fn, *example.args).rule.linear
        self.rng = np.random.default_rng(0)
        self.defined = DEFINED.get(example.primitive)
        self.fn, specs = summed_before(example.fn, example.args) if linear else (example.fn, example.args)
        self.args = [draw(spec, self.rng) for spec in specs]
        self.topology = cpu_topology(shape)
        self.traced = traced_on(self.topology, self.fn, *self.args)
        self.problem = problem_of(self.traced, self.topology)
        step = example.step(self.fn, *self.args)
        self.node = self.problem.of_operation[step.operation]

    def check(self, count: int | None) -> None:
        """Runs up to `count` strategies that differ in what they split, or all of them."""
        strategies = self.problem.nodes[self.node].states
        order = [int(i) for i in self.rng.permutation(len(strategies))]
        chosen = order if count is None else self._different(order, count)
        choices = [choice for i in chosen if (choice := self._choice(i)) is not None]
        assert choices, "no strategy is feasible"
        unsharded = jax.jit(self.fn)(*self.args)
        for at in range(0, len(choices), 16):
            for planned in run_planned(self.traced, self.topology, choices[at : at + 16], *self.args):
                assert_equal(planned, unsharded, defined=self.defined)

    def _choice(self, state: int) -> Choice | None:
        return random_choice(self.problem, self.rng, {self.node: state})

    def _different(self, order: list[int], count: int) -> list[int]:
        """Strategies each of which splits or carries something, or a pair of things, that none before it did."""
        chosen: list[int] = []
        seen: set[object] = set()
        for i in order:
            strategy = self.problem.nodes[self.node].states[i]
            active = [k for k, axes in enumerate((*strategy.splits, *strategy.carried)) if axes]
            new = {frozenset((a, b)) for a in active for b in active} - seen
            if (new or len(order) == 1) and len(chosen) < count and self._choice(i) is not None:
                chosen.append(i)
                seen |= new
        return chosen


def summed_before(
    fn: Callable[..., Any], specs: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[Callable[..., Any], list[Any]]:
    """The function of floating-point arguments that are sums, so that partial sums can reach it."""
    floats = [jnp.issubdtype(spec.dtype, np.inexact) for spec in specs]
    wider = [jax.ShapeDtypeStruct((8, *s.shape), s.dtype) if f else s for s, f in zip(specs, floats, strict=True)]

    def summing(*args: jax.Array) -> Any:
        return fn(*(lax.reduce_sum(a, axes=(0,)) / 8 if f else a for a, f in zip(args, floats, strict=True)))

    return summing, wider
