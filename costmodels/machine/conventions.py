"""Conventions for the cost of collectives; part of a `Topology`, since a proof holds under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

LOOPED: Final = "looped"
"""The overlap of looped collective einsums."""
Bandwidth = Literal["per-axis", "total"]
Overlap = float | Literal["looped"]


class PricingError(ValueError):
    """Raised for an unknown convention; states the known ones."""


@dataclass(frozen=True)
class Pricing:
    """Conventions of the cost model that do not follow from the machine.

    - `bandwidth`: "per-axis": a collective uses the links of its axes. Or "total", as in Pope et al. 2022, appendix A.1:
      over any axes of a torus it uses all links of a chip, $T = D (K - 1) / (K b)$ for $D$ bytes over $K$ chips. A
      switch gives a chip its full bandwidth under both.
    - `overlap`: the part of every collective's bandwidth time that computation hides, from 0 (none) to less than 1; or
      "looped". Latency and launch are never hidden.

    A looped collective einsum (Wang et al. 2023; Pope et al. 2022, §3.5) cuts a matmul into as many pieces as there are
    chips on the collective's axes. Each piece of a gathered operand is multiplied as it arrives; each piece of a
    reduce-scattered result is sent as soon as it is computed. One piece runs with nothing to send: the last of a gathered
    operand, the first of a result. With $t$ seconds of the matmul (the longer of compute and HBM), $w$ of bandwidth time and
    $N$ chips the pair takes

    $$t/N + \\max(t (N-1)/N, w) = t + w - \\min(w, t (N-1)/N).$$

    Under "looped" each matmul hides one collective: the all-gather that ends the reshard of one operand, or the
    reduce-scatter that begins the reshard of its result. The search chooses it as part of the plan, so a matmul's time is
    never used twice.
    """

    bandwidth: Bandwidth = "per-axis"
    overlap: Overlap = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth not in get_args(Bandwidth):
            fits = " or ".join(map(repr, get_args(Bandwidth)))
            raise PricingError(f"bandwidth must be {fits}, got {self.bandwidth!r}.")
        if self.looped:
            return
        overlap: Any = self.overlap
        number = isinstance(overlap, int | float) and not isinstance(overlap, bool)
        if not number or not 0 <= overlap < 1:
            raise PricingError(f'overlap must be a number from 0 to less than 1, or "{LOOPED}", got {overlap!r}.')

    @property
    def looped(self) -> bool:
        """Whether matmuls hide collectives as looped einsums do."""
        return self.overlap == LOOPED

    @property
    def hidden_part(self) -> float:
        """The part of every collective's bandwidth time that is hidden."""
        return 0.0 if isinstance(self.overlap, str) else self.overlap

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


PHYSICAL = Pricing()
"""The default conventions: per-axis bandwidth, no overlap."""


def pricing_from_dict(data: Mapping[str, Any]) -> Pricing:
    """The inverse of `Pricing.to_dict`; missing keys have their defaults.

    **Raises:** `PricingError`.
    """
    known = [field.name for field in fields(Pricing)]
    unknown = [key for key in data if key not in known]
    if unknown:
        raise PricingError(f"The pricing has no {' and no '.join(unknown)}; it has {', '.join(known)}.")
    return Pricing(**data)
