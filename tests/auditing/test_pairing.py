"""What counts as the plan, and what as something else, on made-up programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard import Audit
from autoshard.auditing import bounds
from autoshard.auditing.findings import CompileTarget
from autoshard.auditing.matching import pair_collectives
from autoshard.planning.records import PlannedCollective
from benchmarks.audits import LIMITS
from tests.support.auditing.made_up import A2A, AG, AR, CP, KIB, RS, V4, c, compared, p

BIG = p(AR, "xyz", 4096 * KIB, 10)

CASES = {
    "as planned": ([p(AG, "zy", 64, 2)], [c(AG, "yz", 64, 2)], "tpu", []),
    "a loop's first round apart": ([p(AG, "x", 64, 3)], [c(AG, "x", 64, 2), c(AG, "x", 64)], "tpu", []),
    "padded a little": ([p(AG, "x", 10_000)], [c(AG, "x", 10_020)], "tpu", []),
    "axes of one chip": ([p(AG, "x", 64)], [c(AG, "x", 64), c(AG, "", 64)], "tpu", []),
    "combined": (
        [p(AR, "x", 64, 2), p(AR, "x", 64, 2)],
        [c(AR, "x", 128, 2, "combined 2")],
        "tpu",
        [("same plan at lower cost", False)],
    ),
    "in pieces": ([p(A2A, "x", 128)], [c(A2A, "x", 64), c(A2A, "x", 64)], "host", [("same plan", False)]),
    "an all-reduce in its two halves": (
        [p(AR, "x", 64 * KIB)],
        [c(RS, "x", 64 * KIB), c(AG, "x", 64 * KIB)],
        "host",
        [("same plan", False)],
    ),
    "all-reduce and slice, on host devices": (
        [p(RS, "x", 64)],
        [c(AR, "x", 64)],
        "host",
        [("same plan at higher cost", True)],
    ),
    "all-reduce and slice, on a TPU": (
        [p(RS, "x", 4096 * KIB)],
        [c(AR, "x", 4096 * KIB, spelling="scatter by all-reduce")],
        "tpu",
        [("same plan at higher cost", True)],
    ),
    "the same, too small to count": (
        [BIG, p(RS, "x", 64)],
        [c(AR, "xyz", 4096 * KIB, 10), c(AR, "x", 64)],
        "tpu",
        [("same plan at higher cost", False)],
    ),
    "gathered among zeros": (
        [p(AG, "x", 4096 * KIB)],
        [c(AR, "x", 4096 * KIB, spelling="gather by all-reduce")],
        "tpu",
        [("same plan at higher cost", True)],
    ),
    "an all-reduce that gathers nothing": (
        [p(AG, "x", 4096 * KIB)],
        [c(AR, "x", 4096 * KIB)],
        "tpu",
        [("unplanned", True), ("missing", True)],
    ),
    "other axes": ([p(AG, "x", 64)], [c(AG, "y", 64)], "tpu", [("missing", True), ("unplanned", True)]),
    "other bytes": ([p(AG, "x", 64)], [c(AG, "x", 70)], "tpu", [("unplanned", True), ("missing", True)]),
    "too often": ([p(AG, "x", 64)], [c(AG, "x", 64, 2)], "tpu", [("unplanned", True)]),
    "groups that are no axes": ([p(AG, "x", 64)], [c(AG, None, 64)], "tpu", [("unplanned", True), ("missing", True)]),
    "a small permutation": (
        [BIG],
        [c(AR, "xyz", 4096 * KIB, 10), c(CP, "x", 64, 1, "reduce-scatter realignment")],
        "tpu",
        [("unplanned", False)],
    ),
    "a permutation of padded rows": (
        [p(RS, "x", 1024 * KIB, 2)],
        [
            c(RS, "x", 1024 * KIB, 2, "all-reduce-scatter fusion"),
            c(CP, "x", 32 * KIB, 2, "reduce-scatter realignment"),
        ],
        "tpu",
        [("same plan at higher cost", True)],
    ),
    "a permutation of one tile, which is all latency": (
        [p(RS, "x", 4096 * KIB, 2)],
        [
            c(RS, "x", 4096 * KIB, 2, "all-reduce-scatter fusion"),
            c(CP, "x", 4 * KIB, 2, "reduce-scatter realignment"),
        ],
        "tpu",
        [("same plan at higher cost", False)],
    ),
    "the same, too cheap to count": (
        [p(RS, "x", 4096 * KIB, 2), BIG],
        [
            c(AR, "xyz", 4096 * KIB, 10),
            c(RS, "x", 4096 * KIB, 2, "all-reduce-scatter fusion"),
            c(CP, "x", 4 * KIB, 2, "reduce-scatter realignment"),
        ],
        "tpu",
        [("same plan at higher cost", False)],
    ),
    "an array gathered for its slices": (
        [],
        [c(AG, "x", 64, only_sliced=True)],
        "tpu",
        [("unplanned", True)],
    ),
    "nothing planned": ([], [c(AG, "x", 64)], "tpu", [("unplanned", True)]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_counts_as_the_plan(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, compiled, target, expected = CASES[case]
    found = compared(monkeypatch, planned, compiled, target)
    assert sorted(said(found)) == sorted(expected)
    assert found.ok == (not any(counts for _, counts in expected))


def said(found: Audit) -> list[tuple[str, bool]]:
    """Kinds of differences and whether they count, without the bytes that leave their bounds by them."""
    return [(each.kind, each.counts) for each in found.differences if each.kind != "bytes on the wire"]


def kinds(found: Audit) -> list[str]:
    return [kind for kind, _ in said(found)]


COLLECTIVES = st.lists(
    st.tuples(
        st.sampled_from([AG, RS, AR, A2A]), st.sampled_from(["x", "y", "xy"]), st.integers(1, 2**24), st.integers(1, 9)
    ),
    max_size=4,
)


@given(COLLECTIVES, COLLECTIVES, st.booleans(), st.sampled_from(["host", "tpu", "gpu"]))
def test_no_program_within_which_bytes_leave_their_bounds_is_as_planned(
    due: list[Any], more: list[Any], twice: bool, target: CompileTarget
) -> None:
    """Compiled are the planned collectives, each reduce-scatter perhaps as an all-reduce, and others."""
    planned = [p(kind, axes, bytes, count) for kind, axes, bytes, count in due]
    compiled = [
        c(AR if twice and kind == RS else kind, axes, bytes, count) for kind, axes, bytes, count in [*due, *more]
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = compared(monkeypatch, planned, compiled, target)
    total = sum(before for before, _ in found.wire_bytes().values())
    for axes, (before, after) in found.wire_bytes().items():
        due_bytes = before - found.saved_bytes().get(axes, 0.0)
        inside = abs(after - due_bytes) <= max(bounds.WIRE * due_bytes, bounds.SMALLEST_WIRE * total)
        assert inside or not found.ok


@pytest.mark.parametrize("target", ["host", "tpu", "gpu"])
def test_differences_of_which_none_counts_do_not_take_bytes_out_of_their_bounds(
    target: CompileTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the bytes over x are nothing beside what is sent over all axes, and still not what was planned over x."""
    planned, compiled = [BIG, p(RS, "x", 128 * KIB)], [c(AR, "xyz", 4096 * KIB, 10), c(AR, "x", 128 * KIB)]
    found = compared(monkeypatch, planned, compiled, target)
    assert said(found) == [("same plan at higher cost", False)]
    assert not found.ok
    assert (
        found.differences[0].text == "over x each chip sends 2.000 times the bytes that the plan expects, 96 KiB more"
    )


