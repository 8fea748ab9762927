"""The frontier of a sweep, its answers, and what prices rest on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoshard.sweep.analysis import answers
from autoshard.sweep.analysis.advice import advice, cost_of
from autoshard.sweep.analysis.answers import render
from autoshard.sweep.analysis.frontier import cheapest, fastest, frontier, gains, longest, switches
from autoshard.sweep.analysis.rows import Row, SweepResult, family
from autoshard.sweep.results import INFEASIBLE, SOLVED
from tests.support.cli import run
from tests.support.scripts.jobs import JOB, job


def a_row(latency: float, cost: float, **other: Any) -> Row:
    numbers: dict[str, Any] = {
        "latency_seconds": latency,
        "chip_seconds_per_token": cost,
        "peak_bytes": 1e9,
        "budget_bytes": 2e9,
    }
    row = Row("decode", "decode", "v5e:4", "v5e", 4, {}, SOLVED, **numbers)
    return replace(row, **other)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20))
def test_the_frontier_is_what_no_row_beats(places: list[tuple[int, int]]):
    rows = [a_row(latency, cost) for latency, cost in places]
    best = {(row.latency_seconds, row.chip_seconds_per_token) for row in frontier(rows)}
    beaten = {(a, b) for (a, b), (c, d) in itertools.product(places, places) if c <= a and d <= b and (c, d) != (a, b)}
    assert best == set(places) - beaten
    assert list(best) is not None and [r.latency_seconds for r in frontier(rows)] == sorted(a for a, _ in best)


def test_the_answers_of_a_few_rows():
    layout = {"decode": {"params['up']": "WS-1D: output over xy"}}
    other = {"decode": {"params['up']": "WG-X: output over y, batch over x"}}
    slow = a_row(0.05, 0.1, chips=16, knobs={"context": 8192, "weights": "bf16"}, layout=other)
    fast = a_row(0.01, 0.4, chips=16, knobs={"context": 2048, "weights": "bf16"}, layout=layout)
    small = a_row(0.02, 0.3, chips=4, knobs={"context": 2048, "weights": "int8"}, layout=layout)
    rows = [slow, fast, small]
    assert cheapest(rows, 0.03) is small
    assert cheapest(rows, 0.001) is None
    assert fastest(rows, 16) is fast
    assert longest(rows, "context") is slow
    assert longest(rows, "context", 0.03) is small
    assert [gain.latency for gain in gains(rows, "weights", "bf16", "int8")] == [0.5]
    assert [each.changes for each in switches(frontier(rows))] == [("up: WS-1D → WG-X",)]


def a_request(first: float, token: float, cost: float, **other: Any) -> Row:
    seconds = {"fill": first, "decode": token}
    kinds = {"fill": "prefill", "decode": "decode"}
    row = a_row(
        first + 64 * token, cost, kind="request", phase="fill + decode", phase_seconds=seconds, phase_kinds=kinds
    )
    return replace(row, **other)


def test_limits_are_of_the_phases_that_are_laid_out_together():
    """A request's own latency is that of prefill and all its tokens: no limit is a limit of that."""
    quick, cheap, slow = a_request(3.0, 0.02, 0.2), a_request(1.0, 0.025, 0.3), a_request(0.5, 0.05, 0.1)
    rows = (quick, cheap, slow)
    assert cheapest(rows) is slow
    assert cheapest(rows, 0.03) is quick
    assert cheapest(rows, 0.03, 2.0) is cheap
    assert cheapest(rows, None, 0.7) is slow
    assert cheapest(rows, 0.01) is None
    limits = {"seconds_per_token": 0.03, "seconds_to_first_token": 2.0}
    sweep = SweepResult("s", rows, constraints=limits)
    (answer,) = answers.answers(sweep)
    assert answer.row is cheap
    assert answer.words.startswith(
        "fill + decode: the cheapest at 30.0 ms per token or less and 2.00 s to the first token or less is v5e:4: "
        "2.60 s per request (1.00 s to the first token, 25.0 ms per token), 300 chip-ms per token"
    )
    (none,) = answers.answer_cheapest(sweep, "fill + decode", 0.01)
    assert "no plan takes 10.0 ms per token or less; the nearest is v5e:4" in none.words
    assert "Allowed are at most 30.0 ms per token, 2.00 s to the first token." in render(sweep)


def test_a_limit_of_one_phase_is_none_of_another():
    first = a_row(0.5, 0.1, kind="prefill", phase="prefill")
    sweep = SweepResult("s", (first, a_row(0.02, 0.1)))
    assert answers.limits_of(sweep, "prefill", 0.03, 2.0) == (None, 2.0)
    assert answers.limits_of(sweep, "decode", 0.03, 2.0) == (0.03, None)
    assert cheapest([first], None, 0.4) is None
    assert cheapest([first], None, 0.6) is first


