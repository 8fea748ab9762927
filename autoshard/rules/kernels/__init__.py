"""Rules of Pallas kernels: derived from their grids, or those of JAX's own kernels."""

from __future__ import annotations

from typing import Any

from autoshard.rules.kernels.named import Call
from autoshard.rules.kernels.named import named_kernel as named_kernel
from autoshard.rules.kernels.pallas import kernel_rule
from autoshard.rules.rule import REGISTRY, Rule, rule_for


def rule_of_equation(eqn: Any) -> Rule:
    """The rule of an equation: that of its primitive, or for a Pallas kernel without one that of its grid."""
    name, call = eqn.primitive.name, eqn.params.get("call")
    if isinstance(call, Call):
        return call.rule
    if name == "pallas_call" and name not in REGISTRY:
        return kernel_rule(eqn)
    return rule_for(name, [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars], eqn.params)
