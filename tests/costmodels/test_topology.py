"""Topologies: what strings and files mean, which axes close to rings, and what is refused with which words."""

import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given

from costmodels.machine.chips import ChipFormatError, UnknownChipError, chip
from costmodels.machine.topology import (
    Axis,
    Topology,
    TopologyFormatError,
    complete_axes,
    parse_topology,
    topology_from_dict,
)
from costmodels.machine.topology_file import topology_toml
from tests.support.strategies import topologies, topology_strings


@given(topology_strings())
def test_a_string_gives_its_sizes_in_order(text: str):
    topology = parse_topology(text)
    sizes = [int(size) for size in text.partition(":")[2].split("x")]
    assert list(topology.shape) == sizes
    assert topology.axis_sizes == dict(zip("xyzw", sizes, strict=False))
    assert topology.chip == chip(text.partition(":")[0])
    assert topology.name == text
    assert all(topology.axis(name).size == size for name, size in topology.axis_sizes.items())


@given(topologies())
def test_dict_round_trip(topology: Topology):
    again = topology_from_dict(json.loads(json.dumps(topology.to_dict())))
    assert again == topology
    assert again.chip.constants == topology.chip.constants


@given(topologies())
def test_topologies_are_values(topology: Topology):
    again = parse_topology(topology.name)
    assert (again, hash(again)) == (topology, hash(topology))
    assert pickle.loads(pickle.dumps(topology)) == topology


@given(topologies())
def test_symmetries_part_the_axes(topology: Topology):
    groups = topology.symmetries()
    assert sorted(name for group in groups for name in group) == sorted(topology.axis_sizes)
    for group in groups:
        assert len({replace(topology.axis(name), name="") for name in group}) == 1


@pytest.mark.parametrize(
    ("text", "rings"),
    [
        ("v4:4x4x4", "xyz"),
        ("v4:4x4x8", "xyz"),
        ("v4:8x12x16", "xyz"),
        ("v4:2x2x4", ""),
        ("v4:4x4x2", ""),
        ("v4:4x4x1", ""),
        ("v4:4x4", ""),  # 4×4×1: a slice of a cube
        ("v4:16", ""),
        ("v5p:4x4x4", "xyz"),
        ("v5p:16x20x28", "xyz"),
        ("v5e:4x4", ""),
        ("v5e:8x16", "y"),
        ("v5e:16x16", "xy"),
        ("v5e:16", "x"),
        ("v6e:16x8", "x"),
        ("v6e:8x8", ""),
        ("h100:2x8", ""),
        ("cpu:2x4", ""),
    ],
)
def test_rings(text: str, rings: str):
    assert "".join(axis.name for axis in parse_topology(text).axes if axis.ring) == rings


def test_two_chips_are_no_ring():
    assert not Axis("x", 2, "torus", 1e9, wraparound=True).ring


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("v4:4x4x4", (("x", "y", "z"),)),
        ("v4:4x8x4", (("x", "z"), ("y",))),
        ("v5e:8x16", (("x",), ("y",))),
        ("h100:8x8", (("x",), ("y",))),  # equal sizes, unequal networks
        ("cpu:2x2x2x2", (("x", "y", "z", "w"),)),
    ],
)
def test_symmetries(text: str, groups):
    assert parse_topology(text).symmetries() == groups


def test_gpus_of_one_node_are_joined_by_nvlink():
    (x,) = parse_topology("h100:8").axes
    assert (x.name, x.size, x.kind, x.bytes_per_second) == ("x", 8, "switch", 450e9)


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_each_gpu_has_its_share_of_the_nodes_network(gpus: int):
    x, y = parse_topology(f"h100:4x{gpus}").axes
    assert (x.name, x.kind, x.bytes_per_second) == ("x", "switch", 400e9 / 8)
    assert (y.name, y.kind, y.bytes_per_second) == ("y", "switch", 450e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "v4",
            "Invalid topology 'v4': expected CHIP:AxBxC, such as v4:4x4x4 or h100:2x8 (nodes × GPUs), "
            "or the path of a .toml file.",
        ),
        (
            "v5e:4x4x4",
            "v5e:4x4x4 has 3 sizes, but the torus of v5e has 2 axes; write at most 2 sizes, such as v5e:4x4.",
        ),
        ("v4:4x0x4", "The sizes of v4:4x0x4 must be 1 or more, got 0."),
        (
            "h100:16",
            "h100:16 has 16 GPUs on one node, but a node of h100 has 8; write nodes × GPUs, such as h100:2x8.",
        ),
        ("h100:2x2x8", "h100:2x2x8 must have one or two sizes, nodes × GPUs, such as h100:4x8; got 3."),
        ("cpu:1x1x1x1x1", "cpu:1x1x1x1x1 must have 1 to 4 sizes, got 5."),
    ],
)
def test_what_is_no_topology(text: str, message: str):
    with pytest.raises(TopologyFormatError) as error:
        parse_topology(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text", ["", "v4:", "v4:4x", "v4:x4", "v4:4X4", "v4:4,4", "v4:-4", "v4:4.0", ":4", "v4:4x4x4\n"]
)
def test_malformed_strings_are_refused(text: str):
    with pytest.raises(TopologyFormatError):
        parse_topology(text)