def test_points_of_another_length_have_a_frontier_of_their_own():
    """Else the short ones beat all others, which do more."""
    rows = tuple(a_row(0.01 * n * batch, n / batch, knobs={"n": n, "batch": batch}) for n in (1, 4) for batch in (1, 2))
    sweep = SweepResult("s", rows, constraints={"seconds_per_token": 0.015}, per=("n",))
    assert [(part.name, part.rows) for part in sweep.parts("decode")] == [
        ("decode, n 1", rows[:2]),
        ("decode, n 4", rows[2:]),
    ]
    assert [answer.row for answer in answers.answers(sweep)] == [rows[0], None]
    assert [answer.row for answer in answers.answer_fastest(sweep, "decode", 4)] == [rows[0], rows[2]]
    words = render(sweep)
    for said in (
        "decode, n 1: the frontier of 2 plans",
        "decode, n 4: the frontier of 2 plans",
        "- decode, n 4: the cheapest",
    ):
        assert said in words
    assert replace(sweep, per=()).parts("decode")[0].name == "decode"


def test_numbers_that_make_no_tokens_are_other_work(tmp_path: Path):
    assert job(tmp_path).per == ("width",)
    assert job(tmp_path, JOB.replace("[price]", "[frontier]\nper = []\n[price]")).per == ()
    lengths = JOB.replace("batch = [8, 64]", "batch = 8\ninput_length = 2").replace("decode", "prefill")
    lengths = lengths.replace('batch = { of = "batch" }', 'batch = { of = "batch * input_length" }')
    assert job(tmp_path, lengths).per == ("input_length", "width")


def test_where_all_chips_have_prices_cheap_is_money():
    dear = a_row(0.01, 0.1, chip="v4", topology="v4:4", price=9.0)
    slow = a_row(0.02, 0.2, price=3.0)
    assert cheapest([dear, slow], 0.03) is slow
    assert frontier([dear, slow]) == (dear, slow)
    assert frontier([dear, replace(slow, price=None)]) == (dear,)
    assert "2.0 times slower and 3 times cheaper" in (" ".join(advice(SweepResult("s", (dear, slow))))).replace(
        "2 t", "2.0 t"
    )


def test_reasons_are_told_once_a_slice():
    why = "Too large. At its fullest it holds:\n 3 GiB"
    rows = tuple(a_row(1, 1, knobs={"batch": b, "size": s}, outcome=INFEASIBLE, why=why) for b in (1, 2) for s in "ab")
    words = render(SweepResult("s", (*rows, a_row(1, 1, knobs={"batch": 1, "size": "c"}))))
    assert words.count("No layout fits: decode on v5e:4 (4 points; of the first): Too large.\n") == 1
    assert "At its fullest" not in words


def test_a_frontier_names_every_layout_in_full():
    long = "WS-2D: contracted over x, output over yz, as long as it may be " * 4
    rows = tuple(
        a_row(n, 1 / n, layout={"decode": {"params['up']": f"{long}{n % 2}"}}, knobs={"batch": n}) for n in (1, 2, 3)
    )
    lines = render(SweepResult("s", tuple(replace(row, status="OPTIMAL") for row in rows))).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("  v5e:4 ")] == ["A", "B", "A"]
    assert sum("WS-2D" in line for line in lines if line.startswith(("  A ", "  B "))) == 2
    assert "…" not in "".join(lines)


def test_costs_have_no_exponents_that_people_must_read():
    row = a_row(0.0104, 1.33, status="OPTIMAL")
    words = render(SweepResult("s", (row, a_row(0.1, 0.0000338, status="OPTIMAL"))))
    assert "1330 chip-ms per token" in words and "0.0338 chip-ms per token" in words and "e+" not in words


def test_attention_is_no_product_by_a_weight():
    layout = {"scores": "query-sharded over x", "params['up']": "WG-X: batch over x", "more": "head-sharded over y"}
    row = a_row(1, 1, layout={"decode": layout})
    assert row.headline == "WG-X: batch over x | attention query-sharded over x"
    assert row.family == "WG-X with query-sharded"
    both = replace(row, layout={"prefill": layout, "decode": {"params['up']": "WS-1D: output over y"}})
    assert both.headline == "prefill WG-X: batch over x | attention query-sharded over x; decode WS-1D: output over y"
    assert both.family == "prefill WG-X with query-sharded, decode WS-1D"


