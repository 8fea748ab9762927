"""The catalogue of chips: FLOP/s, memory and interconnect, each number with its source and status.

The catalogue is `chips.toml`, beside this file. A `Chip` holds plain numbers for the formulas; `Chip.constants` has
the source of each, so that reports can list the assumed ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, get_args

from costmodels.machine.interconnects import Bus, Interconnect, Switch, Torus, Wraparound

Status = Literal["published", "measured", "derived", "fitted", "assumed", "given"]
"""The origin of a number: `fitted` means to published or measured times, `given` by the user."""

MEASURED = "measured"
"""The table of a chip in the catalogue with the constants that fit published wall-clock times."""

ChipKind = Literal["tpu", "gpu", "cpu"]


class UnknownChipError(ValueError):
    """Raised for a name that is not in the catalogue; lists similar names and all names."""


class ChipFormatError(ValueError):
    """Raised for an invalid description of a chip; states the chip, the key, the value and the expected values."""


@dataclass(frozen=True)
class Constant:
    """One number of a chip, in the unit of its name."""

    value: float
    source: str
    status: Status


@dataclass(frozen=True)
class Chip:
    """One chip: rates, capacities and overheads, per chip and in the units of their names.

    ```python
    v4 = chip("v4")
    v4.matmul_flops_per_second("bfloat16")       # 2.75e14
    v4.constants["usable_hbm_bytes"].source      # "libtpu, CompileTimeHbmOom message: 30.75 GiB"
    ```

    - `flops_per_second`: dense matrix multiplication, by dtype; `matmul_flops_per_second` looks up any dtype.
    - `vector_flops_per_second`: elementwise work and reductions (a TPU's vector unit, a GPU's CUDA cores).
    - `hbm_bytes`: nominal capacity; `usable_hbm_bytes`: the part that a program may fill.
    - `matrix_tile`: side of the matrix unit, to which matrix dimensions are padded, in elements.
    - `matmul_efficiency`, `hbm_efficiency`, `wire_efficiency`: the parts of the peak rates that programs achieve;
      `reached_hbm_bytes_per_second` and `reached_matmul_flops_per_second` include them.
    - `weight_load_rows`: the rows that stream through the matrix unit while it loads a tile; half a tile's by default.
    - `on_chip_bytes`: the largest array that programs keep in on-chip memory between two operations; 0 by default
      (`costmodels.operations.hbm_bytes`).
    - `prefetch_bytes`: the bytes of weights that programs copy into on-chip memory before their matmul begins; 0 by default.
      Only the overlap "async" uses it (`costmodels.machine.conventions`).
    - `dcn_egress_bytes_per_second`, `dcn_hop_seconds`: one-way, per chip, out of its slice into the data-center
      network; 0 by default.
    - `op_overhead_seconds`, `collective_overhead_seconds`: the start-up time of a matmul, of a collective.
    - `vector_elements_per_second`: the rate at which the vector unit loads and stores elements of arrays; 0 by default,
      which leaves the term out (`costmodels.operations`).
    - `converted_elements_per_second`: the rate at which operands of matmuls are converted from narrower types; 0 by default.
    - `vector_overhead_seconds`, `stream_overhead_seconds`: the start-up time of a loop on the vector unit, and the wait of
      a matmul for operands that are not fetched ahead; 0 by default.
    - `piece_loss`, `summed_piece_loss`: the part of their time that the pieces of a gathered operand of a matmul take more
      beside a ring, for rows and for what is summed over; 0 by default (`costmodels.machine.rings`).
    - `clock_hertz`: converts a compiler's cycles to seconds; None if unknown.
    - `catalogued`: the sources of the numbers; read it through `constants`.
    """

    name: str
    kind: ChipKind
    interconnect: Interconnect
    flops_per_second: Mapping[str, float] = field(hash=False)
    vector_flops_per_second: float
    hbm_bytes: float
    usable_hbm_bytes: float
    hbm_bytes_per_second: float
    matrix_tile: float
    op_overhead_seconds: float
    collective_overhead_seconds: float
    matmul_efficiency: float = 1.0
    hbm_efficiency: float = 1.0
    wire_efficiency: float = 1.0
    weight_load_rows: float = 0.0
    on_chip_bytes: float = 0.0
    prefetch_bytes: float = 0.0
    vector_elements_per_second: float = 0.0
    converted_elements_per_second: float = 0.0
    vector_overhead_seconds: float = 0.0
    stream_overhead_seconds: float = 0.0
    piece_loss: float = 0.0
    summed_piece_loss: float = 0.0
    dcn_egress_bytes_per_second: float = 0.0
    dcn_hop_seconds: float = 0.0
    clock_hertz: float | None = None
    catalogued: Mapping[str, Constant] = field(default_factory=dict, repr=False, compare=False)

    def matmul_flops_per_second(self, dtype: str) -> float:
        """FLOP/s of matrix multiplication in a dtype, by its JAX name.

        A dtype without a rate runs at the rate of the next wider one: 8-bit and narrower integers and floats as bfloat16,
        bfloat16 and float16 as float32. Every other dtype (float64, int32, complex) is costed as float32, which is too
        fast rather than free.
        """
        return next(self.flops_per_second[name] for name in _rate_names(dtype) if name in self.flops_per_second)

    def reached_matmul_flops_per_second(self, dtype: str) -> float:
        """`matmul_flops_per_second` times `matmul_efficiency`."""
        return self.matmul_flops_per_second(dtype) * self.matmul_efficiency

    @property
    def load_rows(self) -> float:
        """`weight_load_rows`, or half of `matrix_tile`."""
        return self.weight_load_rows or self.matrix_tile / 2

    @property
    def reached_hbm_bytes_per_second(self) -> float:
        """`hbm_bytes_per_second` times `hbm_efficiency`."""
        return self.hbm_bytes_per_second * self.hbm_efficiency

    @property
    def constants(self) -> Mapping[str, Constant]:
        """Every number of the chip by its dotted name, e.g. `torus.hop_seconds`, with its source and status."""
        return {name: self._constant(name, value) for name, value in _numbers(self)}

    def _constant(self, name: str, value: float) -> Constant:
        known = self.catalogued.get(name)
        return known if known is not None and known.value == value else Constant(value, "set in Python", "given")

    def override(self, numbers: Mapping[str, float | Constant], source: str) -> Chip:
        """A copy of the chip with some numbers replaced, by dotted name.

        **Arguments:**

        - `numbers`: plain numbers, or constants with their own status and source.
        - `source`: the source of plain numbers; their status is "given".

        **Raises:** `ChipFormatError` for an unknown name, and for a value that is not a number or is negative.
        """
        constants = dict(self.constants)
        for name, given in numbers.items():
            known = given if isinstance(given, Constant) else Constant(given, source, "given")
            constants[_check_name(self, name)] = replace(known, value=_number(self.name, name, known.value))
        return _build(self.name, self.kind, _wraparound_of(self), constants)

    def to_dict(self) -> dict[str, Any]:
        """The chip as a table of `chips.toml`, with its name: plain data, for JSON."""
        table: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for name, constant in self.constants.items():
            *path, key = name.split(".")
            place = table.setdefault(path[0], {}) if path else table
            place[key] = {"value": constant.value, "status": constant.status, "source": constant.source}
        if isinstance(self.interconnect, Torus):
            table["torus"]["wraparound"] = self.interconnect.wraparound
        return table


def chip(name: str) -> Chip:
    """The chip of this name in the catalogue.

    **Raises:** `UnknownChipError`.
    """
    known = catalogue()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UnknownChipError(f"There is no chip {name!r} in the catalogue.{hint} It has {', '.join(known)}.")
    return known[name]


@lru_cache(maxsize=1)
def catalogue() -> Mapping[str, Chip]:
    """Every chip of `chips.toml`, by name."""
    tables = {name: {**table, MEASURED: {}} for name, table in _tables().items()}
    return MappingProxyType({name: chip_from_dict({"name": name, **table}) for name, table in tables.items()})


def use_measured_constants(chip: Chip) -> Chip:
    """The chip with the constants that fit published wall-clock times, as far as the catalogue has them for its name.

    The catalogue's own efficiencies and overheads are those of compilers' estimates, or assumed.
    """
    table = _tables().get(chip.name, {}).get(MEASURED, {})
    return chip.override(dict(_constants(chip.name, table)), "the catalogue")


@lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files(str(__package__)).joinpath("chips.toml").read_text("utf-8"))


def chip_from_dict(table: Mapping[str, Any]) -> Chip:
    """The inverse of `Chip.to_dict`: a table as in `chips.toml`, with the chip's `name`.

    **Raises:** `ChipFormatError`.
    """
    name = str(table.get("name"))
    torus = table.get("torus")
    wraparound: Any = torus.get("wraparound") if isinstance(torus, Mapping) else "never"
    _one_of(name, "kind", table.get("kind"), get_args(ChipKind))
    _one_of(name, "torus.wraparound", wraparound, get_args(Wraparound))
    return _build(name, table["kind"], wraparound, dict(_constants(name, table)))


# A chip's numbers are in three places: its attributes, its interconnect's attributes, its rates by dtype. Their dotted
# names are those of the tables in chips.toml.

_INTERCONNECTS: Mapping[str, type[Torus] | type[Switch] | type[Bus]] = {"torus": Torus, "switch": Switch, "bus": Bus}
_OWN = (
    "vector_flops_per_second",
    "hbm_bytes",
    "usable_hbm_bytes",
    "hbm_bytes_per_second",
    "matrix_tile",
    "op_overhead_seconds",
    "collective_overhead_seconds",
)
_EFFICIENCIES = ("matmul_efficiency", "hbm_efficiency", "wire_efficiency")
_OPTIONAL = (
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
_LEFT_OUT = {**dict.fromkeys(_EFFICIENCIES, 1.0), **dict.fromkeys(_OPTIONAL, 0.0)}
"""Defaults of optional numbers: peak rates, all arrays pass through HBM, and the vector unit has no loops. Plan files older
than these numbers were costed so."""
_MAY_BE_ZERO = (
    *_OPTIONAL,
    "op_overhead_seconds",
    "collective_overhead_seconds",
    "hop_seconds",
    "node_hop_seconds",
)
_WIDER = {"float8": "bfloat16", "int8": "bfloat16", "bfloat16": "float32"}


def _rate_names(dtype: str) -> Iterator[str]:
    """The names of the rates that apply to a dtype, best first."""
    name = "bfloat16" if dtype == "float16" else dtype.removeprefix("u").partition("_")[0]  # float8_e4m3fn, uint4
    name = {"float4": "float8", "float6": "float8", "int1": "int8", "int2": "int8", "int4": "int8"}.get(name, name)
    name = name if name in _WIDER else "float32"
    while name in _WIDER:
        yield name
        name = _WIDER[name]
    yield name


def _numbers(chip: Chip) -> Iterator[tuple[str, float]]:
    """The numbers of a chip, by dotted name, in the order of `chips.toml`."""
    yield from ((f"flops_per_second.{dtype}", rate) for dtype, rate in chip.flops_per_second.items())
    yield from ((name, getattr(chip, name)) for name in _OWN)
    yield from ((name, getattr(chip, name)) for name in _EFFICIENCIES)
    yield from ((name, getattr(chip, name)) for name in _OPTIONAL if getattr(chip, name))
    if chip.clock_hertz is not None:
        yield "clock_hertz", chip.clock_hertz
    prefix = type(chip.interconnect).__name__.lower()
    for name, value in vars(chip.interconnect).items():
        if name != "wraparound":
            yield f"{prefix}.{name}", value


def _wraparound_of(chip: Chip) -> Wraparound:
    return chip.interconnect.wraparound if isinstance(chip.interconnect, Torus) else "never"


def _build(name: str, kind: ChipKind, wraparound: Wraparound, constants: Mapping[str, Constant]) -> Chip:
    groups: dict[str, dict[str, float]] = {"": {}}
    for dotted, constant in constants.items():
        group, _, key = dotted.rpartition(".")
        groups.setdefault(group, {})[key] = constant.value
    rates = groups.get("flops_per_second", {})
    if "float32" not in rates:
        raise ChipFormatError(f"The chip {name!r} lacks flops_per_second.float32, on which other dtypes fall back.")
    clock = groups[""].pop("clock_hertz", None)
    groups[""] = _LEFT_OUT | groups[""]
    _exactly(name, "", groups[""], (*_OWN, *_LEFT_OUT))
    interconnect = _interconnect(name, wraparound, groups)
    return Chip(name, kind, interconnect, rates, **groups[""], clock_hertz=clock, catalogued=dict(constants))


def _interconnect(name: str, wraparound: Wraparound, groups: Mapping[str, Mapping[str, float]]) -> Interconnect:
    present = [key for key in groups if key not in ("", "flops_per_second")]
    if len(present) != 1 or present[0] not in _INTERCONNECTS:
        got = f"has {' and '.join(present)}" if present else "has none"
        raise ChipFormatError(f"The chip {name!r} {got} for its interconnect; expected one of torus, switch, bus.")
    kind = _INTERCONNECTS[present[0]]
    values: dict[str, Any] = dict(groups[present[0]])
    _exactly(name, f"{present[0]}.", values, [key for key in kind.__dataclass_fields__ if key != "wraparound"])
    if kind is Torus:
        values["wraparound"] = wraparound
    return kind(**values)


def _constants(owner: str, table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Constant]]:
    """The tables that hold a `value`, at any depth, by dotted name."""
    for key, entry in table.items():
        dotted = prefix + key
        if dotted in ("name", "kind", "torus.wraparound"):
            continue
        if not isinstance(entry, Mapping):
            raise ChipFormatError(f"{dotted} of the chip {owner!r} must be {{ value, status, source }}, got {entry!r}.")
        if "value" not in entry:
            yield from _constants(owner, entry, f"{dotted}.")
        else:
            yield dotted, constant_from_dict(owner, dotted, entry)


def constant_from_dict(owner: str, dotted: str, table: Mapping[str, Any]) -> Constant:
    """One constant from its table `{ value, status, source }`; `owner` and `dotted` name it in messages.

    **Raises:** `ChipFormatError`.
    """
    _exactly(owner, f"{dotted}.", table, ("value", "status", "source"))
    _one_of(owner, f"{dotted}.status", table["status"], get_args(Status))
    return Constant(_number(owner, dotted, table["value"]), str(table["source"]), table["status"])


def _exactly(owner: str, prefix: str, got: Mapping[str, object], wanted: Sequence[str]) -> None:
    faults = [f"lacks {prefix}{key}" for key in wanted if key not in got]
    faults += [f"has an unknown {prefix}{key}" for key in got if key not in wanted]
    if faults:
        raise ChipFormatError(f"The chip {owner!r} {' and '.join(faults)}; it has {', '.join(wanted)}.")


def _one_of(owner: str, key: str, got: object, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ChipFormatError(f"{key} of the chip {owner!r} must be one of {', '.join(allowed)}, got {got!r}.")


def _number(owner: str, dotted: str, value: Any) -> float:
    key = dotted.rpartition(".")[2]
    number = isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
    if key in _MAY_BE_ZERO:
        fits, right = "a number of 0 or more", number and value >= 0
    elif key in _EFFICIENCIES:
        fits, right = "a number above 0 and at most 1", number and 0 < value <= 1
    else:
        fits, right = "a number above 0", number and value > 0
    if not right:
        raise ChipFormatError(f"{dotted} of the chip {owner!r} must be {fits}, got {value!r}.")
    return float(value)


def _check_name(chip: Chip, name: str) -> str:
    names = dict.fromkeys([*chip.constants, *_OPTIONAL, "clock_hertz"])
    if name not in names and not name.startswith("flops_per_second."):
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ChipFormatError(f"The chip {chip.name!r} has no {name}.{hint} It has {', '.join(names)}.")
    return name
