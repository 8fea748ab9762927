"""Sharding rules as data: a primitive's factors, from which everything else follows.

A rule is an einsum over factors, `[b,i,k],[b,k,j] -> [b,i,j] sum={k}`. Legal strategies, the layouts and collectives they
force, local shapes and costs each come from one generic function over this data. A primitive whose parameters carry
shapes adds a `local` function that runs it on one chip's shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from autoshard._util.dtypes import dtype_name
from costmodels.program.program import Factor, FactorKind, OpClass, Output

Dims = tuple[tuple[int, ...], ...]


class Pieces(Protocol):
    """The interface of a `local` function to its strategy."""

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions of the first operand as they lie in memory, major to minor; empty for the device's default."""
        ...

    @property
    def expert_load(self) -> float:
        """The rows of the chip with the most, over the mean, if groups of rows are split (`Pricing.expert_load`)."""
        ...

    def size(self, factor: int) -> int:
        """The factor's size on one chip."""
        ...

    def start(self, factor: int) -> Any:
        """The start of this chip's shard of the factor, a traced int32; 0 if the factor is not split."""
        ...

    def is_split(self, factor: int) -> bool:
        """Whether any mesh axis splits the factor."""
        ...

    def chips(self, factor: int) -> int:
        """The number of shards of the factor."""
        ...

    def axes(self, factor: int) -> tuple[str, ...]:
        """The mesh axes that split the factor, major to minor."""
        ...

    def along(self, axis: str) -> int:
        """The number of chips along a mesh axis."""
        ...

    def gathered(self, factor: int, piece: Any) -> Any:
        """The shards of all chips along a `gathered` factor, stacked in a new leading dimension.

        To be called once per result, with the costed data: the result's shard, or one element of it along the factor.
        """
        ...

    def permuted(self, factor: int, piece: Any, pairs: Sequence[tuple[int, int]]) -> Any:
        """The shard from another chip along an `exchanged` factor; `pairs` are (sender, receiver)."""
        ...

    def look_up(self, primitive: Any, operand: Any, indices: Any, params: Mapping[str, Any]) -> Any:
        """A `gather` with these parameters, in the form that suits the plan's chips."""
        ...


Local = Callable[..., Sequence[Any]]
"""`local(eqn, rule, pieces, *operands) -> results`, all on one chip's shards."""


