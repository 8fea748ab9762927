"""The catalogue of chips: every number has its source, and the numbers agree with each other and with the compiler."""

import json
import re
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given

from costmodels.machine.chips import (
    Chip,
    ChipFormatError,
    Constant,
    Status,
    UnknownChipError,
    catalogue,
    chip,
    chip_from_dict,
)
from costmodels.machine.interconnects import Torus
from tests.support.strategies import chips

CATALOGUE = list(catalogue().values())
TPUS = [c for c in CATALOGUE if c.kind == "tpu"]
each_chip = pytest.mark.parametrize("c", CATALOGUE, ids=lambda c: c.name)


def test_catalogue_has_the_chips_that_topology_strings_name():
    assert {"v4", "v5e", "v5p", "v6e", "a100", "h100", "h200", "b200", "cpu"} <= set(catalogue())


@each_chip
def test_every_number_has_source_and_status(c: Chip):
    for name, constant in c.constants.items():
        assert constant.status in get_args(Status), name
        assert constant.status != "given", name
        assert len(constant.source) > 5, name


OPTIONAL = (
    "weight_load_rows",
    "on_chip_bytes",
    "prefetch_bytes",
    "vector_elements_per_second",
    "converted_elements_per_second",
    "vector_overhead_seconds",
    "stream_overhead_seconds",
    "piece_loss",
    "summed_piece_loss",
    "dcn_egress_bytes_per_second",
    "dcn_hop_seconds",
)


@each_chip
def test_constants_are_the_attributes(c: Chip):
    own = {name for name, value in vars(c).items() if isinstance(value, float) and (value or name not in OPTIONAL)}
    rates = {f"flops_per_second.{dtype}" for dtype in c.flops_per_second}
    joined = {name for name in c.constants if "." in name} - rates
    assert set(c.constants) == own | rates | joined
    assert all(c.constants[name].value == getattr(c, name) for name in own)
    assert {name.split(".")[1] for name in joined} == {n for n in vars(c.interconnect) if n != "wraparound"}


@each_chip
def test_every_key_says_its_unit(c: Chip):
    units = r"(bytes|seconds|hertz|per_second)$|per_second\.\w+$|(matrix_tile|axes|chips_per_node)$|_(efficiency|loss)$"
    assert all(re.search(units, name) for name in c.constants)


@each_chip
def test_numbers_are_in_their_order_of_magnitude(c: Chip):
    assert 0.85 * c.hbm_bytes < c.usable_hbm_bytes <= c.hbm_bytes
    assert c.vector_flops_per_second < c.flops_per_second["float32"] <= c.flops_per_second["bfloat16"]
    assert 0 <= max(c.op_overhead_seconds, c.collective_overhead_seconds) < 1e-4
    assert 0.5 < min(c.matmul_efficiency, c.hbm_efficiency, c.wire_efficiency) <= 1


@pytest.mark.parametrize("c", TPUS, ids=lambda c: c.name)
def test_matrix_units_times_clock_give_the_peak(c: Chip):
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}[c.name]
    assert c.clock_hertz is not None
    assert 2 * units * c.clock_hertz == pytest.approx(c.flops_per_second["bfloat16"], rel=3e-3)


# "How To Scale Your Model", part 2, "TPU Specs": its numbers are rounded to two digits.
@pytest.mark.parametrize(
    ("name", "hbm_rate", "bfloat16", "int8", "link", "axes"),
    [
        ("v4", 1.2e12, 2.75e14, 2.75e14, 4.5e10, 3),
        ("v5p", 2.8e12, 4.59e14, 9.18e14, 9e10, 3),
        ("v5e", 8.1e11, 1.97e14, 3.94e14, 4.5e10, 2),
        ("v6e", 1.6e12, 9.20e14, 1.84e15, 9e10, 2),
    ],
)
def test_tpus_are_those_of_the_scaling_book(name, hbm_rate, bfloat16, int8, link, axes):
    c = chip(name)
    assert isinstance(c.interconnect, Torus)
    assert c.hbm_bytes_per_second == pytest.approx(hbm_rate, rel=0.03)
    assert c.matmul_flops_per_second("bfloat16") == pytest.approx(bfloat16, rel=0.003)
    assert c.matmul_flops_per_second("int8") == pytest.approx(int8, rel=0.003)
    assert (c.interconnect.link_bytes_per_second, c.interconnect.axes) == (link, axes)


