"""Plans verified by a compiler: ranking, refusals, baselines and pins as candidates, ways to emit; as a command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard.auditing.audit import AuditError
from autoshard.auditing.findings import Finding
from autoshard.auditing.replay import Replay
from autoshard.candidates import Candidate, Refusal, fit_memory, read_refusal
from autoshard.comparing.verify import Verification
from autoshard.emitting.formats import without_orders
from autoshard.emitting.tpu_workarounds.scoped_memory import LARGE_KIB
from autoshard.errors import InfeasibleError
from autoshard.plan import loads
from autoshard.planning.baselines import FAMILIES
from autoshard.planning.emission import Emission
from autoshard.planning.files.plan_file import dumps
from costmodels.machine.conventions import Pricing
from costmodels.machine.topology import parse_topology
from examples import palm
from tests.support.cli import refused, run
from tests.support.effort import examples
from tests.support.paths import PALM, TINY

TOPOLOGY = "cpu:2x2"
GIB = 2**30
MODEL = """
import jax
import jax.numpy as jnp
import autoshard


def layer(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def work():
    shapes = {"up": (256, 2048), "down": (2048, 256)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return autoshard.Workload(layer, (params, jax.ShapeDtypeStruct((2048, 256), jnp.float32)))
"""
"""Two matmuls with many rows: the fastest layout replicates the weights, the leanest does not."""
SMALL = dict[str, Any]()
exec(compile(MODEL, "model.py", "exec"), SMALL)  # the file that commands are given
WORK: autoshard.Workload = SMALL["work"]()


@pytest.fixture(scope="module")
def plan() -> autoshard.Plan:
    work = palm.decode(size="tiny", batch=8, context=16)
    return autoshard.search(work.fn, *work.args, topology=TOPOLOGY, donate_argnums=work.donate_argnums)


@pytest.fixture(scope="module")
def audit(plan: autoshard.Plan) -> autoshard.Audit:
    work = palm.decode(size="tiny", batch=8, context=16)
    return autoshard.audit(plan, work.fn, *work.args, target="host")


def timed(audit: autoshard.Audit, seconds: float) -> autoshard.Audit:
    return replace(audit, replay=Replay(seconds, 0.0, 0.0, 0.0, 0.0, ()))


@pytest.mark.long
def test_the_best_plans_are_compiled_and_ranked(plan: autoshard.Plan):
    work = palm.decode(size="tiny", batch=8, context=16)
    found = autoshard.verify(plan, work.fn, *work.args, target="host", k=2)
    assert [each.name for each in found.candidates[:2]] == ["", ""] and all(each.name for each in found.candidates[2:])
    assert found.best is plan
    assert all(each.audit is not None and each.audit.ok for each in found.candidates)
    assert f"{len(found.candidates)} plans by their compiled programs" in str(found)


@pytest.mark.long
def test_the_compilers_order_counts_and_is_said(plan: autoshard.Plan, audit: autoshard.Audit):
    """The plan that compiles to the fastest program is taken; its efficiencies make a topology."""
    local = plan.estimate.seconds - plan.estimate.collective_seconds
    slow, fast = (replace(audit, compute_seconds=times * local) for times in (4.0, 2.0))
    found = Verification(
        (Candidate(1, plan, slow), Candidate(2, plan, fast), Candidate(3, plan, None, "too large")), True
    )
    assert [each.place for each in found.ranked] == [2, 1, 3]
    assert found.best.warnings[-1].startswith("This plan, the model's place 2, has the fastest program of the 3")
    assert found.correction() == pytest.approx(3.0)
    before, after = plan.topology.chip, found.calibrated().chip
    assert after.hbm_efficiency == pytest.approx(before.hbm_efficiency / 3)
    assert "too large" in str(found) and "changes the model's order" in str(found)


def test_a_best_program_that_is_much_slower_than_planned_is_said(
    plan: autoshard.Plan, audit: autoshard.Audit, monkeypatch
):
    took = Replay(3 * plan.estimate.seconds, 0.0, 0.0, 0.0, 0.0, ())
    why = Finding("slower than planned", "a step takes 3.00 times the planned time", 0.0, 2.0)
    slow = replace(audit, replay=took, differences=(why,))
    found = Verification((Candidate(1, plan, slow), Candidate(2, plan, None, "too large")), True)
    assert found.is_slow and found.ranked[0].seconds == took.seconds
    assert found.best.warnings[-1] == "Compiled, a step takes 3.00 times the planned time."
    assert "3.00 × the plan" in str(found) and "a step takes 3.00 times" in str(found)
    monkeypatch.setattr("autoshard.comparing.verify.verify", lambda *args, **options: found)
    assert run("search", PALM, "-t", "cpu:2x2", *TINY, "--verify", "host").exit_code == 1


def test_the_fastest_way_to_emit_is_kept_and_said(plan: autoshard.Plan, audit: autoshard.Audit):
    other = replace(plan, emission=Emission("compiler", residual_barriers=False))
    first = Candidate(1, plan, replace(audit, compute_seconds=4e-3))
    for seconds, kept in ((1e-3, other), (3.99e-3, plan), (8e-3, plan)):
        variant = Candidate(1, other, replace(audit, compute_seconds=seconds))
        found = Verification((first,), True, (variant, Candidate(1, other, None, "too large")))
        assert found.best is kept and loads(dumps(found.best)).emission == kept.emission
        assert found.gain == pytest.approx(first.seconds / (first if kept is plan else variant).seconds)
    assert "The plan is unchanged." in str(found) and "too large" in str(found)
    faster = str(Verification((first,), True, (replace(variant, audit=replace(audit, compute_seconds=1e-3)),)))
    assert "The plan keeps the compiler's formats, no barriers in residual sums" in faster


# --- refusals


def test_the_compilers_figures_are_read():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.63G of 15.75G hbm. Exceeded hbm capacity by"
    )
    found = read_refusal(text, 14.8 * GIB)
    assert found is not None and found == Refusal(14.8 * GIB, 16.63 * GIB, 15.75 * GIB)
    assert found.limit_bytes == pytest.approx(14.8 * GIB * 15.75 / 16.63)
    assert read_refusal("INTERNAL: a bug", GIB) is None


@examples(50)
@given(st.floats(0.5, 1.0), st.floats(1.0001, 2.5))
def test_a_refusal_ends_in_a_plan_that_compiles(fullness: float, factor: float):
    """A compiler that needs `factor` times the plan refuses until the plan leaves it that much; limits fall."""
    limits: list[float] = []
    start: Any = _Peak(fullness)

    def again(limit: float) -> Any:
        limits.append(limit)
        return _Peak(limit)

    def compiled(each: Any) -> Candidate[Any]:
        needed = each.bytes * factor
        return Candidate(0, each, None if needed > 1 else _AUDIT, "", "", _refusal(each.bytes, needed))

    found, refusals = fit_memory(start, again, compiled)
    assert found.refusal is None and found.plan.bytes * factor <= 1
    assert limits == sorted(limits, reverse=True) and len(refusals) == len(limits)
    assert bool(refusals) == (fullness * factor > 1)


def test_a_search_that_finds_nothing_smaller_ends():
    def again(limit: float) -> Any:
        raise InfeasibleError("decode does not fit on v5e:4x4. It needs more.")

    found, refusals = fit_memory(
        _Peak(1.0), again, lambda each: Candidate(1, each, None, "Refused.", "", Refusal(1, 2, 1))
    )
    assert found.audit is None and len(refusals) == 1 and found.why.startswith("Refused. No plan fits in less: decode")


class _Peak:
    def __init__(self, peak_bytes: float) -> None:
        self.bytes = peak_bytes


_AUDIT: autoshard.Audit = object()  # pyright: ignore[reportAssignmentType]


def _refusal(planned: float, needed: float) -> Refusal | None:
    return Refusal(planned, needed, 1.0) if needed > 1 else None


@pytest.fixture(scope="module")
def small() -> autoshard.Plan:
    return autoshard.search(WORK.fn, *WORK.args, topology=TOPOLOGY)


@pytest.fixture
def tight(small: autoshard.Plan, audit: autoshard.Audit, monkeypatch) -> float:
    """A compiler that needs a little more than planned, and has just what the plan takes."""
    has = small.estimate.peak_bytes

    def compile_tightly(each, fn, *args, target):
        needs = 1.02 * each.estimate.peak_bytes
        if needs > has:
            raise AuditError(f"The compiler refused it. Used {needs / 2**10:.3f}K of {has / 2**10:.3f}K hbm.")
        return timed(audit, each.estimate.seconds)

    monkeypatch.setattr("autoshard.candidates.audit", compile_tightly)
    return has


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    return f"{tmp_path / 'model.py'}:work"


def test_a_refused_plan_is_searched_again_and_said(small: autoshard.Plan, tight: float):
    found = autoshard.verify(small, WORK.fn, *WORK.args, target="host", k=1)
    assert found.refusals and not found.is_refused
    assert 1.02 * found.best.estimate.peak_bytes <= tight
    said = "The compiler refused a plan with a peak of"
    assert found.best.warnings[-1].startswith(said) and said in " ".join(str(found).split())
    assert any(warning.startswith(said) for warning in loads(dumps(found.best)).warnings)
    assert said in " ".join(found.best.explain().split())


def test_a_refused_plan_as_a_command(tight: float, model: str):
    found = run("search", model, "-t", TOPOLOGY, "--json", "--verify", "host", "--top-k", "1")
    assert found.exit_code == 3
    assert any("The compiler refused" in warning for warning in json.loads(found.stdout)["warnings"])


def test_tune_fits_the_compilers_memory(tight: float):
    found = autoshard.search(WORK.fn, *WORK.args, topology=TOPOLOGY, tune=True)
    assert 1.02 * found.estimate.peak_bytes <= tight and "The compiler refused" in found.warnings[-1]


def test_nothing_compiles(small: autoshard.Plan, model: str, monkeypatch):
    def refuse(each, fn, *args, target):
        raise AuditError("INTERNAL: a bug")

    monkeypatch.setattr("autoshard.candidates.audit", refuse)
    found = autoshard.verify(small, WORK.fn, *WORK.args, target="host", k=1)
    assert found.is_refused and found.best.warnings[-1] == "No plan compiled. INTERNAL: a bug"
    assert run("search", model, "-t", TOPOLOGY, "--verify", "host", "--top-k", "1").exit_code == 1
    with pytest.raises(AuditError, match="a bug"):
        autoshard.search(WORK.fn, *WORK.args, topology=TOPOLOGY, tune=True)


# --- baselines and pins as candidates


def test_no_plan_is_returned_that_is_slower_than_a_baseline_or_a_pin(small: autoshard.Plan, audit, monkeypatch):
    """Whatever the compiled times: the fastest of the model's best, all baselines and the pinned plans is returned."""
    pins = {"rows": {"params.up": P(("x", "y"))}, "columns": {"params.up": P(None, "x")}}
    for fastest in range(5):
        seconds = iter((0.5 if at == fastest else 1.0) * small.estimate.seconds for at in range(20))
        monkeypatch.setattr("autoshard.candidates.audit", lambda *args, target, s=seconds: timed(audit, next(s)))
        found = autoshard.verify(small, WORK.fn, *WORK.args, target="host", k=2, tune=False, pins=pins)
        names = [each.name for each in found.candidates]
        assert names[2:4] == list(pins) and set(names[4:]) <= set(FAMILIES)
        if fastest < len(names):
            assert found.chosen is found.candidates[fastest]
        assert found.chosen.seconds == min(each.seconds for each in found.candidates)
        assert found.candidates[2].plan.in_specs[0]["up"] == P(("x", "y"))


def test_orders_of_another_plan_are_its_own():
    """A candidate's orders of dimensions follow from its own layouts, not from the first plan's."""
    args = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 4, 128), jnp.bfloat16)

    def step(x, w):
        return jnp.einsum("be,ehd->bhd", x, w)

    found = autoshard.search(step, *args, topology="v5e:2x2")
    other = autoshard.why_not(found, pins={"w": P(None, None, ("x", "y"))}).after
    again = autoshard.search(step, *args, topology="v5e:2x2", pins={"w": P(None, None, ("x", "y"))})
    assert [each.order for each in other.arguments] == [each.order for each in again.arguments]


