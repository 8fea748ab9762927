"""Other plans beside a plan: pins, plain layouts, why-not, the best few, differences, phases; in Python and as commands."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isinf
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.plan import loads
from autoshard.planning.baselines import FAMILIES
from autoshard.planning.files.plan_file import dumps
from examples import llama, palm
from tests.support.cli import refused, run
from tests.support.paths import PALM, ROOT, TINY

TOPOLOGY = "cpu:2x2"


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    work = palm.decode(size="tiny", batch=8, context=16)
    return autoshard.search(work.fn, *work.args, topology=TOPOLOGY, donate_argnums=work.donate_argnums, baselines=True)


@pytest.fixture(scope="module")
def plan_file(plan: autoshard.Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    return path


# --- pins


def layer(params, x):
    hidden = autoshard.pin(jax.nn.relu(x @ params["up"]), P(None, "y"))
    return hidden @ params["down"]


LAYER = (
    {"up": jax.ShapeDtypeStruct((64, 256), jnp.float32), "down": jax.ShapeDtypeStruct((256, 64), jnp.float32)},
    jax.ShapeDtypeStruct((32, 64), jnp.float32),
)


def test_pins_are_kept_and_the_program_computes_the_same():
    plan = autoshard.search(layer, *LAYER, topology=TOPOLOGY, pins={"params.up": P("x", "y"), "x": P("x")})
    assert plan.in_specs[0]["up"] == P("x", "y") and plan.in_specs[1] == P("x")
    draws = np.random.default_rng(0)
    args = jax.tree.map(lambda leaf: draws.normal(size=leaf.shape).astype(leaf.dtype), LAYER)
    np.testing.assert_allclose(plan.jit(layer)(*args), layer(*args), rtol=1e-4, atol=1e-4)
    assert autoshard.search(layer, *LAYER, topology=TOPOLOGY, pins=({"up": P("x", "y"), "down": None}, None)).in_specs[
        0
    ]["up"] == P("x", "y")


@pytest.mark.parametrize(
    ("pins", "said"),
    (
        ({"params.nothing": P("x")}, "matches no argument; the paths are params.down, params.up, x."),
        ({"params.up": P("w")}, "names axis 'w'; cpu:2x2 has x, y."),
        ({"params.up": P("x", "x")}, "uses an axis twice"),
        ({"x": P(("x", "y"), None, "x")}, "at most 2 dimensions, got 3"),
        ({"params.*": P("x"), "params.up": P("y")}, "contradicts another pin of params['up']"),
        (({"up": P("x")},), "has 1 leaves, but the arguments have 3"),
    ),
)
def test_pins_that_cannot_be_are_refused(pins, said: str):
    with pytest.raises(autoshard.PinError) as caught:
        autoshard.search(layer, *LAYER, topology=TOPOLOGY, pins=pins)
    assert said in str(caught.value)


def test_pins_that_leave_no_room_are_named():
    """Only the pins that cannot be held together are to blame."""
    room = 64 * 256 * 4 + 64_000  # one weight may be whole, the other not
    pins = {"params.up": P(), "params.down": P(), "x": P("x")}
    with pytest.raises(autoshard.PinError) as caught:
        autoshard.search(layer, *LAYER, topology=TOPOLOGY, pins=pins, memory_bytes=room)
    assert "params.up" in str(caught.value) and "params.down" in str(caught.value) and "x=" not in str(caught.value)


# --- plain layouts


def test_no_plain_layout_is_faster(plan: autoshard.Plan):
    assert [each.name for each in plan.baselines] == list(FAMILIES)
    for each in plan.baselines:
        assert each.seconds >= plan.estimate.seconds * (1 - 1e-9)
        assert isinf(each.seconds) == bool(each.why)
    text = plan.explain()
    assert "Baselines, each the best of its kind" in text and all(name in text for name in FAMILIES)


def test_plain_layouts_travel_in_plan_files(plan: autoshard.Plan):
    assert loads(dumps(plan)).baselines == plan.baselines
    unfit = replace(
        plan, baselines=(replace(plan.baselines[0], seconds=float("inf"), bound_seconds=float("inf"), why="no"),)
    )
    assert loads(dumps(unfit)).baselines == unfit.baselines and "no" in unfit.explain()


def test_a_plain_layout_within_noise_will_do(plan: autoshard.Plan):
    close = replace(plan.baselines[0], seconds=plan.estimate.seconds * 1.001, name="Megatron 1D")
    assert "Megatron 1D is good enough" in replace(plan, baselines=(close,)).explain()
    far = replace(close, seconds=plan.estimate.seconds * 1.5)
    assert "good enough" not in replace(plan, baselines=(far,)).explain()


# --- why not, best, diff


@pytest.mark.parametrize("family", FAMILIES)
def test_why_not_prices_a_family(plan: autoshard.Plan, family: str):
    found = autoshard.why_not(plan, family)
    assert found.seconds >= -1e-9 * plan.estimate.seconds
    solved = next(each.seconds for each in plan.baselines if each.name == family)
    assert found.after.estimate.seconds == pytest.approx(solved)
    assert found.after.name == f"{plan.name}, {family}"


def test_operations_account_for_the_whole_difference(plan: autoshard.Plan):
    found = autoshard.why_not(plan, pins={"params.layers.wi_gate": P(None, ("y", "x"))})
    assert found.after.in_specs[0]["layers"]["wi_gate"] == P(None, ("y", "x"))
    assert sum(each.seconds for each in found.operations) == pytest.approx(found.seconds, rel=1e-6)
    assert any("wi_gate" in each.path for each in found.arrays)
    assert json.loads(json.dumps(found.to_dict()))["after"]["seconds"] == found.after.estimate.seconds


@pytest.mark.long
def test_less_memory_is_priced_or_refused(plan: autoshard.Plan):
    peak = plan.estimate.peak_bytes
    assert autoshard.why_not(plan, memory_bytes=0.9 * peak).seconds >= -1e-9 * plan.estimate.seconds
    with pytest.raises(autoshard.InfeasibleError):
        autoshard.why_not(plan, memory_bytes=1.0)
    with pytest.raises(autoshard.AutoshardError, match="layout must be one of"):
        autoshard.why_not(plan, "Megatron")


@pytest.mark.long
def test_the_best_plans_run_as_planned(plan: autoshard.Plan):
    found = autoshard.best_plans(plan, 3)
    assert found.proven and len(found) == 3 and found[0] is plan
    seconds = [each.estimate.seconds for each in found]
    assert seconds == sorted(seconds)
    work = palm.decode(size="tiny", batch=8, context=16)
    for each in found[1:]:
        assert autoshard.audit(loads(dumps(each)), work.fn, *work.args, target="host").ok


def test_a_plan_does_not_differ_from_itself(plan: autoshard.Plan):
    found = autoshard.diff(plan, loads(dumps(plan)))
    assert found.operations == () and found.arrays == () and found.seconds == 0
    assert "the same" in str(found)


def test_plans_without_a_program_are_refused(plan: autoshard.Plan):
    with pytest.raises(autoshard.AutoshardError, match="lacks its program"):
        autoshard.best_plans(replace(plan, program=None), 2)


# --- phases


def phases(**more) -> autoshard.PhasePlans:
    works = {
        "prefill": palm.prefill(size="tiny", batch=8, length=16),
        "decode": palm.decode(size="tiny", batch=8, context=16),
    }
    return autoshard.search_phases(works, shared="params", topology=TOPOLOGY, **more)


@pytest.mark.long
def test_phases_share_their_weights():
    found = phases(weights={"decode": 16})
    assert found["prefill"].in_specs[0] == found["decode"].in_specs[0]
    total = sum(found.weights[name] * each.estimate.seconds for name, each in found.items())
    assert total <= found.proof.objective_seconds * (1 + 1e-9)  # what handing over takes comes on top
    for name, each in found.items():
        assert each.estimate.seconds >= found.alone_seconds[name] * (1 - 1e-9)
    text = found.explain()
    assert "prefill.result[1]['k'] becomes decode.cache['k']." in text and "OPTIMAL" in text


@pytest.mark.long
def test_phases_share_memory_orders():
    """A shared weight has one order in all phases, a cache that of the result that becomes it; each as its readers need."""
    works = {
        "prefill": llama.prefill(size="8b", batch=4, length=256, layers=1),
        "decode": llama.decode(size="8b", batch=4, context=256, layers=1),
    }
    found = autoshard.search_phases(works, shared="params", topology="v5e:2x2", weights={"decode": 256})
    orders = {name: [each.order for each in plan.arguments] for name, plan in found.items()}
    shared = len(orders["prefill"]) - 1
    assert orders["prefill"][:shared] == orders["decode"][:shared] and any(orders["decode"][:shared])
    handed = {(result, argument) for result, argument in found.handed}
    results = {f"prefill.{each.path}": each for each in found["prefill"].results}
    arguments = {f"decode.{each.path}": each for each in found["decode"].arguments}
    assert handed and all(results[a].order == arguments[b].order for a, b in handed)
    alone = autoshard.search(works["decode"].fn, *works["decode"].args, topology="v5e:2x2", donate_argnums=1)
    assert any(each.order for each in alone.arguments if each.donated)
    assert any(each.order for each in arguments.values() if each.donated)
    assert found["decode"].emission.formats == found["prefill"].emission.formats == "rule"


def test_limits_of_phases_that_cannot_be_are_refused():
    with pytest.raises(autoshard.AutoshardError, match=r"No layout meets the limit .* of decode"):
        phases(at_most={"decode": 1e-9})
    with pytest.raises(autoshard.AutoshardError, match="a limit for one of prefill, decode"):
        phases(at_most={"training": 1.0})
    with pytest.raises(autoshard.AutoshardError, match="must be among prefill, decode, got 'training'"):
        phases(weights={"training": 1.0})


# --- as commands


def test_search_takes_pins_and_compares():
    found = run(
        "search", PALM, "-t", "cpu:2x2", *TINY, "--pin", "params.layers.wi_gate=None,x,y", "--baselines", "--no-fold"
    )
    assert found.exit_code == 0 and "Baselines" in found.stdout and "P(None, 'x', 'y')" in found.stdout
    assert "Invalid pin" in refused("search", PALM, "-t", "cpu:2x2", *TINY, "--pin", "params")


def test_commands_that_compare(plan_file: Path, tmp_path: Path):
    found = run("why-not", plan_file, "Megatron 1D")
    assert found.exit_code == 0 and "Megatron 1D" in found.stdout and "step" in found.stdout
    assert "Give a layout name" in refused("why-not", plan_file)
    assert json.loads(run("why-not", plan_file, "--memory", "1", "--json").stdout)["after"]["status"] == "OPTIMAL"
    best = run("best", plan_file, "-k", "2", "-o", tmp_path / "best")
    assert best.exit_code == 0 and "1. " in best.stdout and "2. " in best.stdout
    diff = run("diff", tmp_path / "best" / "1.json", tmp_path / "best" / "2.json")
    assert diff.exit_code == 0 and diff.stdout.startswith("before: ")


@pytest.mark.long
def test_phases_as_a_command(tmp_path: Path):
    prefill = f"{ROOT / 'examples' / 'palm.py'}:prefill"
    sizes = ("--set", "size=tiny", "--set", "batch=8", "--set", "prefill.length=16", "--set", "decode.context=16")
    found = run("phases", prefill, PALM, "-t", "cpu:2x2", *sizes, "--weight", "decode=16", "-o", tmp_path)
    assert found.exit_code == 0 and "sharing costs" in found.stdout
    assert autoshard.load(tmp_path / "prefill.json").in_specs[0] == autoshard.load(tmp_path / "decode.json").in_specs[0]
    assert "the phase must be one of" in refused("phases", prefill, PALM, "-t", "cpu:2x2", "--set", "train.batch=8")
    assert "must be NAME=NUMBER" in refused("phases", prefill, PALM, "-t", "cpu:2x2", "--weight", "decode=many")