# The same book, part 12, rounded to two digits; B200 there is the chip's 192 GB, not the 180 of a DGX.
@pytest.mark.parametrize(
    ("name", "hbm", "hbm_rate", "bfloat16", "int8"),
    [
        ("a100", 80e9, 2.0e12, 3.1e14, 6.2e14),
        ("h100", 80e9, 3.4e12, 9.9e14, 2.0e15),
        ("h200", 141e9, 4.8e12, 9.9e14, 2.0e15),
        ("b200", 192e9, 8.0e12, 2.3e15, 4.5e15),
    ],
)
def test_gpus_are_those_of_the_scaling_book(name, hbm, hbm_rate, bfloat16, int8):
    c = chip(name)
    assert c.hbm_bytes == pytest.approx(hbm, rel=0.07)
    assert c.hbm_bytes_per_second == pytest.approx(hbm_rate, rel=0.03)
    assert c.matmul_flops_per_second("bfloat16") == pytest.approx(bfloat16, rel=0.03)
    assert c.matmul_flops_per_second("int8") == pytest.approx(int8, rel=0.03)


@pytest.mark.parametrize(
    ("name", "dtype", "runs_as"),
    [
        ("v4", "bfloat16", "bfloat16"),
        ("v4", "float16", "bfloat16"),
        ("v4", "float32", "float32"),
        ("v4", "float64", "float32"),
        ("v4", "int32", "float32"),
        ("v4", "complex64", "float32"),
        ("v4", "bool", "float32"),
        ("v4", "no such dtype", "float32"),
        ("v4", "uint4", "int8"),
        ("v4", "float8_e4m3fn", "bfloat16"),
        ("v5p", "float8_e4m3fn", "float8"),
        ("h100", "float8_e5m2", "float8"),
        ("h100", "float4_e2m1fn", "float8"),
        ("a100", "float8_e5m2", "bfloat16"),
        ("cpu", "int8", "bfloat16"),
    ],
)
def test_matmul_rate_of_a_dtype(name: str, dtype: str, runs_as: str):
    assert chip(name).matmul_flops_per_second(dtype) == chip(name).flops_per_second[runs_as]


def test_unknown_chip_names_the_nearest_and_all():
    with pytest.raises(UnknownChipError) as error:
        chip("v5")
    assert str(error.value) == (
        f"There is no chip 'v5' in the catalogue. Did you mean v5p or v5e or v4? It has {', '.join(catalogue())}."
    )


@given(chips())
def test_dict_round_trip_keeps_every_number_and_source(c: Chip):
    again = chip_from_dict(json.loads(json.dumps(c.to_dict())))
    assert (again, again.constants, hash(again)) == (c, c.constants, hash(c))


def test_override_is_marked_as_given():
    c = chip("v4").override({"torus.hop_seconds": 0, "flops_per_second.float8": 3e14, "hbm_bytes": 1e9}, "mine.toml")
    assert isinstance(c.interconnect, Torus)
    assert (c.interconnect.hop_seconds, c.matmul_flops_per_second("float8_e5m2"), c.hbm_bytes) == (0.0, 3e14, 1e9)
    assert c.constants["hbm_bytes"] == Constant(1e9, "mine.toml", "given")
    assert c.constants["matrix_tile"] == chip("v4").constants["matrix_tile"]
    assert c.interconnect.wraparound == "all axes multiples of 4"
    assert c != chip("v4")


