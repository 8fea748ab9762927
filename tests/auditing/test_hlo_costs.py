"""FLOPs and HBM bytes read from compiled programs: the TPU's spellings as text, then loops that this machine compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from autoshard.auditing.hlo_costs import compiled_costs

# As libtpu writes a matmul: a convolution in a fusion, its weights cut out of the stack of layers by a fusion within.
LAYERS = """\
HloModule jit_step

%cut (stack: bf16[10,32,64], layer: s32[]) -> bf16[32,64] {{
  %stack = bf16[10,32,64]{{2,1,0}} parameter(0)
  %layer = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,32,64]{{2,1,0}} dynamic-slice(%stack, %layer, %zero, %zero), dynamic_slice_sizes={{1,32,64}}
  ROOT %flat = bf16[32,64]{{1,0}} bitcast(%slice)
}}

%product (x: bf16[8,32], stack.1: bf16[10,32,64], layer.1: s32[]) -> bf16[8,64] {{
  %x = bf16[8,32]{{1,0{where}}} parameter(0)
  %stack.1 = bf16[10,32,64]{{2,1,0}} parameter(1)
  %layer.1 = s32[] parameter(2)
  %weights = bf16[32,64]{{1,0}} fusion(%stack.1, %layer.1), kind=kLoop, calls=%cut
  ROOT %out = bf16[8,64]{{1,0{where}}} convolution(%x, %weights), dim_labels=bf_io->bf
}}

ENTRY %main (x.1: bf16[8,32], stack.2: bf16[10,32,64], layer.2: s32[]) -> bf16[8,64] {{
  %x.1 = bf16[8,32]{{1,0{where}}} parameter(0)
  %stack.2 = bf16[10,32,64]{{2,1,0}} parameter(1)
  %layer.2 = s32[] parameter(2)
  ROOT %done = bf16[8,64]{{1,0{where}}} fusion(%x.1, %stack.2, %layer.2), kind=kOutput, calls=%product
}}
"""


@pytest.mark.parametrize(("where", "activations"), [("", 2 * (8 * 32 + 8 * 64)), (":S(1)", 0)])
def test_a_fusion_reads_the_slice_that_it_takes_and_nothing_on_the_chip(where: str, activations: int) -> None:
    found = compiled_costs(LAYERS.format(where=where))
    assert found.flops == 2 * 8 * 32 * 64
    assert found.hbm_bytes == 2 * 32 * 64 + activations + 4  # and the number of the layer
    assert found.counts_known


def test_a_weight_that_a_fusion_within_only_turns_is_read_whole() -> None:
    turned = """\
HloModule jit_step

%turned (w: bf16[64,32]) -> bf16[32,64] {
  %w = bf16[64,32]{1,0} parameter(0)
  ROOT %flat = bf16[32,64]{0,1} bitcast(%w)
}

%product (x: bf16[8,32], w.1: bf16[64,32]) -> bf16[8,64] {
  %x = bf16[8,32]{1,0} parameter(0)
  %w.1 = bf16[64,32]{1,0} parameter(1)
  %weights = bf16[32,64]{0,1} fusion(%w.1), kind=kLoop, calls=%turned
  ROOT %out = bf16[8,64]{1,0} convolution(%x, %weights), dim_labels=bf_io->bf
}

ENTRY %main (x.1: bf16[8,32], w.2: bf16[64,32]) -> bf16[8,64] {
  %x.1 = bf16[8,32]{1,0} parameter(0)
  %w.2 = bf16[64,32]{1,0} parameter(1)
  ROOT %done = bf16[8,64]{1,0} fusion(%x.1, %w.2), kind=kOutput, calls=%product
}
"""
    assert compiled_costs(turned).hbm_bytes == 2 * (8 * 32 + 32 * 64 + 8 * 64)


PADDED = """\
HloModule jit_f

ENTRY %main (image: f32[1,5,1], kernel: f32[3,1,1]) -> f32[1,5,1] {
  %image = f32[1,5,1]{2,1,0} parameter(0)
  %kernel = f32[3,1,1]{2,1,0} parameter(1)
  ROOT %out = f32[1,5,1]{2,1,0} convolution(%image, %kernel), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""


def test_a_convolution_counts_no_products_with_padding() -> None:
    assert compiled_costs(PADDED).flops == 2 * (5 + 4 + 4)


@pytest.mark.parametrize("layers", [1, 7])
def test_loops_multiply(layers: int) -> None:
    def step(x, weights):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    shapes = (jax.ShapeDtypeStruct((8, 128), jnp.float32), jax.ShapeDtypeStruct((layers, 128, 128), jnp.float32))
    found = compiled_costs(jax.jit(step).lower(*shapes).compile().as_text() or "")
    assert found.flops == layers * 2 * 8 * 128 * 128
    assert found.hbm_bytes >= layers * 4 * 128 * 128


@pytest.mark.parametrize(("where", "times"), [("", 2), ("S(1)", 1)])
def test_a_started_slice_moves_the_slice(where: str, times: int) -> None:
    """`slice-start` names its operand, the slice and its own state: the slice is read, and written where that is in HBM."""
    text = f"""HloModule sliced, is_scheduled=true

ENTRY %main (x: f32[64,128]) -> f32[8,128] {{
  %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  %s = ((f32[64,128]{{1,0:T(8,128)}}), f32[8,128]{{1,0:T(8,128){where}}}, s32[]{{:S(2)}}) slice-start(%x)
  ROOT %d = f32[8,128]{{1,0:T(8,128){where}}} slice-done(%s)
}}
"""
    assert compiled_costs(text).hbm_bytes == times * 8 * 128 * 4


SCATTER = """\
HloModule jit_write

%take (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  ROOT %b = bf16[] parameter(1)
}

%rows (cache: bf16[64,2048,8,128], at: s32[64,2], new: bf16[64,8,128]) -> bf16[64,2048,8,128] {
  %cache = bf16[64,2048,8,128]{3,2,1,0} parameter(0)
  %at = s32[64,2]{1,0:S(1)} parameter(1)
  %new = bf16[64,8,128]{2,1,0} parameter(2)
  ROOT %written = bf16[64,2048,8,128]{3,2,1,0} scatter(%cache, %at, %new), update_window_dims={1,2}, to_apply=%take
}

ENTRY %main (cache.1: bf16[64,2048,8,128], at.1: s32[64,2], new.1: bf16[64,8,128]) -> bf16[64,2048,8,128] {
  %cache.1 = bf16[64,2048,8,128]{3,2,1,0} parameter(0)
  %at.1 = s32[64,2]{1,0:S(1)} parameter(1)
  %new.1 = bf16[64,8,128]{2,1,0} parameter(2)
  ROOT %done = FUSED
}
"""
ROWS = "bf16[64,2048,8,128]{3,2,1,0} {}(%cache.1, %at.1, %new.1), {}"


@pytest.mark.parametrize("fused", [True, False])
def test_a_scatter_moves_the_rows_that_it_writes_and_not_their_array(fused: bool) -> None:
    """libtpu 0.0.50 gives a scatter no estimate of cycles; its array is the operand's buffer (`aliasing_operands`)."""
    last = ROWS.replace("{}", "fusion" if fused else "scatter", 1)
    last = last.replace("{}", "kind=kCustom, calls=%rows" if fused else "update_window_dims={1,2}, to_apply=%take")
    found = compiled_costs(SCATTER.replace("FUSED", last))
    assert found.hbm_bytes == 3 * 2 * 64 * 8 * 128  # the new rows, and the old ones read and written