def test_the_benchmark_has_the_same_bounds() -> None:
    assert LIMITS == {"wire": bounds.WIRE, "unplanned": bounds.NOTICEABLE, "peak": bounds.MEMORY}


def test_host_devices_send_16_bit_floats_as_32_bit_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [p(AG, "x", 64, 3), p(AG, "x", 128)], [c(AG, "x", 128, 3), c(AG, "x", 256)]
    found = compared(monkeypatch, *work, "host", [(0, "bfloat16"), (1, "bfloat16")])
    assert found.ok and [d.kind for d in found.differences] == ["same plan"]
    assert found.differences[0].text == "host devices have no 16-bit collectives: 4 runs send float32 instead"
    assert found.differences[0].bytes == 3 * 64 + 128
    assert not compared(monkeypatch, *work, "host", [(0, "float32"), (1, "float32")]).ok
    assert not compared(monkeypatch, *work, "tpu", [(0, "bfloat16"), (1, "bfloat16")]).ok


def test_one_array_may_be_sent_once_for_several_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [p(AG, "x", 64, 2), p(AG, "x", 64, 2)], [c(AG, "x", 64, 2)]
    assert kinds(compared(monkeypatch, *work, arrays=[(5, ""), (5, "")])) == ["same plan at lower cost"]
    assert kinds(compared(monkeypatch, *work, arrays=[(5, ""), (6, "")])) == ["missing"]


def test_repetitions_are_what_stays_without_a_partner(monkeypatch: pytest.MonkeyPatch) -> None:
    work = [p(AG, "x", 64), p(AG, "x", 64), p(AG, "x", 64)], [c(AG, "x", 64), c(AG, "x", 64)]
    assert [d.kind for d in compared(monkeypatch, *work, arrays=[(5, ""), (5, ""), (6, "")]).differences] == [
        "same plan at lower cost"
    ]