def test_an_unknown_chip_is_named():
    with pytest.raises(UnknownChipError, match="no chip 'v4p'"):
        parse_topology("v4p:4x4x4")


def test_an_unknown_axis_is_named():
    with pytest.raises(KeyError, match="v5e:4x4 has no axis 'z'; it has x, y"):
        parse_topology("v5e:4x4").axis("z")


def test_axes_need_their_own_names():
    x = Axis("x", 2, "torus", 1e9)
    with pytest.raises(TopologyFormatError, match="must have different names, got x, x"):
        Topology("twice", chip("cpu"), (x, x))


@pytest.mark.parametrize("wrong", [{"size": 0}, {"bytes_per_second": 0.0}, {"kind": "star"}])
def test_impossible_axes_are_refused(wrong: dict):
    with pytest.raises(TopologyFormatError, match="must have"):
        Axis(**{"name": "x", "size": 2, "kind": "torus", "bytes_per_second": 1e9, **wrong})


FILE = """
chip = "v4"
shape = [4, 4, 4]

[constants]
hbm_bytes_per_second = 1.1e12
flops_per_second.bfloat16 = 2.5e14
torus.hop_seconds = 2e-6

[axes.z]
bytes_per_second = 2e10
wraparound = false
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "slice.toml"
    path.write_text(FILE)
    return path


def test_a_file_says_what_a_string_says(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text('chip = "h100"\nshape = [4, 8]\nname = "h100:4x8"')
    assert parse_topology(path) == parse_topology(str(path)) == parse_topology("h100:4x8")


def test_a_file_overrides_constants_and_axes(file):
    topology = parse_topology(file)
    assert topology.name == "slice"
    assert topology.chip.hbm_bytes_per_second == 1.1e12
    assert topology.chip.matmul_flops_per_second("bfloat16") == 2.5e14
    assert topology.chip.constants["hbm_bytes_per_second"].status == "given"
    assert topology.chip.constants["hbm_bytes_per_second"].source == str(file)
    assert topology.chip.constants["hbm_bytes"] == chip("v4").constants["hbm_bytes"]
    assert [axis.hop_seconds for axis in topology.axes] == [2e-6] * 3
    assert [axis.ring for axis in topology.axes] == [True, True, False]
    assert [axis.bytes_per_second for axis in topology.axes] == [45e9, 45e9, 2e10]
    assert topology.symmetries() == (("x", "y"), ("z",))
    assert topology_from_dict(json.loads(json.dumps(topology.to_dict()))) == topology


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('chip = "v4"', "", " lacks chip; its keys are chip, shape, name, slices, measured, constants, axes, pricing."),
        ('chip = "v4"', "chip = 4", ": chip must be the name of a chip in quotes, got 4."),
        (
            'chip = "v4"',
            'chip = "v4"\npods = 1',
            " has an unknown key pods; its keys are chip, shape, name, slices, measured, constants, axes, pricing.",
        ),
        ("shape = [4, 4, 4]", 'shape = "4x4"', ": shape must be a list of sizes, such as [4, 4, 4], got '4x4'."),
        ("shape = [4, 4, 4]", "shape = [4, 4.0]", ": shape must be a list of whole numbers, got 4.0."),
        ("2e-6", "-1", ": torus.hop_seconds of the chip 'v4' must be a number of 0 or more, got -1."),
        ("1.1e12", '"fast"', ": hbm_bytes_per_second of the chip 'v4' must be a number above 0, got 'fast'."),
        ("[axes.z]", "[axes.w]", ": axes has an unknown key w; its keys are x, y, z."),
        (
            "wraparound = false",
            "ring = false",
            ": axes.z has an unknown key ring; its keys are bytes_per_second, wraparound, hop_seconds.",
        ),
        ("wraparound = false", "wraparound = 0", ": axes.z.wraparound must be true or false, got 0."),
        ("2e10", "0", ": axes.z.bytes_per_second must be a number above 0, got 0."),
        ("2e10", "true", ": axes.z.bytes_per_second must be a number of 0 or more, got True."),
    ],
)
def test_what_a_file_may_not_say(file, old: str, new: str, message: str):
    file.write_text(FILE.replace(old, new))
    with pytest.raises(TopologyFormatError) as error:
        parse_topology(file)
    assert str(error.value) == f"{file}{message}"


def test_an_unknown_constant_is_named_with_the_nearest(file):
    file.write_text(FILE.replace("hbm_bytes_per_second", "hbm_byte_per_second"))
    with pytest.raises(TopologyFormatError, match=r"no hbm_byte_per_second\. Did you mean hbm_bytes_per_second\?"):
        parse_topology(file)


def test_a_switch_has_no_ends_to_join(tmp_path):
    path = tmp_path / "node.toml"
    path.write_text('chip = "h100"\nshape = [8]\n[axes.x]\nwraparound = true')
    with pytest.raises(TopologyFormatError, match="applies to torus axes only"):
        parse_topology(path)


@pytest.mark.parametrize("text", ["not toml", 'chip = "v4'])
def test_an_unreadable_file_is_named(tmp_path, text: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TopologyFormatError, match=r"bad\.toml cannot be read: "):
        parse_topology(path)
    with pytest.raises(TopologyFormatError, match=r"none\.toml cannot be read: "):
        parse_topology(tmp_path / "none.toml")


def test_a_dict_with_missing_or_unknown_keys_is_refused():
    data = parse_topology("v4:4x4x4").to_dict()
    with pytest.raises(TopologyFormatError, match="The topology lacks axes; its keys are name, chip, axes"):
        topology_from_dict({key: value for key, value in data.items() if key != "axes"})
    with pytest.raises(TopologyFormatError, match="An axis of the topology has an unknown key color"):
        topology_from_dict({**data, "axes": [{**data["axes"][0], "color": "red"}]})
    with pytest.raises(ChipFormatError, match="lacks hbm_bytes"):
        topology_from_dict({**data, "chip": {k: v for k, v in data["chip"].items() if k != "hbm_bytes"}})


# --- Slices on the data centre's network


def test_slices_are_joined_by_the_data_centres_network():
    topology = parse_topology("2xv4:4x4x8")
    between, *within = topology.axes
    assert (topology.axis_sizes, topology.slices, topology.size) == ({"w": 2, "x": 4, "y": 4, "z": 8}, 2, 256)
    assert (between.kind, between.bytes_per_second, between.hop_seconds) == ("switch", 6.25e9, 1e-5)
    assert tuple(within) == parse_topology("v4:4x4x8").axes
    assert topology.total_bytes_per_second == parse_topology("v4:4x4x8").total_bytes_per_second
    assert topology.symmetries() == (("w",), ("x", "y"), ("z",))
    assert complete_axes(topology) == topology


def test_one_slice_is_no_axis():
    assert parse_topology("1xv5e:4x4").axes == parse_topology("v5e:4x4").axes
    assert parse_topology("cpu:2x1x1x2").slices == 1  # its axis w is of the host's own devices


def test_a_file_says_how_many_slices(tmp_path):
    path = tmp_path / "slices.toml"
    path.write_text(topology_toml(parse_topology("4xv6e:2x4")))
    assert parse_topology(path) == parse_topology("4xv6e:2x4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2xh100:4x8", "only chips on a torus come in slices"),
        ("0xv4:4x4x4", "must have 1 or more slices, got 0"),
        ("2xv4:4x4x4x4", "at most 3 sizes"),
    ],
)
def test_what_slices_there_cannot_be(text: str, message: str):
    with pytest.raises(TopologyFormatError, match=message):
        parse_topology(text)


def test_a_chip_that_does_not_know_its_network_comes_in_no_slices(tmp_path):
    path = tmp_path / "slices.toml"
    path.write_text('chip = "v4"\nshape = [2, 2, 1]\nslices = 2\n[constants]\ndcn_egress_bytes_per_second = 0\n')
    with pytest.raises(TopologyFormatError, match=r"dcn_egress_bytes_per_second in a \.toml file"):
        parse_topology(path)


def test_measured_constants_come_with_their_overlap(tmp_path):
    """Each is fitted, and names its rows; the catalogue's own constants stay as they are."""
    path = tmp_path / "measured.toml"
    path.write_text('chip = "v5e"\nshape = [4, 4]\nmeasured = true\n')
    found, plain = parse_topology(path), parse_topology("v5e:4x4")
    changed = {name: c for name, c in found.chip.constants.items() if plain.chip.constants.get(name) != c}
    assert {"hbm_efficiency", "matmul_efficiency", "torus.hop_seconds"} <= changed.keys()
    assert {constant.status for constant in changed.values()} == {"fitted"}
    assert all("published_measured.py" in constant.source for constant in changed.values())
    assert found.pricing.asynchronous and not plain.pricing.asynchronous
    assert found.axes[0].hop_seconds == found.chip.constants["torus.hop_seconds"].value
    path.write_text('chip = "v5e"\nshape = [4, 4]\nmeasured = true\npricing = { overlap = 0.0 }\n')
    assert parse_topology(path).pricing.overlap == 0.0
    path.write_text('chip = "v5e"\nshape = [4, 4]\nmeasured = 1\n')
    with pytest.raises(ValueError, match="measured must be true or false"):
        parse_topology(path)
