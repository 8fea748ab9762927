"""By which conventions collectives are priced; part of a `Topology`, as what its plans are proven against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Bandwidth = Literal["per-axis", "total"]


class PricingError(ValueError):
    """A convention that there is not; says what would fit."""


@dataclass(frozen=True)
class Pricing:
    """The conventions of a cost model that a machine alone does not decide.

    - `bandwidth`: "per-axis", as the links are: a collective has the links of the axes it runs over. Or "total", as in
      Pope et al. 2022, appendix A.1: over any axes of a torus it has all the links of a chip, $T = D (K - 1) / (K b)$
      for $D$ bytes over $K$ chips. A switch gives a chip all it has either way.
    - `overlap`: the part of every collective's time on the wire that hides behind computation, from 0 (none does) to
      less than 1. Latency and launch are never hidden.

    A "looped collective einsum" hides a collective behind the one matmul that it feeds or that feeds it, and the pair
    takes the longer of both times. That is no option here: several collectives may want to hide behind one matmul, and
    no sum of costs over operations and over single changes of layout says how they share it. Give the fraction that
    they hide instead; what it would hide of a plan is among `autoshard.remedies`.
    """

    bandwidth: Bandwidth = "per-axis"
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth not in get_args(Bandwidth):
            fits = " or ".join(map(repr, get_args(Bandwidth)))
            raise PricingError(f"bandwidth is {self.bandwidth!r}; {fits} would do.")
        number = isinstance(self.overlap, int | float) and not isinstance(self.overlap, bool)
        if not number or not 0 <= self.overlap < 1:
            raise PricingError(f"overlap is {self.overlap!r}; a number from 0 to less than 1 would do.")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


PHYSICAL = Pricing()
"""The conventions by default: the links as they are, and nothing hidden."""


def pricing_from_dict(data: Mapping[str, Any]) -> Pricing:
    """The inverse of `Pricing.to_dict`; what is left out is as by default.

    **Raises:** `PricingError`.
    """
    known = [field.name for field in fields(Pricing)]
    unknown = [key for key in data if key not in known]
    if unknown:
        raise PricingError(f"The pricing has no {' and no '.join(unknown)}; it has {', '.join(known)}.")
    return Pricing(**data)