def test_chips_of_several_kinds_without_prices_are_said_to_count_alike():
    rows = (a_row(0.5, 0.1), a_row(0.5, 0.1, chip="v4"))
    assert "a second of v5e and of v4 counts the same" in render(SweepResult("s", rows))
    assert "alike" not in render(SweepResult("s", tuple(replace(row, price=1.0) for row in rows)))
    assert "alike" not in render(SweepResult("s", rows[:1]))


def test_the_longest_is_told_of_every_slice_and_within_limits():
    rows = (
        a_row(0.02, 0.1, knobs={"context": 2048}),
        a_row(0.09, 0.1, knobs={"context": 8192}, topology="v5e:8", chips=8),
        a_row(0.03, 0.1, knobs={"context": 4096}, topology="v5e:8", chips=8),
        a_row(0.0, 0.0, knobs={"context": 16384}, outcome=INFEASIBLE),
    )
    sweep = SweepResult("s", rows)
    longest_of_all, within = (str(answers.answer_longest(sweep, "decode", "context", limit)) for limit in (None, 0.03))
    assert longest_of_all.startswith("decode: the largest context is 8192: v5e:8, context 8192")
    assert longest_of_all.endswith("By slice: 2048 on v5e:4, 8192 on v5e:8.")
    assert within.startswith("decode: the largest context at 30.0 ms per token or less is 4096: v5e:8")
    assert "no context from 2048 to 16384 has a plan at 1.00 ms" in str(
        answers.answer_longest(sweep, "decode", "context", 0.001)
    )


def test_a_family_has_no_axes():
    assert family("WS-2D: contracted over x, output over yz") == "WS-2D"
    assert family("batch-sharded over xy, head-sharded over z") == "batch-sharded, head-sharded"
    assert family("replicated") == "replicated"


# --- throughput, and what prices rest on


def _priced(batch: int, seconds: float, chips: int, **more: Any) -> Row:
    numbers: dict[str, Any] = {"seconds": seconds, "latency_seconds": seconds, "tokens": float(batch), "mfu": 0.1}
    numbers |= {"chip_seconds_per_token": chips * seconds / batch, "peak_bytes": 1e9, "budget_bytes": 2e9}
    numbers |= {"price": chips * seconds / batch, "phase_seconds": {"decode": seconds}, "status": "OPTIMAL"}
    return Row("decode", "decode", f"v5e:{chips}", "v5e", chips, {"batch": batch}, SOLVED, **(numbers | more))


def test_the_most_tokens_within_a_limit() -> None:
    rows = (_priced(8, 0.01, 4), _priced(64, 0.04, 4), _priced(256, 0.06, 16), _priced(64, 0.03, 8))
    sweep = SweepResult("s", rows)
    best = {what: answers.answer_most(sweep, "decode", what, 0.05)[0].row for what in get_args(answers.Most)}
    assert best == {"tokens": rows[3], "tokens-per-chip": rows[1], "tokens-per-dollar": rows[1]}
    assert rows[3].tokens_per_second == pytest.approx(64 / 0.03)
    (none,) = answers.answer_most(sweep, "decode", "tokens", 0.001)
    assert (none.row, none.found) == (None, False) and "no plan at 1.00 ms per token or less" in none.words
    unpriced = replace(sweep, rows=tuple(replace(row, price=None) for row in rows))
    (none,) = answers.answer_most(unpriced, "decode", "tokens-per-dollar")
    assert not none.found and "no prices" in none.words


def test_prices_say_that_they_are_planned_and_how_the_compiled_steps_compare() -> None:
    plain = _priced(64, 0.04, 4)
    assert cost_of(plain, "USD").endswith("USD per million tokens, by planned times)")
    compiled = replace(plain, compiled_seconds={"decode": 0.05})
    assert compiled.slowdown == pytest.approx(1.25) and "compiled steps take 1.25 times the planned" in cost_of(
        compiled, "USD"
    )


def test_ask_exits_with_1_without_an_answer_and_answers_as_json(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SweepResult("s", (_priced(8, 0.01, 4), _priced(64, 0.04, 4))).to_dict()))
    found = run("ask", path, "--under-ms", "20", "--json")
    (answer,) = json.loads(found.stdout)["answers"]
    assert found.exit_code == 0 and answer["found"] and answer["point"]["knobs"] == {"batch": 8}
    assert answer["point"]["tokens_per_second"] == pytest.approx(800)
    none = run("ask", path, "--under-ms", "1", "--json")
    assert none.exit_code == 1 and json.loads(none.stdout)["answers"][0]["found"] is False
    assert run("ask", path, "--chips", "5").exit_code == 1
    assert run("ask", path, "--most", "plans").exit_code == 2
