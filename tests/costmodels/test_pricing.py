"""Conventions of pricing: which links a collective has, and what of it is hidden."""

import json
from dataclasses import replace
from math import prod

import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st

from costmodels.machine import Axis, Pricing, parse_topology
from costmodels.machine.collectives import bytes_symbol, expression, seconds, seconds_on, values, wire_bytes
from costmodels.machine.conventions import PricingError, pricing_from_dict
from costmodels.machine.topology import TopologyFormatError, topology_from_dict
from tests.support.strategies import axis_sets, links, pricings, topologies

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
kinds = st.sampled_from(KINDS)
byte_counts = st.integers(0, 10**12).map(float)
TOTAL = Pricing("total")
B = 270e9
"""Bytes a second of all links of a TPU v4."""


def without_latency(axis_set):
    return tuple(replace(axis, hop_seconds=0.0, launch_seconds=0.0) for axis in axis_set)


# Laws


@given(kinds, axis_sets(), pricings(), byte_counts)
def test_numbers_are_those_of_the_expression(kind, axis_set, pricing, count):
    stands_for = {**values(axis_set, pricing, B), bytes_symbol(): count}
    by_symbols = sympy.lambdify(list(stands_for), expression(kind, axis_set, pricing), "math")
    assert seconds(kind, axis_set, count, pricing, B) == pytest.approx(by_symbols(*stands_for.values()), rel=1e-12)


@given(kinds, axis_sets(links()), byte_counts)
def test_in_total_a_torus_takes_its_bytes_at_its_bandwidth(kind, axis_set, count):
    sent = wire_bytes(kind, axis_set, count)
    assert seconds(kind, without_latency(axis_set), count, TOTAL, B) == pytest.approx(sent / B, rel=1e-12)


@given(axis_sets(), pricings(), byte_counts)
def test_all_reduce_is_reduce_scatter_and_all_gather_launched_once(axis_set, pricing, count):
    launch = max((axis.launch_seconds for axis in axis_set if axis.size > 1), default=0.0)
    parts = sum(seconds(kind, axis_set, count, pricing, B) for kind in ("reduce-scatter", "all-gather"))
    assert seconds("all-reduce", axis_set, count, pricing, B) == pytest.approx(parts - launch, rel=1e-12)


@given(kinds, axis_sets(most=3), pricings(), byte_counts)
def test_axes_of_size_1_are_free(kind, axis_set, pricing, count):
    single = Axis("one", 1, "torus", 45e9, hop_seconds=1.0, launch_seconds=1.0)
    found = seconds(kind, (*axis_set, single), count, pricing, B)
    assert found == seconds(kind, axis_set, count, pricing, B)


@given(kinds, links(sizes=(4, 16)), byte_counts)
def test_in_total_splitting_an_axis_in_two_changes_nothing_but_latency(kind, link, count):
    side = int(link.size**0.5)
    halves = (replace(link, name="a", size=side), replace(link, name="b", size=side))
    whole, split = (seconds(kind, without_latency(axes), count, TOTAL, B) for axes in ((link,), halves))
    assert split == pytest.approx(whole, rel=1e-12)


@given(st.sampled_from(("all-gather", "reduce-scatter", "all-reduce")), st.sampled_from((4, 16)), byte_counts)
def test_on_a_switch_splitting_an_axis_in_two_is_never_slower(kind, size, count):
    # Two axes are two networks, each with its own bandwidth: splitting adds links, except under "total".
    one = Axis("a", size, "switch", 1e9)
    side = replace(one, size=int(size**0.5))
    assert seconds(kind, (side, replace(side, name="b")), count) <= seconds(kind, (one,), count) * (1 + 1e-12)


@given(topologies(), kinds, byte_counts)
def test_total_is_never_slower_than_per_axis(topology, kind, count):
    names = [axis.name for axis in topology.axes]
    total = replace(topology, pricing=TOTAL)
    assert seconds_on(total, kind, names, count) <= seconds_on(topology, kind, names, count) * (1 + 1e-12)


@given(kinds, axis_sets(), pricings(), byte_counts, st.floats(0, 0.99), st.floats(0, 0.99))
def test_more_overlap_is_never_slower(kind, axis_set, pricing, count, a, b):
    less, more = (replace(pricing, overlap=overlap) for overlap in sorted((a, b)))
    assert seconds(kind, axis_set, count, more, B) <= seconds(kind, axis_set, count, less, B) * (1 + 1e-12)


