"""Reports: what pages hold, and (with a browser) that they work and look right at two widths.

With `AUTOSHARD_SCREENSHOTS=DIR` the browser's tests leave their screenshots there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

import autoshard
from autoshard.cli import app
from autoshard.plan import Plan
from autoshard.planning.records import Baseline
from autoshard.report import ReportError, write_report
from autoshard.report.of_plan import data_of
from autoshard.report.plots import _panel
from autoshard.report.write import page
from autoshard.sweep.analysis.rows import Row, SweepResult
from autoshard.sweep.results import FAILED, SOLVED
from tests.support.sweep_target import feed_forward


def small_arguments() -> tuple[Any, Any]:
    arrays = {
        name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in (("up", (512, 2048)), ("down", (2048, 512)))
    }
    return [arrays] * 3, jax.ShapeDtypeStruct((64, 512), "bfloat16")


def network(params: Any, x: Any) -> Any:
    """Three blocks: enough operations for a table that can be filtered."""
    for block in params:
        x = x + feed_forward(block, x)
    return x


def small_plan() -> Plan:
    return autoshard.search(network, *small_arguments(), topology="v5e:2x4", name="network", fold=False)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def audit(plan: Plan) -> dict[str, Any]:
    return autoshard.audit(plan, network, *small_arguments(), target="host").to_dict()


def small_sweep() -> SweepResult:
    rows = []
    for weights, speed in (("bf16", 1.0), ("int8", 1.6)):
        for i, batch in enumerate((1, 4, 16, 64, 256)):
            seconds = 0.02 * (1 + batch / 40) / speed
            layout = {
                "decode": {"params['up']": "WS-2D: contracted over x, output over y" if i < 3 else "WG-X: batch over x"}
            }
            numbers: dict[str, Any] = {
                "seconds": seconds,
                "latency_seconds": seconds,
                "tokens": batch,
                "chip_seconds_per_token": 16 * seconds / batch,
                "price": 1e6 * 16 * seconds / batch * 1.2 / 3600,
                "mfu": min(0.6, 0.002 * batch),
                "peak_bytes": 1e9 * (1 + i),
                "budget_bytes": 16e9,
                "status": "OPTIMAL",
                "layout": layout,
                "phase_seconds": {"decode": seconds},
            }
            rows.append(
                Row("decode", "decode", "v5e:4x4", "v5e", 16, {"batch": batch, "weights": weights}, SOLVED, **numbers)
            )
    rows.append(Row("decode", "decode", "v5e:1", "v5e", 1, {"batch": 1, "weights": "bf16"}, FAILED, "no <such> thing"))
    return SweepResult("A sweep", tuple(rows))


# --- Pages


def embedded(html: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


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
    data = data_of(plan, audit)
    assert data["audit"] == audit
    assert (data["summary"][-1]["name"], data["summary"][-1]["value"]) == (
        "compiled (host)",
        "as planned" if audit["ok"] else "not as planned",
    )
    assert data["memory"]["given"] <= min(point["bytes"] for point in data["memory"]["points"])


def test_the_page_of_a_slow_program_says_so(plan: Plan, audit: dict[str, Any]):
    slow = audit | {"slow": True, "seconds": audit["seconds"] | {"planned": 1.0, "replayed": 2.5}}
    assert data_of(plan, slow)["summary"][-1]["value"].endswith(", 2.50 times as slow")
    older = {key: value for key, value in audit.items() if key not in ("slow", "costliest")}
    assert data_of(plan, older)["summary"] == data_of(plan, audit)["summary"], "audits of older versions have no replay"


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
    data = data_of(replace(plan, program=None, dimensions=None))
    assert (data["memory"]["points"], data["formulas"]) == ([], "")


def test_the_page_of_a_sweep_answers_within_the_limits_of_its_job():
    limits = {"seconds_per_token": 0.03, "seconds_to_first_token": None, "memory_gib": 14.0}
    html = page(replace(small_sweep(), constraints=limits))
    assert "Allowed are at most 30.0 ms a token, 14 GiB of each chip." in html
    assert "decode: the cheapest at 30.0 ms a token or less is v5e:4x4, batch 16, weights int8" in html
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
        (two_kinds_of_chips(), "cost, USD a million tokens", [3.0, 1.5]),
        (
            replace(two_kinds_of_chips(), rows=tuple(replace(r, price=None) for r in two_kinds_of_chips().rows)),
            "ms",
            [12.8],
        ),
    ):
        axes = Figure().subplots()
        _panel(axes, sweep, "decode")
        assert label in axes.get_ylabel()
        curves = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
        assert curves["length 128"] == pytest.approx([y * (0.0128 if "USD" in label else 1) for y in shown])


@pytest.mark.parametrize("ending", ["html", "png", "svg"])
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
    with pytest.raises(ReportError, match="must end in"):
        write_report(tmp_path / "x.json", tmp_path / "x.doc")


# --- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


class Opened:
    """A page in the browser, with what its console said."""

    def __init__(self, browser: Any, html: Path, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(html.as_uri())
        self.width = width

    def close(self, name: str) -> None:
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width  # nothing sticks out
        if folder := os.environ.get("AUTOSHARD_SCREENSHOTS"):
            self.page.mouse.move(0, 0)
            self.page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
            self.page.screenshot(path=f"{folder}/{name}-{self.width}.png", full_page=self.width < 600)
        self.page.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_a_plan_works_in_a_browser(
    browser: Any, tmp_path: Path, plan: Plan, audit: dict[str, Any], width: int
):
    (tmp_path / "plan.html").write_text(page(plan, audit))
    opened = Opened(browser, tmp_path / "plan.html", width)
    at = opened.page
    assert at.locator("#torus rect").count() == 8
    at.locator("#torus rect").nth(3).hover()
    assert "holds" in at.locator("#tip").inner_text()
    rows = at.locator("#operations tbody tr")
    before = rows.count()
    at.locator("#operations input").fill("params")
    assert 0 < rows.count() < before
    at.locator("#operations input").fill("")
    at.locator("#operations th button", has_text="time").click()
    assert at.locator("#operations th[aria-sort=descending]").count() == 1
    at.locator("#array").select_option(index=1)
    assert "shards" in at.locator("#spec").inner_text() or "replicated" in at.locator("#spec").inner_text()
    assert at.locator("#roofline circle").count() > 0
    assert at.locator("#memory path").count() > 0
    assert "as planned" in at.locator("#verdict").inner_text()
    assert at.locator("#compared tbody tr").count() == len({(c["kind"], *c["axes"]) for c in audit["planned"]})
    at.locator("summary").first.click()
    assert at.locator("details pre").is_visible()
    at.locator("summary").first.click()
    opened.close("plan")


@pytest.mark.browser
def test_a_group_of_chips_is_one_whatever_the_order_of_its_axes(
    browser: Any, tmp_path: Path, plan: Plan, audit: dict[str, Any]
):
    one = {"kind": "all-to-all", "count": 2, "bytes": 64}
    audit = audit | {"planned": [one | {"axes": ["y", "x"]}], "compiled": [one | {"axes": ["x", "y"]}]}
    (tmp_path / "plan.html").write_text(page(plan, audit))
    opened = Opened(browser, tmp_path / "plan.html", 1280)
    assert opened.page.locator("#compared tbody tr").all_inner_texts() == ["all-to-all\txy\t2\t2\t128 B\t128 B"]
    opened.page.close()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_a_sweep_works_in_a_browser(browser: Any, tmp_path: Path, width: int):
    (tmp_path / "sweep.html").write_text(page(small_sweep()))
    opened = Opened(browser, tmp_path / "sweep.html", width)
    at = opened.page
    dots = at.locator("#phase0 circle.point")
    assert dots.count() == 10
    assert at.locator("#ends tbody tr").count() == 2
    dots.last.focus()
    assert "proven optimal" in at.locator("#tip").inner_text()
    at.locator("#phase0 .measure").select_option("mfu")
    assert at.locator("#phase0 svg text", has_text="MFU").count() == 1
    at.locator("#phase0 .every").uncheck()
    assert dots.count() == 10  # every point is on the curve of its own colour
    at.locator("#phase0 .points input").fill("int8 256")
    assert at.locator("#phase0 .points tbody tr").count() == 1
    at.locator("#phase0 .points input").fill("")
    at.locator("#phase0 .measure").select_option("cost")
    opened.close("sweep")
