"""Transformers made of the layers of Equinox, penzai, keras-hub, Haiku, Flax Linen and Flax NNX.

Every model is built abstractly: its parameters are shapes in the framework's own containers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from autoshard import Workload


def library(name: str) -> Any:
    """A library of the model zoo, which is not a dependency of the project."""
    return importlib.import_module(name)


def _ids(batch: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


# --- Equinox: a GPT of library layers, GPT-3 6.7B's sizes (Brown et al. 2020, arXiv 2005.14165, table 2.1)


def _equinox_gpt(tiny: bool) -> Any:
    """A pre-norm GPT whose blocks are `eqx.nn` layers; its arrays are shapes in bf16."""
    eqx = library("equinox")

    layers, width, heads, vocab, positions = (3, 64, 8, 96, 32) if tiny else (32, 4096, 32, 50_257, 2048)

    class Block(eqx.Module):
        norm1: Any
        attention: Any
        norm2: Any
        mlp: Any

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
            self.attention = eqx.nn.MultiheadAttention(heads, width, key=a)
            self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=b)

        def __call__(self, x):
            normed = jax.vmap(self.norm1)(x)
            x = x + self.attention(normed, normed, normed, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
            return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))

    class GPT(eqx.Module):
        tokens: Any
        positions: Any
        blocks: Any
        norm: Any
        head: Any

        def __init__(self, key):
            a, b, c, *rest = jax.random.split(key, 3 + layers)
            self.tokens = eqx.nn.Embedding(vocab, width, key=a)
            self.positions = eqx.nn.Embedding(positions, width, key=b)
            self.blocks = [Block(k) for k in rest]
            self.norm = eqx.nn.LayerNorm(width)
            self.head = eqx.nn.Linear(width, vocab, use_bias=False, key=c)

        def __call__(self, ids):
            x = jax.vmap(self.tokens)(ids) + jax.vmap(self.positions)(jnp.arange(len(ids)))
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(jax.vmap(self.norm)(x))

    model = eqx.filter_eval_shape(GPT, jax.random.key(0))
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if tiny else jnp.bfloat16)
            if isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        model,
    )


def equinox_forward(tiny: bool = False) -> Workload:
    """Logits of 16 sequences of 1024 tokens; the batch is a `jax.vmap`."""
    eqx = library("equinox")

    params, static = eqx.partition(_equinox_gpt(tiny), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def forward(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids)

    return Workload(forward, (params, _ids(8, 8) if tiny else _ids(16, 1024)), name="equinox gpt 6.7b forward")


def equinox_train(tiny: bool = False) -> Workload:
    """One AdamW step on 64 sequences of 1024 tokens, each block rematerialized; parameters and state donated."""
    eqx = library("equinox")
    optax = library("optax")

    params, static = eqx.partition(_equinox_gpt(tiny), lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    optimizer = optax.adamw(3e-4)

    def loss(params, ids):
        model = eqx.combine(params, static)
        blocks = [eqx.filter_checkpoint(block) for block in model.blocks]
        model = eqx.tree_at(lambda m: m.blocks, model, blocks, is_leaf=lambda leaf: leaf is model.blocks)
        logits = jax.vmap(model)(ids[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(params, state, ids):
        value, grads = jax.value_and_grad(loss)(params, ids)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    args = (params, jax.eval_shape(optimizer.init, params), _ids(8, 9) if tiny else _ids(64, 1025))
    return Workload(step, args, donate_argnums=(0, 1), name="equinox gpt 6.7b train")


# --- penzai: Llama 2 7B (Touvron et al. 2023, arXiv 2307.09288)


def penzai_forward(stacked: bool, tiny: bool = False) -> Workload:
    """Logits of 16 sequences of 1024 tokens; unrolled blocks, or a stack that penzai scans over."""
    pz = library("penzai.pz")
    variant = library("penzai.models.transformer.variants.llamalike_common")

    full = {"num_kv_heads": 32, "embedding_dim": 4096, "projection_dim": 128, "mlp_hidden_dim": 11_008}
    small = {"num_kv_heads": 8, "embedding_dim": 64, "projection_dim": 8, "mlp_hidden_dim": 128}
    dtype = jnp.float32 if tiny else jnp.bfloat16
    config = variant.LlamalikeTransformerConfig(
        **(small if tiny else full),
        query_head_multiplier=1,
        num_decoder_blocks=3 if tiny else 32,
        vocab_size=96 if tiny else 32_000,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        parameter_dtype=dtype,
        activation_dtype=dtype,
        use_layer_stack=stacked,
    )

    def build(key):
        return pz.unbind_params(variant.build_llamalike_transformer(config, init_base_rng=key), freeze=True)

    model, params = jax.eval_shape(build, jax.random.key(0))
    return _penzai_workload(pz, model, params, (8, 8) if tiny else (16, 1024), f"penzai llama {stacked=}")


def _penzai_workload(pz, model, params, shape, name: str) -> Workload:
    def forward(model, params, ids):
        bound = pz.bind_variables(model, params, allow_unused=False)
        tokens = pz.nx.wrap(ids).tag("batch", "seq")
        return bound(tokens, token_positions=pz.nx.arange("seq", ids.shape[1])).unwrap("batch", "seq", "vocabulary")

    return Workload(forward, (model, params, _ids(*shape)), name=name)


# --- keras-hub: Gemma 7B and Llama 2 7B backbones with their tied or own heads


def keras_forward(kind: str, tiny: bool = False) -> Workload:
    """Logits of 16 sequences of 1024 tokens, by the functional model that keras-hub builds."""
    os.environ["KERAS_BACKEND"] = "jax"
    sys.modules.setdefault("tensorflow", None)  # pyright: ignore  # its protobuf and that of OR-Tools crash each other
    keras, keras_hub = library("keras"), library("keras_hub")

    sizes = {
        "gemma": {
            "vocabulary_size": 256_000,
            "num_layers": 28,
            "num_query_heads": 16,
            "num_key_value_heads": 16,
            "hidden_dim": 3072,
            "intermediate_dim": 49_152,
            "head_dim": 256,
        },
        "llama": {
            "vocabulary_size": 32_000,
            "num_layers": 32,
            "num_query_heads": 32,
            "num_key_value_heads": 32,
            "hidden_dim": 4096,
            "intermediate_dim": 11_008,
        },
    }[kind]
    if tiny:
        sizes |= {"vocabulary_size": 96, "num_layers": 3, "num_query_heads": 8, "num_key_value_heads": 8}
        sizes |= {"hidden_dim": 64, "intermediate_dim": 128} | ({"head_dim": 8} if "head_dim" in sizes else {})
    backbone = {"gemma": keras_hub.models.GemmaBackbone, "llama": keras_hub.models.LlamaBackbone}[kind]
    found = []

    def build():
        found.append(backbone(**sizes, dtype="float32" if tiny else "bfloat16"))
        return [variable.value for variable in found[-1].variables]

    # Keras keeps its weights in objects, which must not be allocated at full size; what else it computes there is then lost.
    shapes = jax.eval_shape(lambda arrays: arrays, build()) if tiny else jax.eval_shape(build)
    model = found[-1]
    params = {variable.path: shape for variable, shape in zip(model.variables, shapes, strict=True)}

    def forward(params, ids):
        values = [params[variable.path] for variable in model.trainable_variables]
        others = [params[variable.path] for variable in model.non_trainable_variables]
        inputs = {"token_ids": ids, "padding_mask": jnp.ones_like(ids)}
        hidden, _ = model.stateless_call(values, others, inputs)
        mapping = list(zip(model.variables, (params[v.path] for v in model.variables), strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return model.token_embedding(hidden, reverse=True)

    return Workload(forward, (params, _ids(8, 8) if tiny else _ids(16, 1024)), name=f"keras-hub {kind} forward")


# --- Haiku, Flax Linen and Flax NNX: the block that the library's documentation builds, in GPT-2 medium's sizes
#     (Radford et al. 2019, table 2)


def _gpt2_medium(tiny: bool) -> tuple[int, int, int, int]:
    return (3, 64, 8, 96) if tiny else (24, 1024, 16, 50_257)


def haiku_forward(tiny: bool = False) -> Workload:
    """Logits of 16 sequences of 1024 tokens by `hk.MultiHeadAttention` and `hk.nets.MLP`."""
    hk = library("haiku")

    layers, width, heads, vocab = _gpt2_medium(tiny)

    def model(ids):
        def norm(x):
            return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

        x = hk.Embed(vocab, width)(ids)
        mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
        for _ in range(layers):
            attention = hk.MultiHeadAttention(
                heads, width // heads, model_size=width, w_init=hk.initializers.TruncatedNormal(0.02)
            )
            y = norm(x)
            x = x + attention(y, y, y, mask=mask)
            x = x + hk.nets.MLP([4 * width, width], activation=jax.nn.gelu)(norm(x))
        return hk.Linear(vocab, with_bias=False)(norm(x))

    transformed = hk.without_apply_rng(hk.transform(model))
    ids = _ids(8, 8) if tiny else _ids(16, 1024)
    params = jax.eval_shape(transformed.init, jax.random.key(0), ids)
    return Workload(transformed.apply, (params, ids), name="haiku gpt-2 medium forward")


def linen_forward(tiny: bool = False) -> Workload:
    """Logits of 16 sequences of 1024 tokens by `nn.MultiHeadDotProductAttention`."""
    nn = library("flax.linen")

    layers, width, heads, vocab = _gpt2_medium(tiny)

    class GPT(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(vocab, width)(ids)
            mask = nn.make_causal_mask(ids)
            for _ in range(layers):
                y = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(num_heads=heads, deterministic=True)(y, mask=mask)
                x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
            return nn.Dense(vocab, use_bias=False)(nn.LayerNorm()(x))

    model, ids = GPT(), _ids(8, 8) if tiny else _ids(16, 1024)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)

    def forward(params, ids):
        return model.apply(params, ids)

    return Workload(forward, (params, ids), name="linen gpt-2 medium forward")


def nnx_train(tiny: bool = False) -> Workload:
    """One AdamW step on 64 sequences of 1024 tokens by a model of NNX, split into definition and state."""
    optax = library("optax")
    nnx = library("flax.nnx")

    layers, width, heads, vocab = _gpt2_medium(tiny)

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class GPT(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(vocab, width, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(layers)])
            self.norm = nnx.LayerNorm(width, rngs=rngs)

        def __call__(self, ids):
            x, mask = self.embed(ids), nnx.make_causal_mask(ids)
            for block in self.blocks:
                x = block(x, mask)
            return self.embed.attend(self.norm(x))

    definition, params = nnx.split(nnx.eval_shape(lambda: GPT(nnx.Rngs(0))), nnx.Param)[:2]
    params = nnx.to_pure_dict(params)
    optimizer = optax.adamw(3e-4)

    def loss(params, ids):
        logits = nnx.merge(definition, nnx.State(params))(ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(params, state, ids):
        value, grads = jax.value_and_grad(loss)(params, ids)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    args = (params, jax.eval_shape(optimizer.init, params), _ids(8, 9) if tiny else _ids(64, 1025))
    return Workload(step, args, donate_argnums=(0, 1), name="nnx gpt-2 medium train")


def cases() -> dict[tuple[str, str], Callable[..., Workload]]:
    """(model, phase) to its builder."""
    return {
        ("equinox gpt 6.7b", "forward"): equinox_forward,
        ("equinox gpt 6.7b", "train"): equinox_train,
        ("penzai llama 7b unrolled", "forward"): partial(penzai_forward, False),
        ("penzai llama 7b stacked", "forward"): partial(penzai_forward, True),
        ("keras-hub gemma 7b", "forward"): partial(keras_forward, "gemma"),
        ("keras-hub llama 7b", "forward"): partial(keras_forward, "llama"),
        ("haiku gpt-2 medium", "forward"): haiku_forward,
        ("linen gpt-2 medium", "forward"): linen_forward,
        ("nnx gpt-2 medium", "train"): nnx_train,
    }
