"""How well does a calibrated model predict sizes that it was not fitted to?

    python benchmarks/calibration.py             # eight host devices: one table, and benchmarks/results/calibration.json
    python benchmarks/calibration.py auto        # the devices that JAX sees

One row a series of held-out sizes, `ours` being the median error; `reference` is the target. The last
rows are the wall time and whole steps of a model, which have no reference on host devices.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "calibration.json"

MEDIAN = 0.30
SECONDS = 120.0


def rows(calibration: Any) -> list[dict[str, Any]]:
    """The held-out errors per series and in all, the wall time, and the steps."""
    found: list[dict[str, Any]] = [
        {
            "row": f"median error, held out, {each.series}",
            "reference": MEDIAN if each.series == "all" else None,
            "ours": each.held_out_median,
            "worst": each.held_out_worst,
            "sizes": each.held_out,
            "fitted_median": each.fitted_median,
            "predicted_over_measured": each.bias,
        }
        for each in calibration.residuals
    ]
    found.append(
        {"row": "wall seconds", "reference": SECONDS, "ours": calibration.seconds, "machine": calibration.source}
    )
    found += [
        {
            "row": f"predicted / measured, step of {check.name}",
            "reference": None,
            "ours": check.ratio,
            "predicted_seconds": check.predicted_seconds,
            "start_seconds": check.start_seconds,
            "measured_seconds": check.measured_seconds,
        }
        for check in calibration.checks
    ]
    return found


def main() -> None:
    from autoshard import calibrate
    from autoshard.calibrating.step_check import check_step
    from examples import palm

    found = calibrate(sys.argv[1] if len(sys.argv) > 1 else "cpu:8")
    steps = (palm.decode("tiny", batch=8, context=16), palm.prefill("tiny", batch=8, length=64))
    found = replace(found, checks=tuple(check_step(work, found.topology) for work in steps))
    print(found, end="")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
