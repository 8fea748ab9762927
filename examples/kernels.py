"""A decoder of JAX's own Pallas kernels: splash attention in prefill, paged attention in decode. No rule is registered.

autoshard search examples/kernels.py:prefill --topology v5e:4x4
autoshard search examples/kernels.py:decode --topology v5e:4x4
autoshard trace --census examples/kernels.py:decode
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

import autoshard


@dataclass(frozen=True)
class Sizes:
    """Width E, H query heads and K heads of keys and values of D, feedforward F, vocabulary V, and layers."""

    E: int = 4096
    H: int = 32
    K: int = 8
    D: int = 128
    F: int = 14336
    V: int = 32768
    layers: int = 4
    dtype: Any = jnp.bfloat16

    def spec(self, *shape: int) -> jax.ShapeDtypeStruct:
        """An array of these sizes' type."""
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def params(self) -> dict[str, Any]:
        """The parameters, those of all layers stacked."""
        n, e, f = self.layers, self.E, self.F
        shapes = {"wq": (n, e, self.H, self.D), "wk": (n, e, self.K, self.D), "wv": (n, e, self.K, self.D)}
        shapes |= {"wo": (n, self.H, self.D, e), "gate": (n, e, f), "up": (n, e, f), "down": (n, f, e)}
        layers = {name: self.spec(*shape) for name, shape in shapes.items()}
        return {"layers": layers, "embed": self.spec(self.V, e), "head": self.spec(e, self.V)}


def normalize(x: Array) -> Array:
    """The array with a root mean square of 1 along its last dimension."""
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean + 1e-6).astype(x.dtype)


def feed_forward(x: Array, layer: dict[str, Array]) -> Array:
    """A gated feedforward network, added to its input."""
    h = normalize(x)
    return x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]


def causal_attention(heads: int, length: int, block: int) -> Any:
    """Splash attention over the positions so far, of one sequence."""
    sizes = splash.BlockSizes(block_q=block, block_kv=block, block_kv_compute=block)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    return splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)


def prefill(batch: int = 8, length: int = 4096, block: int = 512, sizes: Sizes | None = None) -> autoshard.Workload:
    """The logits after a prompt, and the keys and values of all layers."""
    own = sizes or Sizes()

    def forward(params: Any, tokens: Array) -> Any:
        attention = causal_attention(own.H, length, block)

        def layer(x: Array, p: dict[str, Array]) -> Any:
            h = normalize(x)
            q, k, v = (jnp.einsum("bse,ehd->bhsd", h, p[name]) for name in ("wq", "wk", "wv"))
            found: Any = jax.vmap(attention)(q * own.D**-0.5, k, v)
            return feed_forward(x + jnp.einsum("bhsd,hde->bse", found, p["wo"]), p), (k, v)

        x, cache = jax.lax.scan(layer, params["embed"][tokens], params["layers"])
        return normalize(x[:, -1]) @ params["head"], cache

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return autoshard.Workload(forward, (own.params(), tokens), name="splash-prefill")


def decode(
    batch: int = 32, pages: int = 2048, page: int = 16, most_pages: int = 64, block: int = 8, sizes: Sizes | None = None
) -> autoshard.Workload:
    """The logits of one step, and the pages with the step's keys and values; `block` pages are read at a time."""
    own = sizes or Sizes()

    def forward(params: Any, k_pages: Array, v_pages: Array, lengths: Array, table: Array, tokens: Array) -> Any:
        at, slot = table[jnp.arange(batch), lengths // page], lengths % page

        def layer(x: Array, carried: Any) -> Any:
            p, keys, values = carried
            h = normalize(x)
            q, k, v = (jnp.einsum("be,ehd->bhd", h, p[name]) for name in ("wq", "wk", "wv"))
            keys, values = (old.at[:, at, slot].set(new.swapaxes(0, 1)) for old, new in ((keys, k), (values, v)))
            found = paged_attention(q * own.D**-0.5, keys, values, lengths + 1, table, pages_per_compute_block=block)
            return feed_forward(x + jnp.einsum("bhd,hde->be", found, p["wo"]), p), (keys, values)

        x, pools = jax.lax.scan(layer, params["embed"][tokens], (params["layers"], k_pages, v_pages))
        return normalize(x) @ params["head"], *pools

    pool = own.spec(own.layers, own.K, pages, page, own.D)
    lengths, table = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch,), (batch, most_pages)))
    arguments = (own.params(), pool, pool, lengths, table, lengths)
    return autoshard.Workload(forward, arguments, donate_argnums=(1, 2), name="paged-decode")
