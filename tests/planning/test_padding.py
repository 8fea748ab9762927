"""The choice of padding, and plans with padding: files, placement, calls and donations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard._util.tables import size
from autoshard.annotating import annotated_function
from autoshard.annotating.dimension_names import name_dimensions
from autoshard.planning.padding import Found
from autoshard.planning.padding_costs import padding_cost
from autoshard.planning.records import ArrayPlan
from costmodels.dimensions import Dimensions
from costmodels.program.program import Program
from tests.support.models import Block, arguments, function

BLOCK = Block(batch=1, context=64, d_model=510, d_ff=1023, kv_heads=3, queries_per_kv=1, d_head=170, vocab=513)
CHIPS = "cpu:4"


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    return autoshard.search(function(BLOCK), *arguments(BLOCK), topology=CHIPS, donate_argnums=1, name="odd")


def _run(plan: autoshard.Plan, args: tuple[Any, ...]) -> Any:
    step = plan.jit(function(BLOCK), plan.make_mesh())
    with pytest.warns(UserWarning, match="is padded to .* at each call"):
        return step(*args)


def test_the_fastest_padding_is_kept_and_said(plan: autoshard.Plan) -> None:
    plain = autoshard.search(function(BLOCK), *arguments(BLOCK), topology=CHIPS, donate_argnums=1, padding=False)
    assert (510, 512) in [(each.size, each.padded) for each in plan.padding]
    assert plan.estimate.seconds < plain.estimate.seconds
    assert any("its dimension of 510 is padded to 512" in each for each in plan.warnings)
    assert any("were searched; the best plan without padding takes" in each for each in plan.warnings)


@pytest.mark.long
def test_arrays_are_padded_at_each_call_with_a_warning(plan: autoshard.Plan) -> None:
    want = function(BLOCK)(*arguments(BLOCK))
    got = _run(plan, arguments(BLOCK))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


@pytest.mark.long
def test_placed_arrays_come_back_as_they_went_in(plan: autoshard.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = autoshard.load(tmp_path / "plan.json")
    assert loaded.padding == plan.padding
    assert [each.padding for each in loaded.arguments] == [each.padding for each in plan.arguments]
    args = loaded.place(arguments(BLOCK))
    shapes = [array.shape for array in loaded.arguments]
    assert [leaf.shape for leaf in jax.tree.leaves(args)] == shapes
    step = loaded.jit(function(BLOCK), loaded.make_mesh())
    logits, cache = step(*args)
    assert logits.shape == (BLOCK.batch, BLOCK.vocab)
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, args[1])
    want, _ = function(BLOCK)(*arguments(BLOCK))
    np.testing.assert_allclose(logits, want, rtol=1e-3, atol=1e-3)
    step(args[0], cache, *args[2:])  # the next step takes the cache as it came


def test_an_error_names_the_unpadded_shape(plan: autoshard.Plan) -> None:
    params, *rest = arguments(BLOCK)
    wrong = {**params, "embedding": jnp.zeros((512, 510))}
    with pytest.raises(autoshard.PlanMismatchError, match=r"\[512,510\], planned float32\[513,510\]"):
        plan.jit(function(BLOCK), plan.make_mesh())(wrong, *rest)


@pytest.mark.long
def test_the_compiled_program_is_as_planned(plan: autoshard.Plan) -> None:
    audit = autoshard.audit(plan, function(BLOCK), *arguments(BLOCK), target="host")
    assert audit.ok, str(audit)


def test_masks_padded_elements_and_calls_are_costed_and_said(plan: autoshard.Plan) -> None:
    cost = padding_cost(plan)
    rate = plan.topology.chip.reached_hbm_bytes_per_second
    assert cost.call_seconds == pytest.approx(sum(2 * a.bytes_per_chip / rate for a in plan.arguments if a.padding))
    assert [(each.size, each.padded) for each in cost.dimensions] == [(p.size, p.padded) for p in plan.padding]
    for each in cost.dimensions:
        held = sum(a.bytes_per_chip for a in plan.arguments if (each.size, each.padded) in _sizes(a))
        assert 0 < each.bytes <= (1 - each.size / each.padded) * held * (1 + 1e-9)
        assert each.flops > 0
    assert cost.masks == sum(len(op.masked) for op in plan.require_program().operations)
    text = plan.explain()
    assert "Padding\n" in text
    assert f"masks: {cost.masks}," in text
    assert any("a call whose arguments come without padding takes at least" in each for each in plan.warnings)


def _sizes(array: ArrayPlan) -> list[tuple[int, int]]:
    return [(each.size, each.padded) for each in array.padding]


def test_the_search_costs_masks_as_the_checker_does(tmp_path: Path) -> None:
    """A padded inner dimension after an exponential: its padding is not zero, and the second matmul must mask it."""
    shapes = [jax.ShapeDtypeStruct(each, jnp.bfloat16) for each in ((64, 1024), (1024, 3065), (3065, 1024))]
    found = autoshard.search(lambda x, up, down: jnp.exp(x @ up) @ down, *shapes, topology="v5e:2x4")
    assert [each.size for each in found.padding] == [3065]
    cost = padding_cost(found)
    assert cost.masks == 1
    assert cost.mask_seconds > 0
    assert found.proof.objective_seconds == pytest.approx(found.estimate.seconds, rel=1e-9)
    assert not any("The checker found a fault" in each for each in found.warnings)
    found.save(tmp_path / "plan.json")
    assert padding_cost(autoshard.load(tmp_path / "plan.json")) == cost


def test_unpad_is_the_inverse_of_place(plan: autoshard.Plan) -> None:
    words = arguments(BLOCK)[0]["embedding"]
    at = "params/embedding"
    placed = plan.place(words, argument=at)
    assert placed.shape == (513, 512)
    np.testing.assert_array_equal(plan.unpad(placed, argument=at), words)
    assert plan.unpad(words, argument=at) is words


def test_an_export_has_the_padded_sizes(plan: autoshard.Plan) -> None:
    for format in ("specs", "rules"):
        assert "params['embedding']: dimension 1 of 510 is 512" in plan.export(format)


def test_the_dimensions_of_unrolled_layers_are_padded_together() -> None:
    said: list[str] = []

    def run(layers: Any, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x

    layer = {
        "up": jax.ShapeDtypeStruct((512, 1021), jnp.float32),
        "down": jax.ShapeDtypeStruct((1021, 512), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    found = autoshard.search(run, [layer] * 3, x, topology=CHIPS, progress=said.append, pins={"x": P()})
    assert [(each.size, each.padded) for each in found.padding] == [(1021, 1024)] * 3
    assert said.count("a dimension of 1021 padded to 1024") == 1


def test_a_plan_replaces_another_only_if_it_works_no_more_on_the_chip() -> None:
    plain = Found(None, (), 10.0, 4.0)
    assert replace(plain, seconds=9.0, collectives=3.0).pays(plain)
    assert not replace(plain, seconds=9.0, collectives=2.9).pays(plain)
    assert not replace(plain, seconds=10.0, collectives=5.0).pays(plain)
    assert plain.pays(None)


def test_a_donated_cache_in_several_copies_is_named_with_its_memory() -> None:
    block = Block(batch=1, context=512, d_model=64, d_ff=64, kv_heads=2, queries_per_kv=4, d_head=6, vocab=64)
    pins = {"cache.*": P(None, None, None, "y")}
    found = autoshard.search(
        function(block), *arguments(block), topology="cpu:4x2", donate_argnums=1, pins=pins, padding=False
    )
    held = next(size(array.bytes_per_chip) for array in found.arguments if array.path == "cache['k']")
    assert f"cache['k'] is replicated 4x over x: {held} per chip" in found.explain()


def test_padded_programs_are_named_only_if_they_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[int] = []

    def counted(program: Program, *args: Any) -> Dimensions:
        named.append(len(program.operations))
        return name_dimensions(program, *args)

    monkeypatch.setattr(annotated_function, "name_dimensions", counted)
    found = autoshard.search(function(BLOCK), *arguments(BLOCK), topology=CHIPS, donate_argnums=1)
    assert found.padding
    assert len(named) == 2  # the function as it is written, and the plan's


def test_what_divides_is_searched_once() -> None:
    said: list[str] = []
    even = Block(batch=4, context=4, d_model=8, d_ff=16, kv_heads=4, queries_per_kv=1, d_head=4, vocab=12)
    found = autoshard.search(function(even), *arguments(even), topology=CHIPS, donate_argnums=1, progress=said.append)
    assert not found.padding
    assert not any("padded" in each for each in said)


@pytest.mark.long
@pytest.mark.parametrize(
    ("topology", "tokens"), [("v5e:2x4", 1024), ("v5e:4x4", 1024), ("v4:4x4x4", 1024), ("v5e:4x4", 1)]
)
def test_one_matmul_for_unequal_queries_keys_and_values_costs_little_more_than_three(
    topology: str, tokens: int
) -> None:
    """The parts are gathered before the split. Layers have the sizes of Llama 3 8B: 32 heads share 8 keys and values."""
    width, heads, shared, head, hidden = 4096, 32, 8, 128, 14_336

    def rest(weights: Any, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (each.reshape(*each.shape[:2], shared, -1, head) for each in (q, k, v))
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k[:, :, :, 0], preferred_element_type=jnp.float32)
        seen = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores).astype(v.dtype), v[:, :, :, 0])
        x = x + seen.reshape(*x.shape[:2], -1) @ weights["o"]
        return x + jax.nn.silu(x @ weights["up"]) @ weights["down"]

    def fused(weights: Any, x: jax.Array) -> jax.Array:
        return rest(weights, x, *jnp.split(x @ weights["qkv"], [heads * head, (heads + shared) * head], -1))

    def apart(weights: Any, x: jax.Array) -> jax.Array:
        return rest(weights, x, *(x @ weights[name] for name in "qkv"))

    columns = {"q": heads * head, "k": shared * head, "v": shared * head}
    other = {"o": (heads * head, width), "up": (width, hidden), "down": (hidden, width)}
    one = other | {"qkv": (width, sum(columns.values()))}
    three = other | {name: (width, count) for name, count in columns.items()}
    steps = []
    for fn, shapes in ((fused, one), (apart, three)):
        weights = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
        x = jax.ShapeDtypeStruct((1 if tokens > 1 else 16, tokens, width), jnp.bfloat16)
        steps.append(autoshard.search(fn, weights, x, topology=topology).estimate.seconds)
    assert steps[0] < 1.15 * steps[1]
