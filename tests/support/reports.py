"""A plan, an audit and a sweep that are small enough for pages."""

from __future__ import annotations

import json
import re
from typing import Any

import jax

import autoshard
from autoshard.plan import Plan
from autoshard.sweep.analysis.rows import Row, SweepResult
from autoshard.sweep.results import FAILED, SOLVED
from tests.support.scripts.sweep_target import feed_forward


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
