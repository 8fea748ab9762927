"""Reports: what pages hold, and what their scripts draw."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import autoshard
from autoshard._util.tables import figure, time
from autoshard.cli import app
from autoshard.errors import OptionError
from autoshard.explaining.explain import short_name
from autoshard.plan import Plan
from autoshard.planning.records import Baseline
from autoshard.report import ReportError, write_report
from autoshard.report.of_plan import plan_page_data, timeline
from autoshard.report.plots import draw_panel
from autoshard.report.write import page
from autoshard.sweep.analysis.rows import Row, SweepResult
from autoshard.sweep.results import SOLVED, Result
from autoshard.sweep.store import Store
from autoshard.sweep.worker import pack
from tests.support.effort import mostly_long
from tests.support.paths import ROOT
from tests.support.reports import embedded, small_sweep


@pytest.mark.parametrize("kind", ["plan", "sweep"])
def test_a_page_needs_nothing_from_outside(kind: str, plan: Plan):
    html = page(plan if kind == "plan" else small_sweep())
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", html)
    assert '<link rel="stylesheet"' not in html and "@import" not in html


def test_the_page_of_a_plan_holds_the_plans_numbers(plan: Plan):
    data = embedded(page(plan))
    assert data["summary"][0]["value"] in plan.explain()
    assert max(point["bytes"] for point in data["memory"]["points"]) == pytest.approx(plan.estimate.peak_bytes)
    assert len(data["memory"]["points"]) == len(plan.operations)
    spent = sum(op["seconds"] + op["collectives"] for op in data["operations"])
    slices = plan.estimate.collective_seconds - sum(each.seconds for each in plan.estimate.collectives)  # are in no row
    assert spent == pytest.approx(plan.estimate.seconds - slices)
    assert sum(data["regimes"].values()) == pytest.approx(plan.estimate.seconds)
    assert "Symbols (formulas are of one chip)" in data["formulas"]
    assert data["parallelism"] == str(plan.parallelism())
    assert data["plain"] == []


def test_the_page_of_a_plan_has_the_plain_layouts_that_it_was_compared_with(plan: Plan):
    plain = (Baseline("megatron 1d", 2.5 * plan.estimate.seconds, 2.5 * plan.estimate.seconds),)
    (found,) = embedded(page(replace(plan, baselines=plain)))["plain"]
    assert (found["name"], found["margin"]) == ("megatron 1d", "2.50 times")


def test_a_hostile_name_stays_text(plan: Plan):
    name = "</script><script>alert(1)</script><!--"
    html = page(replace(plan, name=name))
    assert "<script>alert" not in html
    assert embedded(html)["title"].startswith(name)


def test_the_page_of_an_audited_plan_says_what_was_compiled(plan: Plan, audit: dict[str, Any]):
    data = plan_page_data(plan, audit)
    assert data["audit"] == audit
    assert (data["summary"][-1]["name"], data["summary"][-1]["value"]) == (
        "compiled (host)",
        "as planned" if audit["ok"] else "not as planned",
    )
    assert data["memory"]["given"] <= min(point["bytes"] for point in data["memory"]["points"])


def test_the_page_of_a_slow_program_says_so(plan: Plan, audit: dict[str, Any]):
    slow = audit | {"slow": True, "seconds": audit["seconds"] | {"planned": 1.0, "replayed": 2.5}}
    assert plan_page_data(plan, slow)["summary"][-1]["value"].endswith(", 2.50 times as slow")
    older = {key: value for key, value in audit.items() if key not in ("slow", "costliest")}
    assert plan_page_data(plan, older)["summary"] == plan_page_data(plan, audit)["summary"], (
        "audits of older versions have no replay"
    )


def test_an_audit_of_something_else_is_refused(tmp_path: Path, plan: Plan, audit: dict[str, Any]):
    plan.save(tmp_path / "plan.json")
    for found, says in (
        (audit | {"topology": "v4:2x2"}, "is of network on v4:2x2, and the plan is network on v5e:2x4"),
        ({"ok": True}, "is not an audit"),
    ):
        (tmp_path / "audit.json").write_text(json.dumps(found))
        with pytest.raises(ReportError, match=says):
            write_report(tmp_path / "plan.json", tmp_path / "page.html", tmp_path / "audit.json")


def test_a_plan_of_an_older_file_has_no_memory_and_no_formulas(plan: Plan):
    data = plan_page_data(replace(plan, program=None, dimensions=None))
    assert (data["memory"]["points"], data["formulas"]) == ([], "")


def test_the_page_of_a_sweep_answers_within_the_limits_of_its_job():
    limits = {"seconds_per_token": 0.03, "seconds_to_first_token": None, "memory_gib": 14.0}
    html = page(replace(small_sweep(), constraints=limits))
    assert "Allowed are at most 30.0 ms per token, 14 GiB of each chip." in html
    assert "decode: the cheapest at 30.0 ms per token or less is v5e:4x4, batch 16, weights int8" in html
    assert "Within the job" not in page(small_sweep())


def test_the_page_of_a_sweep_marks_the_frontier():
    sweep = small_sweep()
    data = embedded(page(sweep))
    (phase,) = data["phases"]
    assert [p["knobs"] for p in phase["points"] if p["best"]] == [
        {"batch": batch, "weights": "int8"} for batch in (1, 4, 16, 64, 256)
    ]
    assert phase["series"] == ["weights"]
    assert len(phase["switches"]) == 1
    assert phase["advice"][0].startswith("The fastest is v5e:4x4, batch 1, weights int8")
    assert [end["name"] for end in phase["ends"]] == [
        "v5e:4x4, batch 1, weights int8",
        "v5e:4x4, batch 256, weights int8",
    ]
    assert data["without"][0]["why"] == "no <such> thing"


def two_kinds_of_chips() -> SweepResult:
    """Dear chips that are fast, and chips that take more chip-seconds for less money; at two lengths."""
    rows = []
    for length in (128, 512):
        for k, (chip, rate) in enumerate((("v4", 3.0), ("v5e", 0.5))):
            seconds = length * 1e-4 * (1 + 2 * k)
            numbers: dict[str, Any] = {"seconds": seconds, "latency_seconds": seconds, "mfu": 0.1}
            numbers["chip_seconds_per_token"] = seconds
            numbers |= {"price": rate * seconds, "peak_bytes": 1e9, "budget_bytes": 2e9}
            rows.append(Row("decode", "decode", f"{chip}:4", chip, 4, {"length": length}, SOLVED, **numbers))
    return SweepResult("two", tuple(rows), per=("length",))


def test_the_page_of_a_sweep_over_lengths_has_a_frontier_for_each():
    (phase,) = embedded(page(two_kinds_of_chips()))["phases"]
    assert phase["series"] == ["length"]
    assert [point["best"] for point in phase["points"]] == [True] * 4
    assert [(end["part"], end["which"], end["name"]) for end in phase["ends"]] == [
        (f"decode, length {length}", which, f"{chip}:4")
        for length in (128, 512)
        for which, chip in (("fastest", "v4"), ("cheapest", "v5e"))
    ]


def test_a_plot_is_of_money_where_chips_have_prices():
    """Drawn against chip-seconds, a frontier of money would go up and down."""
    from matplotlib.figure import Figure

    for sweep, label, shown in (
        (two_kinds_of_chips(), "cost, USD per million tokens", [3.0, 1.5]),
        (
            replace(two_kinds_of_chips(), rows=tuple(replace(r, price=None) for r in two_kinds_of_chips().rows)),
            "ms",
            [12.8],
        ),
    ):
        axes = Figure().subplots()
        draw_panel(axes, sweep, "decode")
        assert label in axes.get_ylabel()
        curves = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
        assert curves["length 128"] == pytest.approx([y * (0.0128 if "USD" in label else 1) for y in shown])


@pytest.mark.parametrize("ending", mostly_long(["html", "png", "svg"], "html"))
def test_the_command_writes_pages_and_pictures(tmp_path: Path, ending: str, plan: Plan):
    plan.save(tmp_path / "plan.json")
    (tmp_path / "sweep.json").write_text(json.dumps(small_sweep().to_dict()))
    for source in ("plan", "sweep"):
        output = tmp_path / f"{source}.{ending}"
        done = CliRunner().invoke(app, ["report", str(tmp_path / f"{source}.json"), "-o", str(output)])
        assert done.exit_code == 0, done.output
        assert output.stat().st_size > 5000


def test_what_is_no_report_is_refused(tmp_path: Path):
    for text, says in (("{}", "neither a plan"), ("[1]", "neither a plan"), ("{", "is not valid JSON")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ReportError, match=says):
            write_report(tmp_path / "x.json", tmp_path / "x.html")
    (tmp_path / "x.json").write_text(json.dumps(small_sweep().to_dict()))
    with pytest.raises(autoshard.OptionError, match="must end in"):
        write_report(tmp_path / "x.json", tmp_path / "x.doc")


# --- the scripts run in node, on a document of their own


def drawn(html: str, width: int, tmp_path: Path) -> dict[str, Any]:
    """What the scripts of a page draw at a width, by the id of its place."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    (tmp_path / "page.html").write_text(html)
    command = [node, str(ROOT / "tests" / "support" / "dom.js"), str(tmp_path / "page.html"), str(width)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def nodes(tree: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if tree.get("name") == name:
        yield tree
    for each in (*tree.get("children", ()), *tree.get("inside", ())):
        yield from nodes(each, name)


@pytest.mark.parametrize("width", (1280, 400))
def test_the_scripts_of_a_plan_draw_a_roofline_within_its_frame(plan: Plan, width: int, tmp_path: Path):
    html = page(plan)
    data = embedded(html)
    for vector in (data["roofline"]["vector"], data["roofline"]["flops"] / 1e4):  # inside of the axes, and left of them
        changed = dict(data, roofline=data["roofline"] | {"vector": vector})
        found = drawn(html.replace(json.dumps(data).replace("<", "\\u003c"), json.dumps(changed)), width, tmp_path)
        paths = [each["attributes"]["d"] for each in nodes(found["roofline"], "path")]
        assert 1 <= len(paths) <= 2
        for path in paths:
            points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
            assert all(77 <= x <= width - 11 and 11 <= y <= 360 - 43 for x, y in points), path


def test_the_timeline_is_one_layer_in_the_order_of_the_program(plan: Plan, tmp_path: Path):
    found = timeline(plan)
    names = [step["name"] for step in found["steps"] if step["regime"] != "communication"]
    assert names == [short_name(op) for op in plan.operations if op.count and op.seconds]  # there is no loop
    bars = list(nodes(drawn(page(plan), 800, tmp_path)["timeline"], "rect"))
    assert len(bars) == len(found["steps"]) > 0
    ends = [(float(bar["attributes"]["x"]), float(bar["attributes"]["width"])) for bar in bars]
    assert all(x >= 0 and x + wide <= 801 for x, wide in ends)


def test_the_headline_has_rates_and_the_compiled_step(plan: Plan, audit: dict[str, Any]):
    seen = {card["name"]: card["value"] for card in plan_page_data(plan, audit, tokens=1000)["summary"]}
    assert seen["step, planned"] == time(plan.estimate.seconds)
    rate = 1000 / plan.estimate.seconds
    assert seen["tokens per second"] == figure(rate)
    assert seen["MFU"].endswith(" %")
    known = audit | {"seconds": audit["seconds"] | {"planned": 1.0, "replayed": 2.5}}
    cards = {card["name"]: card for card in plan_page_data(plan, known)["summary"]}
    assert cards["step, compiled"]["value"] == "2.50 s" and cards["step, compiled"]["note"].startswith(
        "2.50 times the plan"
    )
    assert "step, compiled" not in {card["name"] for card in plan_page_data(plan)["summary"]}


def test_the_page_has_its_command_and_specs_to_copy(tmp_path: Path, plan: Plan):
    plan.save(tmp_path / "plan.json")
    write_report(tmp_path / "plan.json", tmp_path / "plan.html", tokens=64)
    html = (tmp_path / "plan.html").read_text()
    assert re.search(r"<code>autoshard report .*plan.json -o .*plan.html --tokens 64, on \d{4}-\d\d-\d\d</code>", html)
    assert 'data-copies="specs"' in html and embedded(html)["specs"] == plan.export("specs")
    assert "How much of the plan these specs carry on their own is not measured" in html


def test_the_scripts_of_a_sweep_run(tmp_path: Path):
    found = drawn(page(small_sweep()), 400, tmp_path)
    assert any("tokens per second per chip" in str(each) for each in found.values())


@pytest.mark.long
def test_points_of_the_frontier_link_to_the_pages_of_their_plans(tmp_path: Path, plan: Plan):
    sweep = replace(small_sweep(), store=str(tmp_path / "sweep.sqlite"))
    rows = tuple(
        replace(row, key=f"{at:04d}" + 60 * "0", phase_seconds={"decode": 1.0}) for at, row in enumerate(sweep.rows)
    )
    sweep = replace(sweep, rows=rows)
    with Store(sweep.store) as store:
        for row in rows:
            store.add(row.key, row.name, Result(SOLVED, plans={"decode": pack(plan)}))
    (tmp_path / "sweep.json").write_text(json.dumps(sweep.to_dict()))
    write_report(tmp_path / "sweep.json", tmp_path / "page.html", plans=True)
    (phase,) = embedded((tmp_path / "page.html").read_text())["phases"]
    links = [point["pages"]["decode"] for point in phase["points"] if point["best"]]
    assert len(set(links)) == 5 and all(not point["pages"] for point in phase["points"] if not point["best"])
    assert all(embedded((tmp_path / link).read_text())["title"] == "network on v5e:2x4" for link in links)
    with pytest.raises(OptionError, match="plans applies to the page of a sweep only"):
        write_report(tmp_path / "sweep.json", tmp_path / "frontier.svg", plans=True)
    (tmp_path / "sweep.sqlite").unlink()
    with pytest.raises(ReportError, match="does not exist; it holds the plans"):
        write_report(tmp_path / "sweep.json", tmp_path / "page.html", plans=True)
