"""Pins on dimensions that their axes do not divide: they choose padding, or are refused with the reason."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.errors import AutoshardError
from autoshard.rules.pin import PinError
from benchmarks.uneven import OVER_ALL, palm_of

CHIPS = "cpu:2x2"


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(up: Any, down: Any, x: Any) -> Any:
    return jnp.tanh(x @ up) @ down


MLP = _array(8, 21), _array(21, 8), _array(4, 8)


def _draw(shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(each.shape), each.dtype) for each in shapes)


def _assert_runs(plan: autoshard.Plan, fn: Any, shapes: tuple[Any, ...]) -> None:
    args = _draw(shapes)
    found = plan.jit(fn, plan.make_mesh())(*plan.place(args))
    np.testing.assert_allclose(found, fn(*args), rtol=1e-4, atol=1e-4)


def test_a_pin_chooses_the_least_padding_that_its_axes_divide() -> None:
    found = autoshard.search(mlp, *MLP, topology=CHIPS, pins={"up": P(None, ("x", "y"))})
    assert [(each.size, each.padded) for each in found.padding] == [(21, 24)]
    assert found.arguments[0].layout.dims == ((), ("x", "y"))
    assert any(
        "its dimension of 21 is padded to 24, as the pin up=" in each and "requires" in each for each in found.warnings
    )
    _assert_runs(found, mlp, MLP)


def test_pins_on_one_dimension_agree_on_one_size() -> None:
    pins = {"up": P(None, "x"), "down": P(("x", "y"))}
    found = autoshard.search(mlp, *MLP, topology="cpu:3x2", pins=pins)
    assert [(each.size, each.padded) for each in found.padding] == [(21, 24)]


def test_a_constraint_of_the_user_chooses_padding() -> None:
    def constrained(up: Any, down: Any, x: Any) -> Any:
        return autoshard.pin(jnp.tanh(x @ up), P(None, ("x", "y"))) @ down

    found = autoshard.search(constrained, *MLP, topology=CHIPS)
    assert [(each.size, each.padded) for each in found.padding] == [(21, 24)]
    assert any("as the pin at" in each for each in found.warnings)


def test_a_part_of_a_merged_dimension_is_padded() -> None:
    """Three heads of five, as one dimension of 15: the heads are padded, because reshapes cut through the 15."""

    def heads(wq: Any, wo: Any, x: Any) -> Any:
        q = (x @ wq).reshape(4, 3, 5)
        return jnp.einsum("bhd,hde->be", q, wo)

    shapes = _array(8, 15), _array(3, 5, 8), _array(4, 8)
    found = autoshard.search(heads, *shapes, topology=CHIPS, pins={"wq": P(None, "x")})
    assert [(each.size, each.padded, each.inner) for each in found.padding] == [(3, 4, 5)]
    _assert_runs(found, heads, shapes)


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 512])
def test_heads_of_palm_over_all_chips_are_padded_as_by_hand(batch: int) -> None:
    """Pope et al. 2022 padded 48 heads to 64 for 64 chips."""
    steps = []
    for heads in (48, 64):
        work = palm_of(heads, "decode", batch)
        pins = {"params['layers']['wq']": OVER_ALL}
        found = autoshard.search(
            work.fn, *work.args, topology="v4:4x4x4", donate_argnums=work.donate_argnums, pins=pins
        )
        assert [(each.size, each.padded) for each in found.padding] == [(48, 64)] * (heads == 48)
        assert found.proof.status == "OPTIMAL"
        steps.append(found.estimate.seconds)
    assert steps[0] == pytest.approx(steps[1], rel=0.01)


def test_without_padding_the_error_says_what_would_do() -> None:
    with pytest.raises(PinError, match=r"dimension 1 of size 21 into 4 shards, which do not divide it. A search with"):
        autoshard.search(mlp, *MLP, topology=CHIPS, pins={"up": P(None, ("x", "y"))}, padding=False)


def test_a_pin_that_no_padding_meets_is_refused_with_the_reason() -> None:
    def counted(w: Any, x: Any) -> Any:
        return x @ w + jnp.arange(84.0).reshape(4, 21)

    with pytest.raises(PinError, match="which do not divide it, and it cannot be padded, because iota"):
        autoshard.search(counted, _array(8, 21), _array(4, 8), topology=CHIPS, pins={"w": P(None, "x")})
    with pytest.raises(PinError, match="and dimensions of 1 are not padded"):
        autoshard.search(mlp, *MLP[:2], _array(1, 8), topology=CHIPS, pins={"x": P("x")})


def test_phases_pad_what_a_constraint_in_one_of_them_pins() -> None:
    def constrained(params: Any, x: Any) -> Any:
        return autoshard.pin(jnp.tanh(x @ params["up"]), P(None, "x")) @ params["down"]

    def free(params: Any, x: Any) -> Any:
        return mlp(params["up"], params["down"], x)

    params = {"up": MLP[0], "down": MLP[1]}
    works = {"a": autoshard.Workload(free, (params, MLP[2])), "b": autoshard.Workload(constrained, (params, MLP[2]))}
    found = autoshard.search_phases(works, shared="params", topology=CHIPS)
    assert {name: [(p.size, p.padded) for p in plan.padding] for name, plan in found.items()} == {
        "a": [(21, 22)],
        "b": [(21, 22)],
    }
    with pytest.raises(AutoshardError, match="A search with padding pads it if it can"):
        autoshard.search_phases(works, shared="params", topology=CHIPS, padding=False)
