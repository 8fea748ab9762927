"""Pages in a headless Chromium: they work and look right at three widths, light and dark.

With `AUTOSHARD_SCREENSHOTS=DIR` the tests leave their screenshots there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoshard.plan import Plan
from autoshard.report.write import page
from tests.support.paths import ROOT
from tests.support.reports import small_sweep


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


LOOKS = (ROOT / "tests" / "support" / "scripts" / "looks.js").read_text()
"""Finds texts of little contrast, and bars and marks of a legend without a colour."""

looks = pytest.mark.parametrize(("width", "scheme"), [(w, s) for w in (1280, 800, 400) for s in ("light", "dark")])


class Opened:
    """A page in the browser, with what its console said."""

    def __init__(self, browser: Any, html: Path, width: int, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(html.as_uri())
        self.width, self.scheme = width, scheme

    def close(self, name: str) -> None:
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file:", "data:"))] == []
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width  # nothing sticks out
        assert self.page.evaluate(LOOKS) == {"faint": [], "colourless": 0}
        if folder := os.environ.get("AUTOSHARD_SCREENSHOTS"):
            self.page.mouse.move(0, 0)
            self.page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
            self.page.screenshot(
                path=f"{folder}/{name}-{self.width}{'-dark' * (self.scheme == 'dark')}.png", full_page=self.width < 600
            )
        self.page.close()


@pytest.mark.browser
@looks
def test_the_page_of_a_plan_works_in_a_browser(
    browser: Any, tmp_path: Path, plan: Plan, audit: dict[str, Any], width: int, scheme: str
):
    (tmp_path / "plan.html").write_text(
        page(plan, audit, made="autoshard report plan.json -o plan.html, on 2026-01-31")
    )
    opened = Opened(browser, tmp_path / "plan.html", width, scheme)
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
@looks
def test_the_page_of_a_sweep_works_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str):
    (tmp_path / "sweep.html").write_text(page(small_sweep()))
    opened = Opened(browser, tmp_path / "sweep.html", width, scheme)
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
