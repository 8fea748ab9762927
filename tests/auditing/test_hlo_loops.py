"""Trip counts of loops in compiled programs, read from their text."""

from __future__ import annotations

import pytest

from autoshard.auditing.hlo_collectives import collectives, estimated_cycles
from tests.support.auditing.hlo_text import CUBE, program


def loop(extra: str, bound: str = "%n = s32[] constant(118)", compare: str = "compare(%i.1, %n), direction=LT") -> str:
    """A program with a `while` around an all-reduce, its length to be read from the condition."""
    return program(
        f"""
        %start = s32[] constant(0)
        %i0 = s32[] copy(%start)
        %seven = s32[] constant(7)
        %init = (s32[], f32[8,16]{{1,0}}, s32[]) tuple(%i0, %p, %seven)
        %w = (s32[], f32[8,16]{{1,0}}, s32[]) while(%init), condition=%condition, body=%body{extra}
        ROOT %r = f32[8,16]{{1,0}} get-tuple-element(%w), index=1
        """,
        f"""
        %body (carry: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {{
          %carry = (s32[], f32[8,16]{{1,0}}, s32[]) parameter(0)
          %i = s32[] get-tuple-element(%carry), index=0
          %step = s32[] constant(1)
          %next = s32[] add(%i, %step)
          %v = f32[8,16]{{1,0}} get-tuple-element(%carry), index=1
          %s = f32[8,16]{{1,0}} all-reduce(%v), replica_groups=[4,2]<=[8], to_apply=%add
          %kept = s32[] get-tuple-element(%carry), index=2
          ROOT %out = (s32[], f32[8,16]{{1,0}}, s32[]) tuple(%next, %s, %kept)
        }}

        %condition (carry.1: (s32[], f32[8,16], s32[])) -> pred[] {{
          %carry.1 = (s32[], f32[8,16]{{1,0}}, s32[]) parameter(0)
          %i.1 = s32[] get-tuple-element(%carry.1), index=0
          {bound}
          ROOT %test = pred[] {compare}
        }}
        """,
    )


WITHIN = """%n = s32[] constant(118)
          %within = pred[] compare(%i.1, %n), direction=LT
          %live = pred[] custom-call()"""
ENDED = """%n = s32[] constant(118)
          %offset = s32[] constant(65)
          %sum = s32[] add(%offset, %i.1)
          %last = pred[] compare(%sum, %n), direction=EQ
          %other = pred[] custom-call()
          %ended = pred[] or(%last, %other)"""
LENGTHS = [
    (loop(', backend_config={"known_trip_count":{"n":"5"}}'), 5, True),
    (loop(', backend_config="{\\"known_trip_count\\":{\\"n\\":\\"6\\"}}"'), 6, True),
    (loop(', backend_config={"known_trip_count": {"n": 7}}'), 7, True),
    (loop(""), 118, True),
    (loop("", compare="compare(%n, %i.1), direction=GT"), 118, True),
    (loop("", compare="compare(%i.1, %n), direction=LE"), 119, True),
    (loop("", compare="compare(%i.1, %n), direction=NE"), 118, True),
    (loop("", "%n = s32[] get-tuple-element(%carry.1), index=2"), 7, True),  # carried unchanged
    (loop("", "%n = s32[] parameter(1)"), 1, False),
    (loop("", compare="and(%i.1, %n)"), 1, False),
    (loop("", WITHIN, compare="and(%live, %within)"), 118, False),  # it may end before its counter does
    (loop("", WITHIN, compare="and(%within, %live)"), 118, False),
    (loop("", ENDED, compare="not(%ended)"), 53, False),  # not (i + 65 == 118 or done)
    (loop("", ENDED.replace("EQ", "GT"), compare="not(%ended)"), 54, False),
    (loop("", ENDED.replace("EQ", "LT"), compare="not(%ended)"), 0, False),
    (loop("", ENDED, compare="and(%ended, %other)"), 1, False),
    (loop("", ENDED, compare="not(%last)"), 53, True),
    (loop("", ENDED.replace("add(%offset, %i.1)", "subtract(%i.1, %offset)"), compare="not(%last)"), 183, True),
    (loop("", ENDED.replace("add(%offset, %i.1)", "subtract(%offset, %i.1)"), compare="not(%last)"), 1, False),
    (loop("", compare="compare(%i.1, %n), direction=EQ"), 0, True),
    (
        loop("", compare="compare(%i.1, %n), direction=NE").replace(
            "%step = s32[] constant(1)", "%step = s32[] constant(4)"
        ),
        1,
        False,
    ),
    (loop("").replace("add(%i, %step)", "multiply(%i, %step)"), 118, False),
    (loop("").replace("%step = s32[] constant(1)", "%step = s32[] constant(4)"), 30, True),
    (loop("").replace("%start = s32[] constant(0)", "%start = s32[] constant(18)"), 100, True),
    (
        loop("", "%n = s32[] constant(0)", "compare(%i.1, %n), direction=GE")
        .replace("add(%i, %step)", "subtract(%i, %step)")
        .replace("%start = s32[] constant(0)", "%start = s32[] constant(9)"),
        10,
        True,
    ),
]


@pytest.mark.parametrize(("text", "count", "known"), LENGTHS, ids=range(len(LENGTHS)))
def test_a_loops_length(text, count, known):
    (found,) = collectives(text, CUBE)
    assert (found.count, found.count_known) == (count, known)


def test_cycles_are_multiplied_by_loops_and_never_counted_inside_a_fusion():
    cycles = ', backend_config={"window_config":{"estimated_cycles":"100"}}'
    text = (
        loop("").replace("add(%i, %step)", f"add(%i, %step){cycles}").replace("copy(%start)", f"copy(%start){cycles}")
    )
    assert estimated_cycles(text) == 118 * 100 + 100
    assert estimated_cycles(loop("")) is None


def test_what_the_compiler_cannot_estimate_has_no_cycles():
    """libtpu 0.0.50 writes the largest integer for scatters that it offloads to sparse cores."""
    known, unknown = (f', backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}' for n in (100, 2**63 - 1))
    text = (
        loop("").replace("add(%i, %step)", f"add(%i, %step){known}").replace("copy(%start)", f"copy(%start){unknown}")
    )
    assert estimated_cycles(text) == 118 * 100