def test_a_number_replaced_in_python_no_longer_claims_its_source():
    c = replace(chip("v4"), hbm_bytes=1e9)
    assert c.constants["hbm_bytes"] == Constant(1e9, "set in Python", "given")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"hbm_byte": 1.0},
            "The chip 'v4' has no hbm_byte. Did you mean hbm_bytes? It has flops_per_second.bfloat16, ",
        ),
        ({"hbm_bytes": -1}, "hbm_bytes of the chip 'v4' must be a number above 0, got -1."),
        ({"hbm_bytes": "32 GiB"}, "hbm_bytes of the chip 'v4' must be a number above 0, got '32 GiB'."),
        ({"hbm_bytes": True}, "hbm_bytes of the chip 'v4' must be a number above 0, got True."),
        ({"hbm_bytes": float("nan")}, "hbm_bytes of the chip 'v4' must be a number above 0, got nan."),
        ({"torus.hop_seconds": -1}, "torus.hop_seconds of the chip 'v4' must be a number of 0 or more, got -1."),
    ],
)
def test_what_cannot_be_overridden(numbers: dict, message: str):
    with pytest.raises(ChipFormatError) as error:
        chip("v4").override(numbers, "mine")
    assert str(error.value).startswith(message)


def without(key: str):
    return lambda table: table.pop(key)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.update(kind="npu"), "kind of the chip 'v4' must be one of tpu, gpu, cpu, got 'npu'."),
        (
            lambda t: t["torus"].update(wraparound="always"),
            "torus.wraparound of the chip 'v4' must be one of "
            "all axes multiples of 4, axis of 16, never, got 'always'.",
        ),
        (
            lambda t: t["hbm_bytes"].update(status="certain"),
            "hbm_bytes.status of the chip 'v4' must be one of "
            "published, measured, derived, fitted, assumed, given, got 'certain'.",
        ),
        (
            lambda t: t["hbm_bytes"].pop("source"),
            "The chip 'v4' lacks hbm_bytes.source; it has value, status, source.",
        ),
        (
            lambda t: t.update(hbm_bytes=3),
            "hbm_bytes of the chip 'v4' must be { value, status, source }, got 3.",
        ),
        (
            without("torus"),
            "The chip 'v4' has none for its interconnect; expected one of torus, switch, bus.",
        ),
        (
            lambda t: t["torus"].pop("axes"),
            "The chip 'v4' lacks torus.axes; it has axes, link_bytes_per_second, hop_seconds.",
        ),
        (
            without("flops_per_second"),
            "The chip 'v4' lacks flops_per_second.float32, on which other dtypes fall back.",
        ),
    ],
)
def test_what_is_no_chip(spoil, message: str):
    table = json.loads(json.dumps(chip("v4").to_dict()))
    spoil(table)
    with pytest.raises(ChipFormatError) as error:
        chip_from_dict(table)
    assert str(error.value) == message


@pytest.mark.tpu
@pytest.mark.parametrize("c", TPUS, ids=lambda c: c.name)
def test_usable_memory_is_what_the_compiler_says(c: Chip):
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    shape = {"v4": "2x2x1", "v5p": "2x2x1", "v5e": "2x2", "v6e": "2x2"}[c.name]
    megacore = {"chip_config_name": "megacore"} if c.name == "v4" else {}
    described = topologies.get_topology_desc(platform="tpu", topology_name=f"{c.name}:{shape}", **megacore)
    too_much = jax.ShapeDtypeStruct((2**37,), "int8", sharding=SingleDeviceSharding(described.devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(lambda x: x + x).lower(too_much).compile()
    found = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error.value))
    assert found
    # The message has two decimals, and libtpu 0.0.42.1 and 0.0.50.1 differ in the last.
    assert c.usable_hbm_bytes / 2**30 == pytest.approx(float(found[1]), abs=0.02)
