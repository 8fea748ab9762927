"""Transformers of Hugging Face's Flax line, as the library has them, at their published sizes and tiny ones.

`transformers` 4.57 is its last line with Flax models. Nothing is downloaded: a model is its configuration, its parameters
are shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from autoshard import Workload
from benchmarks.models_frameworks import library

# Model: its class, the configuration's class, what sets the published size apart from the configuration's defaults, and a
# tiny one with the same structure. Published sizes are those of the checkpoints' config.json on huggingface.co.
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gpt2-xl": (
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 1600, "n_layer": 48, "n_head": 25},
        {"n_embd": 64, "n_layer": 3, "n_head": 8, "vocab_size": 96, "n_positions": 32},
    ),
    "gpt-j-6b": (
        "FlaxGPTJForCausalLM",
        "GPTJConfig",
        {},
        {"n_embd": 64, "n_layer": 3, "n_head": 8, "rotary_dim": 4, "vocab_size": 96, "n_positions": 32},
    ),
    "gpt-neo-2.7b": (
        "FlaxGPTNeoForCausalLM",
        "GPTNeoConfig",
        {"hidden_size": 2560, "num_layers": 32, "attention_types": [[["global", "local"], 16]], "num_heads": 20},
        {
            "hidden_size": 64,
            "num_layers": 4,
            "attention_types": [[["global", "local"], 2]],
            "num_heads": 8,
            "vocab_size": 96,
            "max_position_embeddings": 32,
            "window_size": 4,
        },
    ),
    "llama-7b": (
        "FlaxLlamaForCausalLM",
        "LlamaConfig",
        {},
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "vocab_size": 96,
            "max_position_embeddings": 32,
        },
    ),
    # The model computes a causal mask of max_position_embeddings squared in every layer: 17 GB of booleans at its 131,072.
    "mistral-7b": (
        "FlaxMistralForCausalLM",
        "MistralConfig",
        {"max_position_embeddings": 4096},
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 96,
            "max_position_embeddings": 32,
            "sliding_window": 8,
        },
    ),
    "gemma-7b": (
        "FlaxGemmaForCausalLM",
        "GemmaConfig",
        {"hidden_activation": "gelu_pytorch_tanh"},
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 16,
            "vocab_size": 96,
            "max_position_embeddings": 32,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "bloom-7.1b": (
        "FlaxBloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250_880},
        {"hidden_size": 64, "n_layer": 3, "n_head": 8, "vocab_size": 96},
    ),
    "opt-6.7b": (
        "FlaxOPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "ffn_dim": 16_384,
            "num_attention_heads": 32,
            "word_embed_proj_dim": 4096,
        },
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "ffn_dim": 128,
            "num_attention_heads": 8,
            "word_embed_proj_dim": 64,
            "vocab_size": 96,
            "max_position_embeddings": 32,
        },
    ),
    "bert-large": (
        "FlaxBertForMaskedLM",
        "BertConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "intermediate_size": 128,
            "vocab_size": 96,
            "max_position_embeddings": 32,
        },
    ),
}
ENCODERS = ("bert-large",)
CONTEXT = {"gpt2-xl": 1024, "bert-large": 512}
"""Tokens that a model has positions for, where they are fewer than the 2048 of the others."""


def _model(name: str, tiny: bool) -> tuple[Any, Any]:
    """A model without weights, and the shapes of its parameters."""
    transformers = library("transformers")
    model_class, config_class, full, small = MODELS[name]
    config = getattr(transformers, config_class)(**(small if tiny else full))
    model = getattr(transformers, model_class)(config, input_shape=(1, 1), _do_init=False, dtype=jnp.bfloat16)
    return model, jax.eval_shape(lambda key: model.init_weights(key, (1, 1)), jax.random.key(0))


def _ids(batch: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def forward(name: str, tiny: bool = False) -> Workload:
    """Logits of 16 sequences of 1024 tokens (512 for BERT), or as many as the model has positions for."""
    model, params = _model(name, tiny)
    length = 8 if tiny else min(1024, CONTEXT.get(name, 1024))

    def logits(params, input_ids):
        return model(input_ids=input_ids, params=params).logits

    return Workload(logits, (params, _ids(8 if tiny else 16, length)), name=f"{name} forward")


def decode(name: str, tiny: bool = False) -> Workload:
    """One token for each of 64 sequences against a cache of 2048 tokens, or of the model's positions."""
    model, params = _model(name, tiny)
    batch, context = (8, 16) if tiny else (64, CONTEXT.get(name, 2048))
    cache = jax.eval_shape(lambda: model.init_cache(batch, context))

    def step(params, cache, input_ids, attention_mask, position_ids):
        extra = {} if name.startswith("bloom") else {"position_ids": position_ids}
        out = model(input_ids=input_ids, params=params, past_key_values=cache, attention_mask=attention_mask, **extra)
        return out.logits, out.past_key_values

    args = (params, cache, _ids(batch, 1), _ids(batch, context), _ids(batch, 1))
    return Workload(step, args, donate_argnums=(1,), name=f"{name} decode")


def generate(name: str, tiny: bool = False) -> Workload:
    """The library's whole greedy `generate` loop: 8 prompts of 64 tokens, 64 tokens each on top."""
    model, params = _model(name, tiny)
    batch, prompt, new = (8, 4, 4) if tiny else (8, 64, 64)

    def run(params, input_ids):
        ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        return model.generate(input_ids, params=params, max_new_tokens=new, do_sample=False, **ends).sequences

    return Workload(run, (params, _ids(batch, prompt)), name=f"{name} generate")


def cases() -> dict[tuple[str, str], Callable[..., Workload]]:
    """(model, phase) to its builder."""
    found: dict[tuple[str, str], Callable[..., Workload]] = {}
    for name in MODELS:
        found[name, "forward"] = partial(forward, name)
        if name not in ENCODERS:
            found[name, "decode"] = partial(decode, name)
    found["gpt2-xl", "generate"] = partial(generate, "gpt2-xl")
    return found
