"""What the census says of a function, and on the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autoshard
from autoshard.explaining.rule_coverage import census_of, census_of_plan
from tests.support.cli import refused, run
from tests.support.paths import PALM, TINY
from tests.support.tracing import trace

X = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def opaque(x: jax.Array) -> jax.Array:
    """A product that has a rule, and a callback that has none."""
    return jax.pure_callback(lambda y: y, X, x @ x)


def test_what_has_no_rule_is_named_with_its_share() -> None:
    found = autoshard.census(opaque, X)
    (without,) = found.conservative
    assert without.primitive == "pure_callback" and without.equations == 1
    assert found.exact["equations"] == 0.5
    assert found.exact["flops"] == 1.0
    assert 0 < found.exact["seconds"] < 1
    assert "Without a rule, and so replicated on every chip: pure_callback." in str(found)


def test_shares_add_up_and_loops_count_their_rounds() -> None:
    def looped(x: jax.Array, rounds: int) -> jax.Array:
        return lax.scan(lambda c, _: (c @ x, None), x, None, length=rounds)[0]

    once = autoshard.census(lambda x: x @ x, X)
    seven, twice_as_many = (autoshard.census(partial(looped, rounds=rounds), X) for rounds in (7, 14))
    assert once.equations == seven.equations == 1
    assert seven.rows[0].flops == 7 * once.rows[0].flops == 7 * 2 * 64**3
    assert twice_as_many.rows[0].seconds == pytest.approx(2 * seven.rows[0].seconds)
    assert seven.rows[0].bytes < 7 * once.rows[0].bytes  # what goes round stays on the chip


def test_a_sort_keeps_its_dimension_whole() -> None:
    found = autoshard.census(lambda x: lax.sort(x, dimension=1), X)
    assert found.exact["seconds"] == 1.0 and found.kept_whole == 1.0
    assert autoshard.census(lambda x: x + 1, X).kept_whole == 0.0


def test_of_a_plan() -> None:
    plan = autoshard.search(opaque, X, topology="cpu:2x2")
    found = census_of_plan(plan)
    assert found.basis == "the plan on cpu:2x2"
    assert found.exact["seconds"] < 1
    total = sum(row.seconds for row in found.rows)
    assert total == pytest.approx(sum(op.seconds + op.collective_seconds for op in plan.operations))


def test_nothing_to_count() -> None:
    found = census_of(trace(lambda: 1.0).program)
    assert found.rows == () and found.exact["seconds"] == 1.0 and found.kept_whole == 0.0


def test_command(tmp_path: Path) -> None:
    found = run("trace", "--census", PALM, *TINY)
    assert found.exit_code == 0
    assert "dot_general" in found.stdout and "Under exact rules: 100.0 % of equations" in found.stdout
    counted = json.loads(run("trace", PALM, *TINY, "--json").stdout)
    assert counted["exact"]["seconds"] == 1.0
    assert counted["equations"] == sum(row["equations"] for row in counted["rows"])
    assert "dot_general" not in run("trace", PALM, *TINY).stdout


def test_command_refuses_a_chip_that_there_is_not() -> None:
    assert refused("trace", PALM, *TINY, "--chip", "v99").startswith("There is no chip 'v99' in the catalogue.")