def test_against_as_a_command(model: str):
    given = ("--verify", "host", "--top-k", "1", "--against", "params.up=xy; x=-,x")
    found = run("search", model, "-t", TOPOLOGY, *given)
    assert found.exit_code == 0 and "params.up=xy" in found.stdout, found.output
    assert "--against needs --verify" in refused("search", model, "-t", TOPOLOGY, *given[4:], code=2)


# --- ways to emit, and the command


@pytest.mark.tpu
@pytest.mark.long
@pytest.mark.parametrize("overlap", [0.0, pytest.param("looped", marks=pytest.mark.slow)])
def test_the_compiler_decides_about_rings(monkeypatch: pytest.MonkeyPatch, overlap: Any):
    """Rings hide the reduce-scatter of the second product: 815 µs instead of 969 µs without (libtpu 0.0.42)."""

    def step(x, first, second):
        return jax.nn.gelu(x @ first) @ second

    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 8192), (8192, 16384), (16384, 8192))]
    monkeypatch.setattr("autoshard.comparing.verify.plain_plans", lambda *_: iter(()))
    topology = replace(parse_topology("v5e:4x4"), pricing=Pricing(overlap=overlap))
    plan = autoshard.search(step, *args, topology=topology)
    found = autoshard.verify(plan, step, *args, k=1, tune=False)
    named = {each.name: each for each in found.candidates}
    assert named.keys() >= {"", "no rings" if overlap else "rings beside matmuls"}
    assert found.best.topology.pricing.looped


