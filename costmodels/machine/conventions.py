"""Conventions for the cost of collectives; part of a `Topology`, since a proof holds under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any, Final, Literal, get_args

LOOPED: Final = "looped"
"""The overlap of looped collective einsums."""
ASYNC: Final = "async"
"""The overlap of asynchronous copies and collectives."""
EXPERT_LOAD: Final = 1.5
"""The default of `Pricing.expert_load`: the buffer factor of MaxText's ring of experts in its published runs (maxtext#4114)."""
Bandwidth = Literal["per-axis", "total"]
Overlap = float | Literal["looped", "async"]


class PricingError(ValueError):
    """Raised for an unknown convention; states the known ones."""


@dataclass(frozen=True)
class Pricing:
    """Conventions of the cost model that do not follow from the machine.

    - `bandwidth`: "per-axis": a collective uses the links of its axes. Or "total", as in Pope et al. 2022, appendix A.1:
      over any axes of a torus it uses all links of a chip, $T = D (K - 1) / (K b)$ for $D$ bytes over $K$ chips. A
      switch gives a chip its full bandwidth under both.
    - `overlap`: the part of every collective's bandwidth time that computation hides, from 0 (none) to less than 1,
      "looped" or "async". Under a number, latency and launch are not hidden.
    - `expert_load`: if groups of rows are split over chips, as the experts of a mixture, the rows of the chip with the most
      over the mean (`costmodels.program.grouped`). It is an assumption about the router, at least 1. Buffers for rows that are
      sent to the chips of their groups have room for as many.

    A looped collective einsum (Wang et al. 2023; Pope et al. 2022, §3.5) cuts a matmul into as many pieces as there are
    chips on the collective's axes. Each piece of a gathered operand is multiplied as it arrives; each piece of a
    reduce-scattered result is sent as soon as it is computed. One piece runs with nothing to send: the last of a gathered
    operand, the first of a result. With $t$ seconds of the matmul (the longer of compute and HBM), $w$ of bandwidth time and
    $N$ chips the pair takes

    $$t/N + \\max(t (N-1)/N, w) = t + w - \\min(w, t (N-1)/N).$$

    This holds for the bandwidth "total", as in the paper. Under "per-axis" a looped collective is costed as the ring of
    permutes that is emitted (`costmodels.machine.rings`): over one axis, hop by hop with latency and launch, beside pieces
    of the matmul that are costed as runs of their own.

    Under "looped" each matmul hides one collective: the all-gather that ends the reshard of one operand, or the
    reduce-scatter that begins the reshard of its result. The search chooses it as part of the plan, so a matmul's time is
    never used twice. A collective that would save nothing is none of these.

    Under "async" the core, HBM and the links run at the same time where no dependence is between them. A matmul that needs $c$
    seconds of arithmetic with its overhead and $m$ of HBM, and whose own communication on the chain of dependences takes $a$
    seconds, takes

    $$a + \\max(c, m - \\min(a, p)) = \\max(c + a, m, m + a - p),$$

    because the compiler copies its weights into on-chip memory ahead, at most $p$ seconds of them: all bytes of operands that
    are arguments, as far as `prefetch_bytes` of the chip hold them. With room enough it is $\\max(c + a, m)$. The
    communication is the reduction of its result if that is a partial sum, and the reshard of its other operand if not.
    Transfers that nothing waits for are hidden behind the rest, $\\max(c, m - p)$ seconds of each matmul: gathers of weights,
    and reductions of results that no matmul needs (`costmodels.program.asynchronous`).
    """

    bandwidth: Bandwidth = "per-axis"
    overlap: Overlap = 0.0
    expert_load: float = EXPERT_LOAD

    def __post_init__(self) -> None:
        if self.bandwidth not in get_args(Bandwidth):
            fits = " or ".join(map(repr, get_args(Bandwidth)))
            raise PricingError(f"bandwidth must be {fits}, got {self.bandwidth!r}.")
        load: Any = self.expert_load
        if not isinstance(load, int | float) or isinstance(load, bool) or not 1 <= load < inf:
            raise PricingError(f"expert_load must be a finite number of at least 1, got {load!r}.")
        if self.looped or self.asynchronous:
            return
        overlap: Any = self.overlap
        number = isinstance(overlap, int | float) and not isinstance(overlap, bool)
        if not number or not 0 <= overlap < 1:
            raise PricingError(
                f'overlap must be a number from 0 to less than 1, "{LOOPED}" or "{ASYNC}", got {overlap!r}.'
            )

    @property
    def looped(self) -> bool:
        """Whether matmuls hide collectives as looped einsums do."""
        return self.overlap == LOOPED

    @property
    def asynchronous(self) -> bool:
        """Whether copies and collectives that nothing waits for run beside the core."""
        return self.overlap == ASYNC

    @property
    def hides(self) -> bool:
        """Whether the time that a matmul hides of its communication depends on the matmul."""
        return self.looped or self.asynchronous

    @property
    def hidden_part(self) -> float:
        """The part of every collective's bandwidth time that is hidden."""
        return 0.0 if isinstance(self.overlap, str) else self.overlap

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; without the default load, as in older files."""
        found = asdict(self)
        return found if self.expert_load != EXPERT_LOAD else {k: v for k, v in found.items() if k != "expert_load"}


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
