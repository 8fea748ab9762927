"""A plan says, with its price, which dimensions stay whole though nothing but their rule forces it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoshard
from examples import llama

S = jax.ShapeDtypeStruct


def notes(fn: Any, *args: Any, topology: str = "v5e:2x4", **options: Any) -> list[str]:
    plan = autoshard.search(fn, *args, topology=topology, **options)
    return [each for each in plan.warnings if "whole" in each]


def priced(note: str) -> float:
    """The milliseconds of work that chips do alike."""
    return float(note.split("whole: ")[1].split(" ms of work that chips do alike")[0])


def test_work_that_chips_do_alike_is_priced() -> None:
    """Two rows are split over an axis of two; the chips along the other one sort the same row."""
    (said,) = notes(lambda x: jnp.sort(x, 1), S((2, 2**20), jnp.float32))
    assert said.startswith("sort ") and "keeps a dimension of 1048576 whole: " in said
    assert 0 < priced(said) < float(said.split("of the step's ")[1].split(" ms")[0])


def test_what_joins_the_shards_of_a_whole_dimension_is_priced() -> None:
    (said,) = notes(
        lambda x: jnp.sort(x, 1), S((4, 2**20), jnp.float32), topology="v5e:2x2", pins={"x": jax.P(None, ("x", "y"))}
    )
    assert "keeps a dimension of 1048576 whole: " in said and said.count(" of collectives that join it") == 1


def test_equal_operations_of_a_line_are_one_note() -> None:
    """As the layers of a model that is not scanned."""

    def sorted_often(x: Any) -> Any:
        for k in range(3):
            x = jnp.sort(x * (-1) ** k, 1)
        return x

    (said,) = notes(sorted_often, S((2, 2**20), jnp.float32))
    once = notes(lambda x: jnp.sort(x, 1), S((2, 2**20), jnp.float32))
    assert priced(said) > 2.5 * priced(once[0])


def test_a_whole_operation_is_said_once() -> None:
    (said,) = notes(lambda x: jnp.flip(x), S((2**20,), jnp.float32))
    assert "is computed whole on every chip" in said


@pytest.mark.parametrize("rows", [8, 64])
def test_what_is_shared_among_all_chips_is_not_said(rows: int) -> None:
    assert notes(lambda x: jnp.sort(x, 1), S((rows, 2**20), jnp.float32)) == []


def test_a_decode_step_keeps_nothing_whole_that_matters() -> None:
    work = llama.decode()
    assert notes(work.fn, *work.args, topology="v5e:4x4", donate_argnums=work.donate_argnums) == []