@pytest.mark.long
@pytest.mark.tpu
def test_formats_that_save_a_relayout_are_found():
    """By default a table of 2,880 columns lies with its rows along the lanes, where they pad less; a look-up wants columns."""

    def step(table, tokens):
        return table[tokens] * jnp.bfloat16(2)

    args = jax.ShapeDtypeStruct((20_000, 2_880), jnp.bfloat16), jax.ShapeDtypeStruct((32,), jnp.int32)
    plan = without_orders(autoshard.search(step, *args, topology="v5e:1x1"))
    found = autoshard.verify(plan, step, *args, k=1)
    assert found.gain > 10 and found.best.emission == Emission("compiler")
    assert found.best.arguments[0].order == (0, 1)
    assert not autoshard.verify(plan, step, *args, k=1, tune=False).variants


@pytest.mark.tpu
@pytest.mark.long
def test_more_on_chip_memory_for_long_attention_is_found():
    """With 64 MiB of on-chip memory for an operation, the scores of 4,096 rows and columns are formed once (libtpu 0.0.50)."""

    def attend(q: Any, k: Any, v: Any):
        scores = jnp.einsum("htd,hsd->hts", q, k, preferred_element_type=jnp.float32)
        causal = jnp.arange(4096)[:, None] >= jnp.arange(4096)
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)).astype(jnp.bfloat16)
        return jnp.einsum("hts,hsd->htd", weights, v)

    args = [jax.ShapeDtypeStruct((4, 4096, 128), jnp.bfloat16)] * 3
    found = autoshard.search(attend, *args, topology="v5e:1x1", tune=True)
    assert found.emission.scoped_memory_kib == LARGE_KIB
    assert any("64 MiB of on-chip memory for an operation" in words for words in found.warnings)
    assert loads(dumps(found)).emission == found.emission


EMISSIONS = [
    Emission(),
    Emission("compiler"),
    Emission(residual_barriers=False),
    Emission(score_barriers=True),
    Emission(rings=False),
    Emission("rule", score_barriers=False, scoped_memory_kib=LARGE_KIB),
]


@pytest.mark.parametrize("emission", EMISSIONS, ids=Emission.words)
def test_every_choice_of_emission_has_words_and_is_saved(plan: autoshard.Plan, emission: Emission):
    assert loads(dumps(replace(plan, emission=emission))).emission == emission
    assert bool(emission.words()) == (emission != Emission())


@pytest.mark.long
def test_verify_as_a_command(tmp_path: Path):
    found = run(
        "search", PALM, "-t", "cpu:2x2", *TINY, "--verify", "host", "--top-k", "2", "-o", tmp_path / "plan.json"
    )
    assert found.exit_code == 0 and "plans by their compiled programs" in found.stdout
    calibration = ("--calibration", tmp_path / "host.toml")
    assert "--verify tpu" in refused("search", PALM, "-t", "cpu:2x2", *TINY, "--verify", "host", *calibration)
