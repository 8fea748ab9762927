"""The schema of a job file for pydantic; `autoshard.sweep.job` documents its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Value = StrictBool | StrictInt | StrictFloat | StrictStr
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
T = TypeVar("T")


def _several(given: Any) -> Any:
    return given if isinstance(given, list) else [given]


Several = Annotated[list[T], BeforeValidator(_several)]
"""A list, or one value that stands for a list of it."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PhaseTable(_Table):
    """`[phases.NAME]`."""

    target: StrictStr
    kind: Literal["prefill", "decode", "step"] | None = None
    arguments: dict[str, Value | dict[Literal["of"], StrictStr]] = {}
    tokens: StrictStr | None = None


class ChipsTable(_Table):
    """`[chips]`."""

    kinds: Several[StrictStr] = []
    counts: Several[Count] = []
    topologies: Several[StrictStr] = []
    any_shape: StrictBool = False


class ConstraintsTable(_Table):
    """`[constraints]`."""

    seconds_per_token: Positive | None = None
    seconds_to_first_token: Positive | None = None
    memory_gib: Positive | None = None


class PriceTable(_Table):
    """`[price]`."""

    per_chip_hour: dict[str, Positive]
    currency: StrictStr = "USD"


class TogetherTable(_Table):
    """`[together]`."""

    phases: list[StrictStr] = []
    shared: StrictStr = "params"
    repeats: dict[str, StrictStr | StrictInt] = {}


class FrontierTable(_Table):
    """`[frontier]`."""

    per: Several[StrictStr] | None = None


class SearchTable(_Table):
    """`[search]`."""

    time_limit: Positive | None = None
    padding: StrictBool = True


class JobFile(_Table):
    """The whole file."""

    name: StrictStr = ""
    phases: Annotated[dict[str, PhaseTable], Field(min_length=1)]
    vary: dict[str, Annotated[Several[Value], Field(min_length=1)]] = {}
    chips: ChipsTable
    constraints: ConstraintsTable = ConstraintsTable()
    price: PriceTable | None = None
    together: TogetherTable | None = None
    frontier: FrontierTable = FrontierTable()
    search: SearchTable = SearchTable()
