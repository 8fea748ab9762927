"""Pages and pictures from the files of plans and sweeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from os import PathLike
from pathlib import Path
from typing import Any

from autoshard._util.files import write_whole
from autoshard._util.version import version
from autoshard.errors import AutoshardError, OptionError
from autoshard.planning.files.plan_file import load
from autoshard.planning.records import PlanRecord
from autoshard.report.of_sweep import Links, sweep_page_data
from autoshard.sweep.analysis.frontier import frontier
from autoshard.sweep.analysis.rows import SweepResult, load_sweep
from autoshard.sweep.extras import require
from autoshard.sweep.store import Store, find_store
from autoshard.sweep.worker import unpack

_PAGES = Path(__file__).parent / "pages"
_PICTURES = (".png", ".svg", ".pdf")


class ReportError(AutoshardError):
    """Raised if there is no report for a file."""


def write_report(
    source: str | PathLike[str],
    output: str | PathLike[str],
    audit: str | PathLike[str] | None = None,
    tokens: float | None = None,
    plans: bool = False,
) -> None:
    """Writes the report of a plan's or a sweep's file, atomically.

        write_report("plan.json", "plan.html", audit="audit.json")
        write_report("results/palm.json", "frontier.svg")

    **Arguments:**

    - `output`: `.html` for a page; `.png`, `.svg` or `.pdf` for a picture: the roofline of a plan, the frontier of a sweep.
    - `audit`: the output of `autoshard audit --json` for the plan.
    - `tokens`: the tokens of one step of the plan, for the throughput.
    - `plans`: also write a page for each plan of a sweep's frontier into a folder beside the page, to which the points link.

    **Raises:** `OptionError` for another ending, or for an option that does not apply; `ReportError` for another kind of file,
    `MissingExtra`, `OSError`.
    """
    output, found = Path(output), read(source)
    if audit is not None and not isinstance(found, PlanRecord):
        raise OptionError(f"audit applies to plans only; {source} is a sweep.")
    if plans and (isinstance(found, PlanRecord) or output.suffix != ".html"):
        raise OptionError(f"plans applies to the page of a sweep only, got {source} and {output}.")
    if output.suffix in _PICTURES:
        _picture(found, output)
    elif output.suffix == ".html":
        given = "".join(f" --{name} {value}" for name, value in (("audit", audit), ("tokens", tokens)) if value)
        made = f"autoshard report {source} -o {output}{given}{' --plans' * plans}, on {date.today().isoformat()}"
        links = write_plan_pages(found, Path(source), output, made) if isinstance(found, SweepResult) and plans else {}
        write_whole(output, page(found, None if audit is None else _audit(audit, found), tokens, made, links))
    else:
        raise OptionError(f"{output} must end in .html, {', '.join(_PICTURES)}.")


def read(source: str | PathLike[str]) -> PlanRecord | SweepResult:
    """The plan or the sweep in a file.

    **Raises:** `ReportError`.
    """
    data = _json(source)
    if "autoshard_plan" in data:
        return load(source)
    if "autoshard_sweep" in data:
        return load_sweep(Path(source))
    raise ReportError(f"{source} is neither a plan (autoshard search -o) nor a sweep (autoshard sweep).")


def _json(path: str | PathLike[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ReportError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path} is JSON, but neither a plan nor a sweep.")
    return found


def _audit(path: str | PathLike[str], plan: PlanRecord | SweepResult) -> Mapping[str, Any]:
    """The output of `autoshard audit --json`, checked to be of this plan."""
    found = _json(path)
    if not {"ok", "target", "topology", "wire_bytes", "peak_bytes", "seconds", "differences"} <= found.keys():
        raise ReportError(
            f"{path} is not an audit: expected the output of autoshard audit PLAN.json FILE.py:NAME --json."
        )
    if isinstance(plan, PlanRecord) and (found["plan"], found["topology"]) != (plan.name, plan.topology.name):
        raise ReportError(
            f"{path} is of {found['plan']} on {found['topology']}, and the plan is {plan.name} on {plan.topology.name}."
        )
    return found


def _picture(found: PlanRecord | SweepResult, output: Path) -> None:
    require("matplotlib")
    if isinstance(found, PlanRecord):
        from autoshard.explaining.roofline import save_roofline

        save_roofline([found], output)
    else:
        from autoshard.report.plots import save_frontier

        save_frontier(found, output)


def write_plan_pages(sweep: SweepResult, source: Path, output: Path, made: str) -> Links:
    """Writes the plans of a sweep's frontiers as pages into the folder `STEM_plans`; returns their links.

    **Raises:** `ReportError` without the store of the sweep; `StoreError`, `OSError`.
    """
    store = find_store(sweep.store, source)
    if store is None:
        raise ReportError(f"The store of {source}, {sweep.store or 'none'}, does not exist; it holds the plans.")
    folder = output.with_name(f"{output.stem}_plans")
    folder.mkdir(exist_ok=True)
    best = [row for phase in sweep.phases for part in sweep.parts(phase) for row in frontier(part.rows)]
    links = {}
    with Store(store) as kept:
        for row in best:
            for phase in row.phase_seconds:
                data = kept.plan(row.key, phase)
                if data is not None:
                    target = folder / f"{row.key[:16]}-{phase}.html"
                    write_whole(target, page(unpack(data), made=made))
                    links[row.key, phase] = f"{folder.name}/{target.name}"
    return links


def page(
    found: PlanRecord | SweepResult,
    audit: Mapping[str, Any] | None = None,
    tokens: float | None = None,
    made: str = "",
    links: Links | None = None,
) -> str:
    """The page of a plan or a sweep: self-contained HTML, with the command that made it in its footer."""
    require("jinja2")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_PAGES), autoescape=True, undefined=StrictUndefined)
    if isinstance(found, PlanRecord):
        from autoshard.report.of_plan import plan_page_data

        name, data = "plan", plan_page_data(found, audit, tokens)
    else:
        name, data = "sweep", sweep_page_data(found, links)
    texts = {part: (_PAGES / part).read_text("utf-8") for part in ("report.css", "report.js", f"{name}.js")}
    script = texts["report.js"] + texts[f"{name}.js"]
    # Only "</" and "<!--" can end a script element.
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return environment.get_template(f"{name}.html").render(
        data=data, embedded=embedded, css=texts["report.css"], script=script, made=made, version=version()
    )
