"""What Hypothesis draws from, shared by all tests.

| strategy | draws |
|---|---|
| `chips()` | chips of the catalogue |
| `axes()` | mesh axes: rings, lines and switches of any speed; `links()` only a torus's, `switches()` only a switch's |
| `axis_sets()` | one to four axes with different names |
| `topology_strings()` | what `parse_topology` takes: every chip, every number of axes |
| `topologies()` | those, parsed |
| `pricings()` | both conventions of bandwidth, with and without overlap |
"""

from __future__ import annotations

from hypothesis import strategies as st

from costmodels.machine import Axis, Chip, Pricing, Topology, catalogue, parse_topology
from costmodels.machine.interconnects import Torus
from costmodels.machine.topology import AXIS_NAMES

BANDWIDTHS = (1e9, 25e9, 45e9, 50e9, 90e9, 450e9, 900e9)
"""Bytes per second, from a data-center network to NVLink 5."""

LATENCIES = (0.0, 1e-6, 5e-6)

SIZES = (1, 2, 3, 4, 5, 8, 16)


def chips() -> st.SearchStrategy[Chip]:
    return st.sampled_from(list(catalogue().values()))


def links(sizes=SIZES) -> st.SearchStrategy[Axis]:
    return st.builds(
        Axis,
        name=st.just("x"),
        size=st.sampled_from(sizes),
        kind=st.just("torus"),
        bytes_per_second=st.sampled_from(BANDWIDTHS),
        wraparound=st.booleans(),
        hop_seconds=st.sampled_from(LATENCIES),
        launch_seconds=st.sampled_from(LATENCIES),
    )


def switches(sizes=SIZES) -> st.SearchStrategy[Axis]:
    return st.builds(
        Axis,
        name=st.just("x"),
        size=st.sampled_from(sizes),
        kind=st.just("switch"),
        bytes_per_second=st.sampled_from(BANDWIDTHS),
        hop_seconds=st.sampled_from(LATENCIES),
        launch_seconds=st.sampled_from(LATENCIES),
    )


def axes(sizes=SIZES) -> st.SearchStrategy[Axis]:
    return links(sizes) | switches(sizes)


@st.composite
def axis_sets(draw: st.DrawFn, each: st.SearchStrategy[Axis] | None = None, most: int = 4) -> tuple[Axis, ...]:
    drawn = draw(st.lists(axes() if each is None else each, min_size=1, max_size=most))
    return tuple(renamed(axis, name) for axis, name in zip(drawn, AXIS_NAMES, strict=False))


def renamed(axis: Axis, name: str) -> Axis:
    return Axis(**{**vars(axis), "name": name})


@st.composite
def topology_strings(draw: st.DrawFn) -> str:
    chip = draw(chips())
    most = int(chip.interconnect.axes) if isinstance(chip.interconnect, Torus) else 2 if chip.kind == "gpu" else 4
    sizes = st.integers(1, 8) if chip.kind == "gpu" else st.sampled_from((*SIZES, 12, 20))
    shape = draw(st.lists(sizes, min_size=1, max_size=most))
    return f"{chip.name}:{'x'.join(map(str, shape))}"


def topologies() -> st.SearchStrategy[Topology]:
    return topology_strings().map(parse_topology)


def pricings() -> st.SearchStrategy[Pricing]:
    return st.builds(
        Pricing, bandwidth=st.sampled_from(("per-axis", "total")), overlap=st.sampled_from((0.0, 0.25, 0.9))
    )