def test_hundreds_in_one_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [*[p(AR, "xyz", 32 * KIB) for _ in range(32)], *[p(AR, "xyz", 8 * KIB) for _ in range(162)]]
    compiled = [c(AR, "xyz", 2320 * KIB, 1, "combined 194")]
    found = compared(monkeypatch, [BIG, *planned], [c(AR, "xyz", 4096 * KIB, 10), *compiled])
    assert [d.kind for d in found.differences] == ["same plan at lower cost"]
    other = compared(monkeypatch, [BIG, p(AR, "xyz", 999 * KIB), *planned], [c(AR, "xyz", 4096 * KIB, 10), *compiled])
    assert sorted(kinds(other)) == ["missing", "same plan at lower cost"]


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=9), st.data())
def test_those_that_were_combined_are_found_among_others(sizes: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=2))
    whole = sum(sizes[i] for i in chosen)
    planned, combined = [p(AR, "x", size) for size in sizes], c(AR, "x", whole, 1, f"combined {len(chosen)}")
    (pair,) = [pair for pair in pair_collectives(planned, [combined], V4) if pair.compiled]
    assert sum(each.bytes for each in pair.planned) == pytest.approx(whole, rel=0.005)
    assert len(pair.planned) <= len(chosen)


def test_what_a_compiled_collective_combines_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice 6 KiB are as much as three times 4: which were combined stands in the program."""
    planned = [p(AR, "x", size * KIB) for size in (6, 6, 4, 4, 4)]
    whole = 12 * KIB
    threes, twos = c(AR, "x", whole, 1, "combined 3"), c(AR, "x", whole, 1, "combined 2")
    guessed = compared(monkeypatch, planned, [threes, twos])
    assert "missing" in {d.kind for d in guessed.differences}
    said = [replace(threes, parts=(4 * KIB,) * 3), replace(twos, parts=(6 * KIB,) * 2)]
    assert {d.kind for d in compared(monkeypatch, planned, said).differences} == {"same plan at lower cost"}


@pytest.mark.parametrize("dtype, kind", (("bf16", ["same plan at lower cost"]), ("f32", ["missing", "unplanned"])))
def test_what_a_matmul_reads_as_bfloat16_may_be_sent_as_such(monkeypatch: pytest.MonkeyPatch, dtype, kind) -> None:
    """Half of the planned bytes are the same plan if they are those of the narrower type."""
    compiled = [replace(c(AG, "x", 4096 * KIB), dtype=dtype)]
    found = compared(monkeypatch, [p(AG, "x", 8192 * KIB)], compiled, arrays=[(1, "float32")])
    assert sorted(kinds(found)) == kind
    assert found.saved_bytes().get(("x",), 0.0) == (4096 * KIB * 3 / 4 if dtype == "bf16" else 0.0)


@pytest.mark.parametrize("reduction, kind", (("max", ["same plan at lower cost"]), ("add", ["missing", "unplanned"])))
def test_a_maximum_may_be_sent_as_bfloat16_and_a_sum_may_not(monkeypatch: pytest.MonkeyPatch, reduction, kind) -> None:
    """A maximum in float32 is planned beside a minimum of as many bytes of integers."""
    narrow = replace(c(AR, "x", 4096 * KIB), dtype="bf16", reduction=reduction)
    compiled = [replace(c(AR, "x", 8192 * KIB), dtype="s32", reduction="min"), narrow]
    arrays = [(1, "float32"), (2, "int32")]
    found = compared(monkeypatch, [p(AR, "x", 8192 * KIB)] * 2, compiled, arrays=arrays)
    assert sorted(kinds(found)) == kind


def test_two_that_are_sent_as_bfloat16_are_not_the_parts_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are they those that send as many bytes of integers."""
    compiled = [replace(c(AG, "x", size), dtype=dtype) for size, dtype in ((8192 * KIB, "s32"), (4096 * KIB, "bf16"))]
    arrays = [(1, "float32"), (2, "int32"), (3, "float32"), (4, "int32")]
    found = compared(monkeypatch, [p(AG, "x", 8192 * KIB)] * 4, compiled * 2, arrays=arrays)
    assert sorted(kinds(found)) == ["same plan at lower cost"]


def test_a_full_rematerialization_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (
        d for d in compared(monkeypatch, [], [c(AG, "x", 64, only_sliced=True)]).differences if d.kind == "unplanned"
    )
    assert found.text == (
        "all-gather over x of 64 B, palm.py:1: not in the plan, and only slices of it are used (an involuntary full"
        " rematerialization)"
    )


def test_bytes_on_the_wire_that_are_saved_or_unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    once = compared(
        monkeypatch,
        [p(AG, "x", 64, 2), p(AG, "x", 64, 2)],
        [c(AG, "x", 64, 2), c(A2A, "y", 64)],
        arrays=[(5, ""), (5, "")],
    )
    assert once.saved_bytes() == {("x",): 2 * 64 * 3 / 4}
    assert once.unplanned_bytes() == 64 * 3 / 4


