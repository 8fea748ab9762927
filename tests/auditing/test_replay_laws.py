"""Laws of the replay that hold for every schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoshard.auditing.replay import replay_steps
from autoshard.auditing.schedule import Branches, Copy, Label, Loop, Send, Step, Wait, Work

TIMES = st.floats(0, 10)
LINKS = st.frozensets(st.sampled_from([("x", 1), ("x", -1), ("y", 1)]), min_size=1)


@st.composite
def schedules(draw: st.DrawFn, depth: int = 2) -> tuple[Step, ...]:
    """Work, copies and collectives that are awaited in the same computation, loops and branches."""
    steps: list[Step] = []
    waiting: list[Wait] = []
    for _ in range(draw(st.integers(0, 5))):
        label = Label(f"i{draw(st.integers(0, 10**9))}", "fusion", "", "")
        kind = draw(st.sampled_from(["work", "work", "copy", "send", "send", "loop", "branches"]))
        if kind == "work":
            whole = draw(TIMES)
            steps.append(Work(label, whole, whole * draw(st.floats(0, 1))))
        elif kind == "copy":
            steps.append(Copy(label, draw(TIMES)))
            waiting.append(Wait(label.name))
        elif kind == "send":
            steps.append(Send(label, draw(TIMES), draw(LINKS), apart := draw(st.booleans())))
            waiting += [Wait(label.name)] * apart
        elif depth and kind == "loop":
            steps.append(Loop(draw(st.integers(0, 4)), draw(schedules(depth - 1))))
        elif depth and kind == "branches":
            steps.append(Branches((draw(schedules(depth - 1)), draw(schedules(depth - 1)))))
        if waiting and draw(st.booleans()):
            steps.append(waiting.pop(draw(st.integers(0, len(waiting) - 1))))
    return (*steps, *waiting)


def changed(steps: tuple[Step, ...], at: Any) -> tuple[Step, ...]:
    """The steps, each replaced by what `at` makes of it; left out where that is None."""
    found = []
    for step in steps:
        if isinstance(step, Loop):
            step = replace(step, body=changed(step.body, at))
        elif isinstance(step, Branches):
            step = replace(step, bodies=tuple(changed(body, at) for body in step.bodies))
        if (other := at(step)) is not None:
            found.append(other)
    return tuple(found)


def labels(steps: tuple[Step, ...]) -> list[str]:
    found: list[str] = []
    changed(steps, lambda step: found.append(step.label.name) if isinstance(step, (Work, Copy, Send)) else step)
    return found


def at_most(less: float, more: float) -> bool:
    return less <= more or math.isclose(less, more, rel_tol=1e-9, abs_tol=1e-9)


@given(schedules(), st.floats(0, 100))
def test_a_step_is_what_the_core_runs_and_waits_for_and_never_below_the_floor(steps: Any, floor: float) -> None:
    found = replay_steps(steps, floor)
    assert found.seconds >= floor
    parts = found.core_seconds + found.exposed_seconds + found.copy_seconds
    assert max(parts, floor) == pytest.approx(found.seconds)
    assert sum(each.seconds for each in found.costly) == pytest.approx(parts)


@given(schedules(), st.data())
def test_leaving_an_instruction_out_never_lengthens_a_step(steps: Any, data: st.DataObject) -> None:
    names = labels(steps)
    out = data.draw(st.sampled_from(names)) if names else ""
    less = changed(steps, lambda step: None if getattr(step, "label", None) and step.label.name == out else step)
    assert at_most(replay_steps(less).seconds, replay_steps(steps).seconds)


@given(schedules(), st.floats(0, 1), st.floats(0, 1))
def test_more_bandwidth_never_costs_more(steps: Any, hbm: float, links: float) -> None:
    def faster(step: Step) -> Step:
        if isinstance(step, Send):
            return replace(step, seconds=step.seconds * links)
        return replace(step, hbm_seconds=step.hbm_seconds * hbm) if isinstance(step, (Work, Copy)) else step

    assert at_most(replay_steps(changed(steps, faster)).seconds, replay_steps(steps).seconds)


LONG = Label("long", "copy-start", "", "")


@given(schedules(depth=1), st.integers(0, 6), schedules(depth=0))
@example((Work(LONG, 1.0, 0.0),), 6, (Copy(LONG, 5.0), Wait(LONG.name)))
def test_a_loop_is_its_rounds_one_after_the_other(body: Any, rounds: int, before: Any) -> None:
    """Also where copies and collectives are under way before it that are awaited after it."""
    started = changed(before, lambda step: None if isinstance(step, Wait) else step)
    awaited = tuple(step for step in before if isinstance(step, Wait))
    looped = replay_steps((*started, Loop(rounds, body), *awaited))
    unrolled = replay_steps((*started, *body * rounds, *awaited))
    assert looped.seconds == pytest.approx(unrolled.seconds)
    assert looped.exposed_seconds == pytest.approx(unrolled.exposed_seconds)
    assert looped.copy_seconds == pytest.approx(unrolled.copy_seconds)


@given(schedules())
def test_nothing_beats_the_work_of_the_core_and_of_every_link(steps: Any) -> None:
    """Overlap hides communication behind work; it shortens neither."""
    straight = changed(steps, lambda step: step if not isinstance(step, (Loop, Branches)) else None)
    found = replay_steps(straight)
    core = sum(step.seconds for step in straight if isinstance(step, Work))
    hbm = sum(step.hbm_seconds for step in straight if isinstance(step, (Work, Copy)))
    sends = [step for step in straight if isinstance(step, Send)]
    wire = max((sum(s.seconds for s in sends if link in s.links) for s in sends for link in s.links), default=0.0)
    assert at_most(max(core, hbm, wire), found.seconds)
    assert at_most(found.seconds, core + hbm + sum(step.seconds for step in sends))
