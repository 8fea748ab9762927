"""The crossovers of mixtures of experts: the page's tables are those of the script, which agree with plain arithmetic."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from costmodels.machine.topology import parse_topology
from tests.support.paths import ROOT


def _script() -> ModuleType:
    path = ROOT / "docs" / "expert_crossovers.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CROSSOVERS = _script()


@pytest.mark.long
def test_the_page_has_the_tables_of_the_script() -> None:
    assert CROSSOVERS.page() == CROSSOVERS.PAGE.read_text(), "run: python docs/expert_crossovers.py"


@pytest.mark.parametrize(
    ("network", "factor"),
    [("v5p:8x1x1", 4), ("v5e:4x4", 2 * 4), ("v5e:16x16", 2 * 16), ("v5p:4x4x4", 4 * 4**2 / 3), ("h100:1x8", 8)],
)
def test_the_ratio_is_that_of_plain_arithmetic(network: str, factor: float) -> None:
    """Of n chips: 4 on a ring, 2a on two axes of a chips, 4a²/3 on three, n on a switch, over k λ; a gather sends (n-1)/n."""
    topology = parse_topology(network)
    sends = factor if topology.axes[-1].kind == "switch" else factor * (topology.size - 1) / topology.size
    assert float(CROSSOVERS.ratio(topology) * CROSSOVERS.K * CROSSOVERS.LOAD) == pytest.approx(sends)
