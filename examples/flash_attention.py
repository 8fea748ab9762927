"""An opaque kernel with its sharding rule: JAX's Pallas flash attention for TPUs.

autoshard search examples/flash_attention.py:prefill --topology v5e:4x4
autoshard trace --census examples/flash_attention.py:prefill
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

import autoshard


@autoshard.rule("b h s d, b h t d, b h t d -> b h s d", whole="s t d", flops_per_point=4)
def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention; by the rule, batch and heads may be split over chips."""
    return flash_attention(q, k, v, causal=True, sm_scale=1 / math.sqrt(q.shape[-1]))


def layer(x: Array, params: dict[str, Array]) -> Array:
    """Attention and a gated feedforward network, each added to its input. B batch, S positions, E model, H heads."""
    q, k, v = (jnp.einsum("bse,ehd->bhsd", x, params[name]) for name in ("wq", "wk", "wv"))
    x = x + jnp.einsum("bhsd,hde->bse", attention(q, k, v), params["wo"])
    gate, up = (jnp.einsum("bse,ef->bsf", x, params[name]) for name in ("gate", "up"))
    return x + jnp.einsum("bsf,fe->bse", jax.nn.silu(gate) * up, params["down"])


def prefill(batch: int = 16, length: int = 2048, layers: int = 4) -> autoshard.Workload:
    """Layers of width 4096 with 32 heads of 128."""
    E, H, D, F = 4096, 32, 128, 11008
    shapes = {"wq": (E, H, D), "wk": (E, H, D), "wv": (E, H, D), "wo": (H, D, E), "gate": (E, F), "up": (E, F)}
    shapes["down"] = (F, E)

    def spec(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def forward(params: list[dict[str, Any]], x: Array) -> Array:
        for each in params:
            x = layer(x, each)
        return x

    params = [{name: spec(*shape) for name, shape in shapes.items()} for _ in range(layers)]
    return autoshard.Workload(forward, (params, spec(batch, length, E)), name="flash-prefill")
