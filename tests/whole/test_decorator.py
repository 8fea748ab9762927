"""The decorator: it plans at the first call, finds the plan again, and shares its cache with other processes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import autoshard
from autoshard import decorator
from autoshard.emitting import padded_step
from autoshard.planning.files import plan_cache
from tests.support.effort import tries
from tests.support.paths import ROOT
from tests.support.plans import assert_close, well_linked


def step(params: dict[str, jax.Array], x: jax.Array, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
    hidden = jnp.tanh(x @ params["w"]) * scale
    return hidden, hidden.max(axis=0)


def arguments(rows: int = 8) -> tuple[dict[str, jax.Array], jax.Array]:
    return {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}, jnp.linspace(0.0, 1.0, rows * 8).reshape(rows, 8)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of what was searched."""
    found: list[str] = []

    def counted(target: Any, *rest: Any) -> autoshard.Plan:
        found.append(target.traced.program.name)
        return planned(target, *rest)

    planned = decorator.plan_and_tune
    monkeypatch.setattr(decorator, "plan_and_tune", counted)
    yield found


def files(directory: Path) -> list[str]:
    return sorted(each.name for each in directory.iterdir())


def test_a_decorated_function_plans_once_per_shape(tmp_path, searches) -> None:
    sharded = autoshard.autoshard(step, topology=well_linked("cpu:2x4"), cache_dir=tmp_path)
    assert (sharded.__name__, searches) == ("step", [])
    for rows in (8, 8, 16, 8):
        args = arguments(rows)
        assert_close(sharded(*args), jax.jit(step)(*args))
    assert searches == ["step", "step"] and len(files(tmp_path)) == 2
    plan = sharded.plan_for(*arguments())
    assert isinstance(plan, autoshard.Plan) and plan.topology.name == "cpu:2x4"
    assert len(searches) == 2


def test_it_decorates_with_and_without_options(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(plan_cache, "default_directory", plan_cache.default_directory)
    plain = autoshard.autoshard(step)
    optioned = autoshard.autoshard(topology="cpu:2x2", name="other", cache_dir=tmp_path / "here")(step)
    assert plain.plan_for(*arguments()).topology.name == "cpu:8"
    assert (optioned.plan_for(*arguments()).name, optioned.plan_for(*arguments()).topology.name) == ("other", "cpu:2x2")
    assert len(files(tmp_path / "here")) == 1
    assert str(plan_cache.default_directory()).startswith(str(tmp_path)) == sys.platform.startswith("linux")


def test_arguments_are_placed_wherever_they_are(tmp_path) -> None:
    sharded = autoshard.autoshard(step, topology=well_linked("cpu:8"), cache_dir=tmp_path, donate_argnums=1)
    params, x = arguments()
    wanted = jax.jit(step)(params, x)
    elsewhere = jax.device_put(x, jax.devices()[3])  # committed to another device
    got = sharded(params, elsewhere)
    assert_close(got, wanted)
    plan = sharded.plan_for(params, x)
    hidden = NamedSharding(plan.make_mesh(), plan.out_specs[0])
    assert got[0].sharding.is_equivalent_to(hidden, 2)


def test_keywords_defaults_and_python_numbers(tmp_path, searches) -> None:
    sharded = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
    params, x = arguments()
    assert_close(sharded(x=x, params=params, scale=2.0), jax.jit(step)(params, x, 2.0))
    assert_close(sharded(params, x, 3.0), jax.jit(step)(params, x, 3.0))
    assert_close(sharded(params, x), jax.jit(step)(params, x))
    assert len(searches) == 2  # with and without a scale


def test_it_composes_with_transformations(tmp_path) -> None:
    sharded = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
    params, x = arguments()

    def loss(fn: Any) -> Any:
        return lambda params, x: jnp.sum(fn(params, x)[0] ** 2)

    assert_close(jax.jit(sharded)(params, x), jax.jit(step)(params, x))
    assert_close(jax.jit(jax.grad(loss(sharded)))(params, x), jax.jit(jax.grad(loss(step)))(params, x))
    batch = jnp.stack([x, 2 * x])
    assert_close(jax.vmap(sharded, (None, 0))(params, batch), jax.vmap(step, (None, 0))(params, batch))


# --- the cache


def test_a_plan_is_found_again(tmp_path, searches) -> None:
    first = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
    second = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
    assert_close(first(*arguments()), second(*arguments()))
    assert first.plan_for(*arguments()) == second.plan_for(*arguments())
    assert len(searches) == 1


def test_an_interrupted_plan_is_used_but_not_kept(tmp_path, searches, monkeypatch) -> None:
    counted = decorator.plan_and_tune

    def interrupted(*rest: Any) -> autoshard.Plan:
        plan = counted(*rest)
        return replace(plan, proof=replace(plan.proof, status="FEASIBLE", stopped="interrupted"))

    with monkeypatch.context() as patched:
        patched.setattr(decorator, "plan_and_tune", interrupted)
        first = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
        assert_close(first(*arguments()), jax.jit(step)(*arguments()))
    assert not list(tmp_path.glob("**/*.json"))
    second = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
    assert second.plan_for(*arguments()).proof.stopped == "" and len(searches) == 2


@pytest.mark.parametrize(
    "options",
    ({"topology": "cpu:2x4"}, {"reserve_bytes": 1e9}, {"name": "other"}, {"donate_argnums": 0}, {"strict": True}),
    ids=str,
)
def test_whatever_a_plan_depends_on_keeps_plans_apart(tmp_path, searches, options: dict[str, Any]) -> None:
    autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path).plan_for(*arguments())
    options = {"topology": "cpu:8"} | options
    autoshard.autoshard(step, cache_dir=tmp_path, **options).plan_for(*arguments())
    assert len(searches) == 2 and len(files(tmp_path)) == 2


