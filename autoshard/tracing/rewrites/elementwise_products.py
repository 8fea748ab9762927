"""Products that sum over nothing, as multiplications of elements.

`jnp.einsum` makes a `dot_general` of each pair of its operands, also where no dimension of the pair is summed: gates and masks
such as `"bhcls,bclhs->bclhs"`, outer products such as `"i,j->ij"`. XLA multiplies their elements on the vector unit and fuses
them with what is beside them. As matmuls they would be costed by tiles of the matrix unit, which their single elements fill.
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def is_elementwise_product(eqn: Any) -> bool:
    """Whether an equation is a matmul whose summed dimensions have one element, or that has none."""
    if eqn.primitive.name != "dot_general":
        return False
    left, right = (each.aval for each in eqn.invars)
    (summed, _), _ = eqn.params["dimension_numbers"]
    return prod(left.shape[dim] for dim in summed) == 1 and _product_type(left, right, eqn.outvars[0].aval) is not None


def multiplication(eqn: Any) -> Any:
    """A closed jaxpr of the same function as such an equation, of transposes, reshapes and one multiplication."""
    (summed, batch), made = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    avals = [each.aval for each in eqn.invars]
    free = [[d for d in range(aval.ndim) if d not in (*summed[k], *batch[k])] for k, aval in enumerate(avals)]
    starts = len(batch[0]), len(batch[0]) + len(free[0])
    dtype = _product_type(avals[0], avals[1], made)

    def spread(array: Any, k: int) -> Any:
        places = (*range(len(batch[0])), *range(starts[k], starts[k] + len(free[k])))
        order = (*batch[k], *free[k], *summed[k])
        ordered = array if order == tuple(range(array.ndim)) else lax.transpose(array, order)
        shape = [made.shape[at] if at in places else 1 for at in range(made.ndim)]
        return lax.convert_element_type(lax.reshape(ordered, shape), dtype)

    def multiply(left: Any, right: Any) -> Any:
        return lax.convert_element_type(jnp.multiply(spread(left, 0), spread(right, 1)), made.dtype)

    return jax.make_jaxpr(multiply)(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals))


def _product_type(left: Any, right: Any, made: Any) -> Any:
    """The type in which elements are multiplied, without a rounding that the matmul does not have; None if it is open."""
    if made.dtype.itemsize >= max(left.dtype.itemsize, right.dtype.itemsize):
        return made.dtype
    return left.dtype if left.dtype == right.dtype else None