@given(kinds, axis_sets(), pricings(), byte_counts)
def test_latency_is_never_hidden(kind, axis_set, pricing, count):
    assert seconds(kind, axis_set, 0.0, pricing, B) == seconds(kind, axis_set, 0.0)
    exposed = replace(pricing, overlap=0.0)
    wire = seconds(kind, without_latency(axis_set), count, exposed, B)
    hidden = seconds(kind, axis_set, count, exposed, B) - seconds(kind, axis_set, count, pricing, B)
    assert hidden == pytest.approx(pricing.overlap * wire, rel=1e-9, abs=1e-9 * float(1 + wire))


@given(kinds, axis_sets(), byte_counts, st.floats(1, 100))
def test_a_faster_chip_is_never_slower_in_total(kind, axis_set, count, factor):
    assert seconds(kind, axis_set, count, TOTAL, B * factor) <= seconds(kind, axis_set, count, TOTAL, B)


# Pope et al. 2022


@pytest.mark.parametrize("names", ["x", "xy", "xyz"])
def test_in_total_an_all_gather_is_that_of_pope_et_al(names):
    topology = replace(parse_topology("v4:4x4x4"), pricing=TOTAL)
    K, D = 4 ** len(names), 2.0 * 512 * 18432
    latency = len(names) * 2e-6 + 1e-6
    assert topology.total_bytes_per_second == B
    assert seconds_on(topology, "all-gather", names, D) == pytest.approx(D / B * (K - 1) / K + latency)


def test_links_of_axes_that_the_mesh_leaves_out_count():
    assert parse_topology("v4:4x4").total_bytes_per_second == B
    assert parse_topology("h100:8").total_bytes_per_second == 0


@given(byte_counts, kinds)
def test_a_switch_gives_all_it_has_either_way(count, kind):
    topology = parse_topology("h100:2x8")
    total = replace(topology, pricing=TOTAL)
    assert seconds_on(total, kind, "xy", count) == seconds_on(topology, kind, "xy", count)


# Saving, reading, refusing


@given(topologies(), pricings())
def test_a_topology_keeps_its_conventions(topology, pricing):
    topology = replace(topology, pricing=pricing)
    again = topology_from_dict(json.loads(json.dumps(topology.to_dict())))
    assert again == topology and again.pricing == pricing


@given(topologies())
def test_a_topology_saved_without_conventions_has_the_physical_ones(topology):
    data = {key: value for key, value in topology.to_dict().items() if key != "pricing"}
    assert topology_from_dict(data) == topology


@given(pricings(), topologies())
def test_conventions_tell_topologies_apart(pricing, topology):
    assume(pricing != Pricing())
    assert replace(topology, pricing=pricing) != topology


def test_conventions_in_a_file(tmp_path):
    file = tmp_path / "pope.toml"
    file.write_text('chip = "v4"\nshape = [4, 4, 4]\n[pricing]\nbandwidth = "total"\noverlap = 0.5\n')
    assert parse_topology(file).pricing == Pricing("total", 0.5)
    file.write_text('chip = "v4"\nshape = [4, 4, 4]\n[pricing]\nbandwidth = "all"\n')
    with pytest.raises(TopologyFormatError, match="bandwidth must be 'per-axis' or 'total', got 'all'"):
        parse_topology(file)


@pytest.mark.parametrize("overlap", [1, -0.1, "loop", True, float("nan")])
def test_no_other_overlap(overlap):
    with pytest.raises(PricingError, match='a number from 0 to less than 1, "looped" or "async", got'):
        Pricing(overlap=overlap)


def test_unknown_conventions_are_named():
    with pytest.raises(PricingError, match="The pricing has no speed; it has bandwidth, overlap"):
        pricing_from_dict({"speed": 1})


def test_the_wire_of_a_whole_torus():
    topology = replace(parse_topology("v4:4x4x8"), pricing=TOTAL)
    n = prod(topology.shape)
    expected = 1e9 * (n - 1) / n / B + (2 + 2 + 4) * 1e-6 + 1e-6
    assert seconds_on(topology, "reduce-scatter", "xyz", 1e9) == pytest.approx(expected)
