"""`unruled_p`: a primitive without a sharding rule. It doubles its operand."""

from __future__ import annotations

from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import mlir

NAME = "primitive_without_a_rule"

unruled_p = Primitive(NAME)
unruled_p.def_impl(lambda x: x * 2)
unruled_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(unruled_p, mlir.lower_fun(lambda x: x * 2, multiple_results=False))


def unruled(x: Any) -> Any:
    """Twice `x`."""
    return unruled_p.bind(x)