@dataclass(frozen=True)
class Rule:
    """The factors of one equation.

    `inputs` and `outputs` give each dimension as a tuple of factors, major to minor; a dimension of size 1 that is
    broadcast has none. `linear`, `traffic`, `op_class`, `flops_per_point` and `rounded` are as in
    `costmodels.program.program.Operation`. `reason` says what a rule that is not `exact` costs, and why there is none.
    """

    factors: tuple[Factor, ...]
    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    linear: tuple[frozenset[int], ...] = ()
    op_class: OpClass = "fused"
    traffic: tuple[int | Output, ...] = ()
    flops_per_point: float = 1.0
    local: Local | None = None
    exact: bool = True
    in_place: bool = False
    rounded: tuple[int, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        letters = self._letters()
        sides = [",".join(_side(dims, letters) for dims in uses) for uses in (self.inputs, self.outputs)]
        notes = []
        for kind in sorted({factor.kind for factor in self.factors} - {"parallel"}):
            named = sorted(letter for i, letter in letters.items() if self.factors[i].kind == kind)
            notes += [f"{kind}={{{','.join(named)}}}"] if named else []
        notes += [f"linear={[sorted(group) for group in self.linear]}"] if self.linear else []
        return " ".join([" -> ".join(sides), *notes])

    def _letters(self) -> dict[int, str]:
        """Factor to letter, in order of appearance."""
        met = dict.fromkeys(i for dims in (*self.inputs, *self.outputs) for dim in dims for i in dim)
        return {i: chr(ord("a") + n) if n < 26 else f"f{n}" for n, i in enumerate(met)}


def _side(dims: Dims, letters: dict[int, str]) -> str:
    return "[" + ",".join("".join(letters[i] for i in dim) or "1" for dim in dims) + "]"


class Factors:
    """Collects the factors of a rule while it is being written."""

    def __init__(self) -> None:
        self._found: list[Factor] = []

    def new(self, size: int, kind: FactorKind = "parallel") -> int:
        """Adds a factor and returns its index."""
        self._found.append(Factor(int(size), kind))
        return len(self._found) - 1

    def kind(self, factor: int) -> FactorKind:
        """The kind of a factor."""
        return self._found[factor].kind

    def each(self, shape: Sequence[int], whole: Sequence[int] = ()) -> Dims:
        """One factor for every dimension; those in `whole` cannot be split."""
        return tuple((self.new(n, "whole" if i in whole else "parallel"),) for i, n in enumerate(shape))

    def done(self) -> tuple[Factor, ...]:
        """All factors."""
        return tuple(self._found)


RuleMaker = Callable[..., Rule]
REGISTRY: dict[str, RuleMaker] = {}


def register(*primitives: str) -> Callable[[RuleMaker], RuleMaker]:
    """Registers a rule for primitives by name.

    The decorated function gets the operands' and the results' avals and the equation's parameters as keyword
    arguments, and returns a `Rule`.

    !!! example

        ```python
        @register("my_norm")
        def my_norm(inputs, outputs, **params):
            factors = Factors()
            dims = factors.each(inputs[0].shape, whole=[inputs[0].ndim - 1])
            return Rule(factors.done(), (dims,), (dims,))
        ```
    """

    def put(maker: RuleMaker) -> RuleMaker:
        for name in primitives:
            REGISTRY[name] = maker
        return maker

    return put


def whole_rule(inputs: Sequence[Any], outputs: Sequence[Any], exact: bool = False) -> Rule:
    """The rule that replicates every array, read and written once; not `exact` if it replaces a missing rule."""
    factors = Factors()
    before, after = (
        tuple(factors.each(aval.shape, range(len(aval.shape))) for aval in side) for side in (inputs, outputs)
    )
    traffic = (*range(len(inputs)), *map(Output, range(len(outputs))))
    return Rule(factors.done(), before, after, (), "memory", traffic, flops_per_point=0.0, exact=exact)


def rule_for(primitive: str, inputs: Sequence[Any], outputs: Sequence[Any], params: dict[str, Any]) -> Rule:
    """The rule of one equation; `whole_rule` if the primitive has none. Arrays of PRNG keys stay whole."""
    maker = REGISTRY.get(primitive)
    if maker is None:
        return whole_rule(inputs, outputs)
    rule = maker(inputs, outputs, **params)
    if not any(is_key(aval) for aval in (*inputs, *outputs)):
        return rule
    sides = zip((*inputs, *outputs), (*rule.inputs, *rule.outputs), strict=True)
    whole = {factor for aval, dims in sides if is_key(aval) for dim in dims for factor in dim}
    kept = tuple(replace(each, kind="whole") if i in whole else each for i, each in enumerate(rule.factors))
    return replace(rule, factors=kept, linear=())


def is_key(aval: Any) -> bool:
    """Whether an array holds PRNG keys: they are few, and no arithmetic is defined on them."""
    return dtype_name(aval.dtype).startswith("key<")


def summable(aval: Any) -> bool:
    """Whether chips may hold partial sums of an array: booleans and PRNG keys have none."""
    return not is_key(aval) and aval.dtype != bool


def picked_kind(aval: Any) -> FactorKind:
    """The kind of a split dimension of which an index picks elements: the chips without them contribute zeros, or False."""
    return "or" if aval.dtype == bool else "sum" if summable(aval) else "whole"


def inexact(aval: Any) -> bool:
    """Whether an array holds floating-point numbers, real or complex, 4- and 8-bit ones included."""
    return _is_inexact(aval.dtype)


@cache
def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.inexact)


def local_shape(dims: Dims, pieces: Pieces) -> tuple[int, ...]:
    """The shape of one chip's shard of an operand or result."""
    return tuple(prod(pieces.size(i) for i in dim) for dim in dims)
