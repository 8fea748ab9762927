"""By which conventions collectives are priced; part of a `Topology`, as what its plans are proven against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

LOOPED: Final = "looped"
"""The overlap of looped collective einsums."""
Bandwidth = Literal["per-axis", "total"]
Overlap = float | Literal["looped"]


class PricingError(ValueError):
    """A convention that there is not; says what would fit."""


@dataclass(frozen=True)
class Pricing:
    """The conventions of a cost model that a machine alone does not decide.

    - `bandwidth`: "per-axis", as the links are: a collective has the links of the axes it runs over. Or "total", as in
      Pope et al. 2022, appendix A.1: over any axes of a torus it has all the links of a chip, $T = D (K - 1) / (K b)$
      for $D$ bytes over $K$ chips. A switch gives a chip all it has either way.
    - `overlap`: the part of every collective's time on the wire that hides behind computation, from 0 (none does) to
      less than 1; or "looped". Latency and launch are never hidden.

    A looped collective einsum (Wang et al. 2023; Pope et al. 2022, §3.5) cuts a product into as many pieces as there are
    chips on the collective's axes: of a gathered operand each piece is multiplied as it comes, of a result that is
    reduced and scattered each piece is sent as soon as it is made. One piece runs with nothing to send: of a gathered operand
    the last, of a result the first. With $t$ seconds of a product (the longer of compute and HBM), $w$ on the wire and $N$
    chips the pair takes

    $$t/N + \\max(t (N-1)/N, w) = t + w - \\min(w, t (N-1)/N).$$

    Under "looped" each product hides one collective so: the all-gather that ends the change of layout of one operand, or
    the reduce-scatter that begins that of its result. Which one is part of the plan, chosen by the search, so that a
    product's time is never counted twice.
    """

    bandwidth: Bandwidth = "per-axis"
    overlap: Overlap = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth not in get_args(Bandwidth):
            fits = " or ".join(map(repr, get_args(Bandwidth)))
            raise PricingError(f"bandwidth is {self.bandwidth!r}; {fits} would do.")
        if self.looped:
            return
        overlap: Any = self.overlap
        number = isinstance(overlap, int | float) and not isinstance(overlap, bool)
        if not number or not 0 <= overlap < 1:
            raise PricingError(f'overlap is {overlap!r}; a number from 0 to less than 1, or "{LOOPED}", would do.')

    @property
    def looped(self) -> bool:
        """Whether products hide collectives as looped einsums do."""
        return self.overlap == LOOPED

    @property
    def hidden_part(self) -> float:
        """The part of every collective's time on the wire that is hidden, whatever it is for."""
        return 0.0 if isinstance(self.overlap, str) else self.overlap

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