def test_functions_that_compute_the_same_from_other_nests_have_their_own_plans(tmp_path, searches) -> None:
    for fn, args in ((lambda a: a["x"] * 2, ({"x": jnp.ones(8)},)), (lambda a: a[0] * 2, ([jnp.ones(8)],))):
        sharded = autoshard.autoshard(fn, topology="cpu:8", cache_dir=tmp_path, name="fn")
        assert_close(sharded(*args), jnp.full(8, 2.0))
    assert len(searches) == 2


@pytest.mark.parametrize("content", ("", '{"autoshard_plan": 1, "name"', '{"autoshard_plan": 99}'))
def test_a_broken_cached_plan_is_replaced_with_a_warning(tmp_path, content: str) -> None:
    autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path).plan_for(*arguments())
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(content)
    sharded = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="autoshard searches again and replaces a cached plan: .*json"):
        assert_close(sharded(*arguments()), jax.jit(step)(*arguments()))
    again = json.loads(file.read_text())
    assert (again["fingerprint"], again["arguments"]) == (whole["fingerprint"], whole["arguments"])
    assert files(tmp_path) == [file.name]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    sharded = autoshard.autoshard(step, topology="cpu:8", cache_dir=tmp_path / "file")
    with pytest.warns(UserWarning, match=r"autoshard .*file"):
        assert_close(sharded(*arguments()), jax.jit(step)(*arguments()))
    assert (tmp_path / "file").read_text() == "in the way" and files(tmp_path) == ["file"]


PROCESS = """
    import sys
    import jax
    import jax.numpy as jnp
    import autoshard

    @autoshard.autoshard(topology="cpu:2", cache_dir=sys.argv[1])
    def fn(x, y):
        return jnp.tanh(x @ y)

    print(fn.plan_for(jax.ShapeDtypeStruct((8, 8), "float32"), jax.ShapeDtypeStruct((8, 8), "float32")).fingerprint)
"""


@pytest.mark.long
def test_several_processes_share_one_cache(tmp_path) -> None:
    """All start at once on an empty cache, which ends up with one whole plan and nothing else."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(PROCESS), str(tmp_path / "cache")]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(tries(8, least=3))
    ]
    outcomes = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), outcomes
    assert len({out for out, _ in outcomes}) == 1
    (file,) = (tmp_path / "cache").iterdir()
    assert autoshard.load(file).fingerprint == outcomes[0][0].strip()


def layers(weights: list[jax.Array], cache: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    for up in weights:
        x = x + jnp.tanh(x @ up) @ up.T
    return x, cache + x


def odd_arguments() -> tuple[list[jax.Array], jax.Array, jax.Array]:
    weights = [jnp.sin(jnp.arange(512.0 * 1021).reshape(512, 1021) + k) / 32 for k in range(2)]
    x = jnp.cos(jnp.arange(64.0 * 512)).reshape(64, 512)
    return weights, x + 1, x


@pytest.mark.long
@pytest.mark.filterwarnings("error")
def test_arguments_are_padded_once_and_results_come_without_padding(tmp_path, monkeypatch) -> None:
    padded_arrays: list[tuple[int, ...]] = []

    def counted(array: Any, paddings: Any) -> Any:
        padded_arrays.append(array.shape)
        return as_padded(array, paddings)

    as_padded = padded_step.padded
    monkeypatch.setattr(padded_step, "padded", counted)
    sharded = autoshard.autoshard(layers, topology="cpu:4", cache_dir=tmp_path, donate_argnums=1, quiet=True)
    weights, cache, x = odd_arguments()
    for _ in range(2):
        found, cache = sharded(weights, cache, x)
    assert [(each.size, each.padded) for each in sharded.plan.padding] == [(1021, 1024)] * 2
    assert padded_arrays == [(512, 1021)] * 2  # each weight once, in two calls
    assert (found.shape, cache.shape) == ((64, 512), (64, 512))
    assert_close(found, layers(*odd_arguments())[0])
    step = sharded._planner.last.jitted
    assert len(step._copies) == 2
    del weights, found
    gc.collect()
    assert not step._copies


def test_without_padding_a_decorated_function_is_planned_as_it_is(tmp_path) -> None:
    padded, plain = (
        autoshard.autoshard(layers, topology="cpu:4", cache_dir=tmp_path, quiet=True, padding=padding)
        for padding in (True, False)
    )
    assert padded.plan_for(*odd_arguments()).padding
    assert not plain.plan_for(*odd_arguments()).padding
    assert len(files(tmp_path)) == 2


def test_a_donated_argument_that_each_call_would_pad_is_left_as_it_is(tmp_path) -> None:
    """The padding of the cache saves less than it takes to pad and cut it at each call."""

    def step(cache: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.nn.softmax(x @ cache.T) @ cache, cache + x

    args = jax.ShapeDtypeStruct((16_373, 64), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.float32)
    assert autoshard.search(step, *args, topology="cpu:4", donate_argnums=0).padding
    sharded = autoshard.autoshard(step, topology="cpu:4", cache_dir=tmp_path, donate_argnums=0, quiet=True)
    assert not sharded.plan_for(*args).padding
