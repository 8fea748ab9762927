"""The time of a compiled step beside the planned one, and the instructions that it is attributed to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.auditing import bounds
from autoshard.auditing.planned_times import attribute_time
from autoshard.auditing.replay import Costly
from tests.support.auditing.made_up import timed


@pytest.mark.parametrize(
    ("planned_seconds", "slow"), [(0.99e-3 / bounds.SLOWER, True), (1.01e-3 / bounds.SLOWER, False)]
)
def test_a_step_that_is_much_slower_than_planned_is_said(planned_seconds: float, slow: bool) -> None:
    found = timed(planned_seconds)
    assert found.step_seconds == pytest.approx(1e-3)
    assert (found.is_slow, found.to_dict()["slow"], "times the planned time" in str(found)) == (slow, slow, slow)
    assert found.ok, "the layout is the planned one"
    said_so = [each.text for each in found.differences if each.kind == "slower than planned"]
    assert bool(said_so) == slow
    if slow:
        assert said_so[0].endswith("the most that is not planned: 1.00 ms of transpose at model.py:7 (copy_fusion × 1)")


def test_the_costliest_instructions_are_listed_with_the_users_line() -> None:
    found = timed(1.0)
    (row,) = found.to_dict()["costliest"]
    assert (row["name"], row["source"], row["scope"]) == ("copy_fusion", "model.py:7", "layer/transpose")
    assert row["seconds"] == row["unplanned_seconds"] == pytest.approx(1e-3)
    assert "1.00 ms      1.00 ms     1  copy_fusion  model.py:7  layer/transpose" in str(found)


def test_only_tpu_programs_are_replayed() -> None:
    for target in ("host", "gpu"):
        found = timed(1e-9, target)
        assert (found.replay, found.step_seconds, found.is_slow, found.costs) == (None, None, False, ())


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10), st.booleans()), max_size=8),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0, 20)),
)
def test_the_planned_time_of_a_line_is_attributed_once(costs: list[Any], due: dict[str, float]) -> None:
    costly = [Costly(str(i), "fusion", at, "", seconds, 1, of) for i, (at, seconds, of) in enumerate(costs)]
    found = attribute_time(costly, due)
    for at in "abc":
        mine = [each for each in found if each.instruction.source == at]
        spent = sum(each.instruction.seconds for each in mine)
        assert sum(each.unplanned_seconds for each in mine) == pytest.approx(
            max(spent - due.get(at, 0.0), 0.0), abs=1e-9
        )
        assert all(0 <= each.unplanned_seconds <= each.instruction.seconds for each in mine)


def test_collectives_are_held_against_the_plan_by_themselves() -> None:
    (found,) = attribute_time([Costly("a", "all-reduce", "model.py:1", "", 1.0, 1, False)], {})
    assert found.unplanned_seconds == 0
