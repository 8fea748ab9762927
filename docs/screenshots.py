"""The pictures of PaLM's reports in these pages, taken in a headless Chromium.

    make screenshots        # docs/images/palm-*.png: 540B decode planned and audited, and the sweep of `make frontier`

The sweep is read from `benchmarks/results/frontier_points.json`, the plan is searched and audited again by the TPU compiler,
and the plot of `make frontier` is copied.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import autoshard
from autoshard.report.write import page
from autoshard.sweep.analysis.rows import load_sweep
from examples import palm

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
RESULTS = DOCS.parent / "benchmarks" / "results"
WIDTHS = (1280, 400)
SHOWN = "540b decode"
"""The phase of the sweep that is shown."""


@contextmanager
def opened(browser: Any, html: str, width: int) -> Iterator[Any]:
    """A page that holds this HTML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.html")
        path.write_text(html)
        at = browser.new_page(viewport={"width": width, "height": 1000})
        at.goto(path.as_uri())
        yield at
        at.close()


def plan_pictures(browser: Any) -> None:
    """The top of the plan's page, and its audit."""
    work = palm.decode("540b", batch=64)
    plan = autoshard.search(
        work.fn, *work.args, topology="v4:4x4x4", donate_argnums=work.donate_argnums, name=work.name
    )
    audit = autoshard.audit(plan, work.fn, *work.args, target="tpu").to_dict()
    html = page(plan, audit)
    for width in WIDTHS:
        with opened(browser, html, width) as at:
            at.screenshot(path=IMAGES / f"palm-plan-{width}.png")
            if width == WIDTHS[0]:
                at.locator("section", has=at.locator("#verdict")).screenshot(path=IMAGES / f"palm-audit-{width}.png")


def sweep_pictures(browser: Any) -> None:
    """One phase of the sweep, with the layout of a point in the middle of its frontier."""
    html = page(load_sweep(RESULTS / "frontier_points.json"))
    for width in WIDTHS:
        with opened(browser, html, width) as at:
            section = at.locator("main > section", has=at.get_by_role("heading", name=SHOWN, exact=True))
            section.evaluate("section => window.scrollTo(0, section.offsetTop)")
            dots = section.locator("circle[tabindex]")
            dots.nth(dots.count() // 4).focus()
            at.screenshot(path=IMAGES / f"palm-sweep-{width}.png")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("There is no Chromium (Debian: apt-get install chromium).")
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    shutil.copyfile(RESULTS / "frontier.png", IMAGES / "frontier.png")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        sweep_pictures(browser)
        plan_pictures(browser)
        browser.close()


if __name__ == "__main__":
    main()
