"""User-registered rules: for an opaque function, such as a kernel, or for a primitive by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from autoshard.rules.einsum import Einsum, RuleError, parse_rule, rule_of
from autoshard.rules.rule import REGISTRY, Pieces, Rule, local_shape
from costmodels.program.program import Output

_PREFIX = "rule:"


@dataclass(frozen=True)
class _Kernel:
    """An opaque function of arrays with its rule, as JAX carries it through a trace."""

    name: str
    fn: Callable[..., Any]
    einsum: Einsum
    flops_per_point: float

    def __call__(self, *arrays: Any) -> list[Any]:
        return jax.tree.leaves(self.fn(*arrays))


def rule(
    text: str,
    *,
    whole: str = "",
    sum: str = "",
    max: str = "",
    flops_per_point: float = 0.0,
    primitive: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a sharding rule for an opaque function, such as a Pallas kernel.

        @autoshard.rule("b s (k g) d, b t k d, b t k d -> b s (k g) d", whole="s t d", flops_per_point=4)
        def attention(q, k, v):
            return flash_attention_kernel(q, k, v)

    The function is one operation of the plan. It runs on each chip with that chip's shards: here those of its batch and its
    heads. Outside of plans nothing changes. `jax.vmap` batches the function with its rule. Differentiation looks into the
    function, so give the forward and the backward kernel a rule each, inside a `jax.custom_vjp`.

    **Arguments:**

    - `text`: the dimensions of the arrays by name, operands and results separated by commas. Equal names are
      equal dimensions; `(k g)` is one dimension that merges two, the first major; `1` is a dimension of size 1.
    - `whole`: names of dimensions that cannot be split. A name that no result has is whole, unless it is summed.
    - `sum`, `max`: names of dimensions that the function reduces: on shards it returns partial sums, or the shards' maxima.
    - `flops_per_point`: floating-point operations per point of the product of all dimensions; 4 for attention. By default
      the function costs the time to read and write its arrays.
    - `primitive`: the name of a JAX primitive that gets the rule. The decorated function then runs the primitive on one chip's
      shards: it takes the operands, and the equation's parameters as keyword arguments.

    **Raises:** `RuleError` for an invalid text and, at the call, for arrays that do not fit it.
    """
    kinds = {kind: names for kind, names in (("whole", whole), ("sum", sum), ("max", max)) if names}
    einsum = parse_rule(text, kinds)  # pyright: ignore[reportArgumentType]
    if primitive:
        return functools.partial(_register_primitive, primitive, einsum, flops_per_point)
    return functools.partial(_register_function, einsum, flops_per_point)


def _register_function(einsum: Einsum, flops_per_point: float, fn: Callable[..., Any]) -> Callable[..., Any]:
    name = getattr(fn, "__name__", type(fn).__name__)

    @functools.wraps(fn)
    def bind_kernel(*arrays: Any, **static: Any) -> Any:
        body = functools.partial(fn, **static) if static else fn
        shape = jax.eval_shape(body, *arrays)
        flat = _primitive(name).bind(*arrays, kernel=_Kernel(name, body, einsum, flops_per_point))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return bind_kernel


@functools.cache
def _primitive(name: str) -> Primitive:
    """The primitive of all opaque functions of one name."""
    made = Primitive(_PREFIX + name)
    made.multiple_results = True
    made.def_impl(lambda *arrays, kernel: kernel(*arrays))
    made.def_abstract_eval(_abstract)
    mlir.register_lowering(made, mlir.lower_fun(lambda *arrays, kernel: kernel(*arrays), multiple_results=True))
    ad.primitive_jvps[made] = lambda primals, tangents, *, kernel: jax.jvp(
        kernel, primals, tuple(map(ad.instantiate_zeros, tangents))
    )
    batching.primitive_batchers[made] = functools.partial(_batch, made)
    REGISTRY[made.name] = _rule_of_kernel
    return made


def _abstract(*avals: Any, kernel: _Kernel) -> list[Any]:
    made = jax.eval_shape(kernel, *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals))
    kernel.einsum.sizes(kernel.name, [aval.shape for aval in avals], [each.shape for each in made])
    return [ShapedArray(each.shape, each.dtype) for each in made]


def _batch(made: Primitive, arrays: Sequence[Any], axes: Sequence[Any], *, kernel: _Kernel) -> tuple[Any, Any]:
    has = [axis is not None for axis in axes]
    moved = [jax.numpy.moveaxis(a, axis, 0) if there else a for a, axis, there in zip(arrays, axes, has, strict=True)]
    body = jax.vmap(kernel, in_axes=tuple(0 if there else None for there in has))
    found = made.bind(*moved, kernel=replace(kernel, fn=body, einsum=kernel.einsum.batch(has)))
    return found, [0] * len(found)


def _rule_of_kernel(inputs: Sequence[Any], outputs: Sequence[Any], *, kernel: _Kernel) -> Rule:
    return replace(_kernel_rule(kernel.einsum, kernel.name, kernel.flops_per_point, inputs, outputs), local=_run_kernel)


def _kernel_rule(
    einsum: Einsum, name: str, flops_per_point: float, inputs: Sequence[Any], outputs: Sequence[Any]
) -> Rule:
    made = rule_of(einsum, name, [aval.shape for aval in inputs], [aval.shape for aval in outputs])
    traffic = (*range(len(inputs)), *map(Output, range(len(outputs))))
    return replace(
        made,
        op_class="matmul" if flops_per_point else "memory",
        traffic=traffic,
        flops_per_point=float(flops_per_point),
    )


def _run_kernel(eqn: Any, made: Rule, pieces: Pieces, *operands: Any) -> Sequence[Any]:
    kernel: _Kernel = eqn.params["kernel"]
    return _check_shapes(kernel.name, made, pieces, kernel(*operands))


def _check_shapes(name: str, made: Rule, pieces: Pieces, found: Sequence[Any]) -> Sequence[Any]:
    for k, (piece, dims) in enumerate(zip(found, made.outputs, strict=True)):
        wanted = local_shape(dims, pieces)
        if tuple(piece.shape) != wanted:
            raise RuleError(
                f"On one chip's shards, result {k} of {name} must have the shape {list(wanted)} by its rule, got"
                f" {list(piece.shape)}. List dimensions that may not be split as whole."
            )
    return found


def _register_primitive(
    primitive: str, einsum: Einsum, flops_per_point: float, local: Callable[..., Any]
) -> Callable[..., Any]:
    def run(eqn: Any, made: Rule, pieces: Pieces, *operands: Any) -> Sequence[Any]:
        return _check_shapes(primitive, made, pieces, jax.tree.leaves(local(*operands, **eqn.params)))

    def maker(inputs: Sequence[Any], outputs: Sequence[Any], **_: Any) -> Rule:
        return replace(_kernel_rule(einsum, primitive, flops_per_point, inputs, outputs), local=run)

    REGISTRY[primitive] = maker
    return local
