"""Rules with random parameters, shapes and strategies: pieces put together are the whole, and JAX's own typing agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from autoshard.emitting import spec_of
from search.formulation.strategies import output_layout
from tests.support.effort import examples
from tests.support.rules.calls import MOVING, ORACLE, Call, calls
from tests.support.rules.rule_laws import chip_by_chip, drawn_strategy, explicit_layouts

FAMILIES = [pytest.param(family, id=family.__name__.strip("_")) for family in (*ORACLE, *MOVING)]
OPINIONS = [pytest.param(family, id=family.__name__.strip("_")) for family in ORACLE]
SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
QUICK = examples(12, 3, suppress_health_check=SLOW)
THOROUGH = settings(max_examples=300, suppress_health_check=SLOW)


@pytest.mark.parametrize("family", FAMILIES)
@QUICK
@given(st.data())
def test_pieces_put_together_are_the_whole(family: Any, data: st.DataObject) -> None:
    check_pieces(data.draw(calls(family)), data)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@THOROUGH
@given(st.data())
def test_pieces_put_together_are_the_whole_at_length(family: Any, data: st.DataObject) -> None:
    check_pieces(data.draw(calls(family)), data)


def check_pieces(call: Call, data: st.DataObject) -> None:
    """One strategy of a call, chip by chip."""
    equation = call.traced()
    assume(equation is not None)
    assert equation is not None
    found = chip_by_chip(equation, drawn_strategy(data.draw, equation.op))
    for got, want in zip(found, equation.results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", OPINIONS)
@examples(40, suppress_health_check=SLOW)
@given(st.data())
def test_explicit_sharding_mode_agrees_where_it_has_an_opinion(family: Any, data: st.DataObject) -> None:
    call = data.draw(calls(family))
    equation = call.traced()
    assume(equation is not None)
    assert equation is not None
    op = equation.op
    strategy = drawn_strategy(data.draw, op)
    given_factors = {factor for use in op.inputs for dim in use.dims for factor in dim}
    made = any(axes and i not in given_factors for i, axes in enumerate(strategy.splits))
    if any(strategy.carried) or made:
        event(
            "not asked"
        )  # explicit mode has no partial sums unless it is told to, and never splits a dimension that it makes
        return
    opinion = explicit_layouts(call, equation, strategy)
    event("no opinion" if opinion is None else "an opinion")
    if opinion is not None:
        ours = [spec_of(output_layout(op.signature, strategy, k)) for k in range(len(op.outputs))]
        assert [_plain(spec) for spec in opinion] == [_plain(spec) for spec in ours]


def _plain(spec: Any) -> tuple[tuple[str, ...], ...]:
    parts = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)