@pytest.mark.parametrize(
    ("peak", "kinds"), [(95.0, []), (105.0, []), (94.9, ["peak memory"]), (105.1, ["peak memory"])]
)
def test_peak_memory_within_five_percent(peak: float, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [d.kind for d in compared(monkeypatch, [], [], "tpu", peak=peak).differences] == kinds
    assert not compared(monkeypatch, [], [], "host", peak=peak).differences


def layers(count: int, of: str) -> list[PlannedCollective]:
    """The all-reduces of an unrolled model, one a layer, each at a place of its own."""
    each = p(AR, "x", 4096 * KIB)
    return [replace(each, where=f"params['h']['{i}']['{of}']") for i in range(count)]


def test_what_is_little_in_one_layer_is_much_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [c(AR, "x", 4096 * KIB) for _ in range(200)]
    for more, count in ((1, False), (50, True)):
        found = compared(monkeypatch, layers(200, "up"), [*planned, *[c(AG, "y", 8 * KIB * 8)] * more])
        assert (said(found), found.ok) == ([("unplanned", count)], not count)
        assert any(d.text.startswith("50 times: all-gather over y of 64 KiB") for d in found.differences) == (more > 1)


def test_numbers_may_be_added_up_before_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = [p(AR, "x", 64 * KIB), *(p(AR, "x", 4) for _ in range(16))]
    found = compared(monkeypatch, planned, [c(AR, "x", 64 * KIB), c(AR, "x", 4)])
    (only,) = found.differences
    assert only.kind == "missing" and only.share > 0.5 and found.ok
    assert not compared(monkeypatch, planned, [c(AR, "x", 4)] * 16).ok


def test_layers_alike_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, [*layers(3, "up"), *layers(2, "down")], [c(AR, "x", 4096 * KIB)] * 4)
    assert [line.split() for line in str(found).splitlines()[5:8]] == [
        "all-reduce x 4 MiB 3 all-reduce 4 MiB 3 params['h']['*']['up']".split(),
        "all-reduce x 4 MiB 1 all-reduce 4 MiB 1 params['h']['0']['down']".split(),
        "all-reduce x 4 MiB 1 nothing params['h']['1']['down']".split(),
    ]


def test_the_report_puts_planned_beside_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(
        monkeypatch,
        [p(AG, "zy", 2048, 118), p(AR, "x", 512, 118), p(AR, "x", 512, 118), p(RS, "z", 4096 * KIB)],
        [c(AG, "yz", 2048, 118), c(AR, "x", 1024, 118, "combined 2"), c(CP, "y", 4096 * KIB)],
        peak=106.0,
    )
    assert str(found) == REPORT


REPORT = """\
<lambda> on v4:4x4x4, compiled for the TPU: NOT as planned

Collectives
  planned         axes  payload  runs  compiled                 payload  runs  planned for
  ──────────────  ────  ───────  ────  ───────────────────────  ───────  ────  ────────────────────────────
  all-gather      yz      2 KiB   118  all-gather                 2 KiB   118  w for dot_general
  2 × all-reduce  x       1 KiB   118  all-reduce (combined 2)    1 KiB   118  w for dot_general and 1 more
  reduce-scatter  z       4 MiB     1  nothing                                 w for dot_general
  nothing         y                    collective-permute         4 MiB     1

Bytes that each chip sends in one step
  axes    planned   compiled   ratio
  ────  ─────────  ─────────  ──────
  y           0 B      4 MiB       -
  z         3 MiB        0 B  0.0000
  yz    221.2 KiB  221.2 KiB  1.0000
  x       177 KiB    177 KiB  1.0000

One chip
                                      planned  compiled   ratio
  ──────────────────────────────────  ───────  ────────  ──────
  peak memory                           100 B     106 B  1.0600
  time of collectives (plan's model)      0 s   1.28 ms       -

Differences
  - bytes on the wire: over y each chip sends what is not planned, 4 MiB more (118.0 % of the bytes on the wire)
  - bytes on the wire: over z each chip sends 0.000 times the bytes that the plan expects, 3 MiB less (88.5 % of the
    bytes on the wire)
  - peak memory: the compiled program needs 1.060 times the planned peak (6.0 % of the planned peak)
  - unplanned: collective-permute over y of 4 MiB, palm.py:1: not in the plan (5.3 % of the time on the wire)
  - missing: reduce-scatter over z of 4 MiB, w for dot_general: not in the compiled program (2.1 % of the time on the
    wire)
  - same plan at lower cost: 2 all-reduces over x of 512 B × 118 compiled as all-reduce over x of 1 KiB × 118 (32.6 % of
    the time on the wire)
"""
