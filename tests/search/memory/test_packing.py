"""Operands that a compiler lays out anew: the rule, and libtpu's own estimates beside it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.formulation.tpu_tiles import needs_retiling
from tests.support.effort import mostly_long

WIDE = 4096
CASES = [(1, 512), (2, 256), (4, 128), (8, 64), (16, 32), (32, 16), (64, 8), (12, 64), (64, 64), (20, 16), (10, 100)]
"""Pieces [heads, head_dim] of a weight."""

sizes = st.lists(st.sampled_from([1, 2, 3, 8, 16, 64, 100, 128, 512]), min_size=2, max_size=5)


@given(sizes, st.integers(0, 31), st.integers(0, 5))
def test_a_dimension_of_one_element_is_none(shape: list[int], summed: int, at: int) -> None:
    sums = [bool(summed >> i & 1) for i in range(len(shape))]
    at = min(at, len(shape))
    for bit in (False, True):
        padded = (*shape[:at], 1, *shape[at:]), (*sums[:at], bit, *sums[at:])
        assert needs_retiling(*padded) == needs_retiling(tuple(shape), tuple(sums))


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_a_plain_matrix_is_used_as_it_is(rows: int, columns: int) -> None:
    assert not needs_retiling((rows, columns), (True, False))


@pytest.mark.tpu
@pytest.mark.parametrize("piece", mostly_long(CASES, (1, 512), (8, 64), (64, 8)), ids=str)
def test_the_compiler_lays_out_anew_what_the_rule_says(piece: tuple[int, int]) -> None:
    """More than twice the cycles that the same bytes take as a matrix, or not."""
    heads, dim = piece
    plain = [
        _cycles("be,ef->bf", (8, WIDE), (WIDE, heads * dim)),
        _cycles("bf,fe->be", (8, heads * dim), (heads * dim, WIDE)),
    ]
    ours = [
        _cycles("be,ehd->bhd", (8, WIDE), (WIDE, heads, dim)),
        _cycles("bhd,hde->be", (8, heads, dim), (heads, dim, WIDE)),
    ]
    expected = [
        needs_retiling((WIDE, heads, dim), (True, False, False)),
        needs_retiling((heads, dim, WIDE), (True, True, False)),
    ]
    assert [mine / least > 2 for mine, least in zip(ours, plain, strict=True)] == expected


def _cycles(einsum: str, *shapes: tuple[int, ...]) -> int:
    """What libtpu estimates for one round of a loop that slices the second operand out of a stack."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1").devices[0])
    left, right = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=chip) for shape in (shapes[0], (8, *shapes[1])))

    def layers(x: jax.Array, stacked: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, w: (carry, jnp.einsum(einsum, x, w)), 0, stacked)[1]

    text = jax.jit(layers).lower(left, right).compile().as_text()
    assert text
    return sum(int(cycles) for cycles in re.findall(r'"estimated_cycles":"(\d+)"', text))
