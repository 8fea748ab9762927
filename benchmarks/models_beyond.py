"""Hugging Face's Flax models beyond language models: encoder-decoders, vision, speech, two towers, block-sparse.

Published sizes are those of the checkpoints' config.json on huggingface.co; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autoshard import Workload
from benchmarks.models_frameworks import library

_Shapes = dict[str, tuple[int, ...]]


class Model(NamedTuple):
    """A class of models and of configurations; the settings of published and tiny sizes; its inputs of both sizes."""

    model: str
    config: str
    full: dict[str, Any]
    tiny: dict[str, Any]
    inputs: _Shapes
    tiny_inputs: _Shapes


_NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
_TWO_SIDES = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 8 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
}
_WHISPER = {
    "d_model": 1280,
    **{f"{side}_layers": 32 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 20 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 5120 for side in ("encoder", "decoder")},
}
MODELS = {
    "bart-large": Model(
        "FlaxBartForConditionalGeneration",
        "BartConfig",
        {},
        {"d_model": 64, "vocab_size": 96, "max_position_embeddings": 32, **_TWO_SIDES},
        {"input_ids": (32, 512), "decoder_input_ids": (32, 128)},
        {"input_ids": (8, 16), "decoder_input_ids": (8, 8)},
    ),
    "whisper-large": Model(
        "FlaxWhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 51_865, **_WHISPER},
        {"d_model": 64, "vocab_size": 96, "max_source_positions": 16, "max_target_positions": 16, **_TWO_SIDES}
        | {"num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        {"input_features": (16, 80, 3000), "decoder_input_ids": (16, 128)},
        {"input_features": (8, 8, 32), "decoder_input_ids": (8, 8)},
    ),
    "vit-huge": Model(
        "FlaxViTForImageClassification",
        "ViTConfig",
        {
            **{"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120},
            **{"patch_size": 14, "image_size": 224},
        },
        {**_NARROW, "patch_size": 4, "image_size": 16},
        {"pixel_values": (64, 3, 224, 224)},
        {"pixel_values": (8, 3, 16, 16)},
    ),
    "bigbird-base": Model(
        "FlaxBigBirdForMaskedLM",
        "BigBirdConfig",
        {},
        {**_NARROW, "vocab_size": 96, "max_position_embeddings": 64, "block_size": 4, "num_random_blocks": 2},
        {"input_ids": (16, 4096)},
        {"input_ids": (8, 64)},
    ),
    "wav2vec2-large": Model(
        "FlaxWav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
            **{"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
        },
        {
            **_NARROW,
            **{"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_dim": (16, 16), "conv_stride": (4, 2)},
            **{
                "conv_kernel": (8, 3),
                "num_conv_pos_embeddings": 16,
                "num_conv_pos_embedding_groups": 4,
                "vocab_size": 24,
            },
        },
        {"input_values": (16, 80_000)},
        {"input_values": (8, 256)},
    ),
    "resnet-50": Model(
        "FlaxResNetForImageClassification",
        "ResNetConfig",
        {},
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2]},
        {"pixel_values": (64, 3, 224, 224)},
        {"pixel_values": (8, 3, 32, 32)},
    ),
}


def forward(name: str, tiny: bool = False) -> Workload:
    """The first of a model's outputs for a batch of inputs, in inference."""
    transformers, found = library("transformers"), MODELS[name]
    config = getattr(transformers, found.config)(**(found.tiny if tiny else found.full))
    model = getattr(transformers, found.model)(config, _do_init=False, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda key: model.init_weights(key, model.input_shape), jax.random.key(0))
    inputs = found.tiny_inputs if tiny else found.inputs

    def first(params, inputs):
        return model(**inputs, params=params, train=False).to_tuple()[0]

    types = {each: jnp.int32 if each.endswith("ids") else jnp.float32 for each in inputs}
    given = {each: jax.ShapeDtypeStruct(shape, types[each]) for each, shape in inputs.items()}
    return Workload(first, (params, given), name=f"{name} forward")


def cases() -> dict[tuple[str, str], Callable[..., Workload]]:
    """(model, phase) to its builder."""
    return {(name, "forward"): partial(forward, name) for name in MODELS}
