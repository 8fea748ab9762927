"""Above how many tokens are weight-gathered layouts better than weight-stationary ones, for PaLM 540B on a v4 4x4x4?

    python benchmarks/published_crossovers.py    # one table, and benchmarks/results/crossovers.json

Pope et al. 2022 ("Efficiently Scaling Transformer Inference", arXiv 2211.05102), §3.2 and appendix A, give the volume of each
layout of a feed-forward block: 2BL(E/X + F/(YZ)) elements a chip for WS-2D, 2EF N/(XYZ) + 2BLE/N for weights gathered over N
chips, 2EF if they are gathered over all. `reference` is the crossover of two of them at E = 18,432, F = 73,728, X = Y = Z = 4;
`ours` is solved for symbolically from the collectives of a traced block (its own numbers of E, F and N play no part in it).
The second part is the same for PaLM's own gated block, which the paper does not work out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "crossovers.json"
SOURCE = "Pope et al. 2022, §3.2 and appendix A.1-A.2, total bandwidth, (N-1)/N = 1"

# Pair of layouts to the number of tokens where the paper's formulas meet: E = F/4, F, 12 F.
REFERENCE = {("WS-2D", "WG-X"): 18_432, ("WG-X", "WG-XY"): 73_728, ("WG-XY", "WG-XYZ"): 884_736}


def crossover_rows() -> list[dict[str, Any]]:
    """The rows: `row`, `reference`, `ours`, and the formula and its source."""
    return [*_rows(gated=False), *_rows(gated=True)]


def _rows(gated: bool) -> list[dict[str, Any]]:
    from autoshard.explaining.crossovers import blocks, crossovers
    from costmodels.machine.topology import parse_topology
    from costmodels.symbols import text

    (block,) = blocks(*traced(gated))
    found = {(each.below, each.above): each for each in crossovers(block, parse_topology("v4:4x4x4"))}
    kind = "its own gated block" if gated else "the paper's block"
    rows = []
    for pair in dict.fromkeys([*REFERENCE, *found]):
        row: dict[str, Any] = {"row": f"PaLM 540B, 4×4×4, {kind}: {pair[0]} → {pair[1]}, tokens"}
        row |= {"reference": None if gated else REFERENCE.get(pair), "ours": None}
        if pair in found:
            row |= {"ours": found[pair].number, "formula": text(found[pair].tokens)}
        else:
            row["why"] = f"{pair[1]} does not follow {pair[0]}"
        rows.append(row | {"source": SOURCE})
    return rows


def traced(gated: bool) -> tuple[Any, Any]:
    """A feed-forward block of PaLM 540B's sizes, as a program with its dimensions by name."""
    import jax
    import jax.numpy as jnp

    from autoshard import trace_symbolic
    from examples.palm import config_of

    config = config_of("540b")

    def block(x, wi, wo):
        return jax.nn.gelu(x @ wi) @ wo

    def gated_block(x, wi_gate, wi_up, wo):
        return (jax.nn.silu(x @ wi_gate) * (x @ wi_up)) @ wo

    x, wi, wo = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((64, 2048, config.d_model), (config.d_model, config.d_ff), (config.d_ff, config.d_model))
    )
    dims = {"x": "B L E", "wo": "F E"}
    found = (
        trace_symbolic(gated_block, x, wi, wi, wo, dims=dims) if gated else trace_symbolic(block, x, wi, wo, dims=dims)
    )
    return found.program, found.dimensions


def main() -> None:
    rows = crossover_rows()
    print(f"{'crossover':72s} {'paper':>12s} {'ours':>12s}  formula")
    for row in rows:
        paper = "-" if row["reference"] is None else f"{row['reference']:,}"
        ours = f"none: {row['why']}" if row["ours"] is None else f"{row['ours']:,.0f}"
        print(f"{row['row']:72s} {paper:>12s} {ours:>12s}  {row.get('formula', '')}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
