"""Layout search for JAX: the proven fastest sharding of a function over a torus of chips."""

from typing import TYPE_CHECKING, Any

from autoshard.census import Census as Census
from autoshard.census import census as census
from autoshard.decorator import autoshard as autoshard
from autoshard.difference import Difference as Difference
from autoshard.difference import diff as diff
from autoshard.errors import AutoshardError as AutoshardError
from autoshard.errors import ExportError as ExportError
from autoshard.errors import InfeasibleError as InfeasibleError
from autoshard.errors import PlanMismatchError as PlanMismatchError
from autoshard.errors import TopologyError as TopologyError
from autoshard.errors import TraceError as TraceError
from autoshard.errors import UnsupportedPrimitiveError as UnsupportedPrimitiveError
from autoshard.pins import PinError as PinError
from autoshard.pins import pin as pin
from autoshard.plan import Plan as Plan
from autoshard.plan_file import load as load
from autoshard.planning import search as search
from autoshard.remedies import Remedies as Remedies
from autoshard.remedies import remedies as remedies
from autoshard.rules.einsum import RuleError as RuleError
from autoshard.rules.registered import rule as rule
from autoshard.workload import Workload as Workload

if TYPE_CHECKING:
    from autoshard._audit import Audit as Audit
    from autoshard._audit import audit as audit
    from autoshard.calibration import Calibration as Calibration
    from autoshard.calibration import calibrate as calibrate
    from autoshard.phases import PhasePlans as PhasePlans
    from autoshard.phases import search_phases as search_phases
    from autoshard.symbolic import SymbolicTrace as SymbolicTrace
    from autoshard.symbolic import trace_symbolic as trace_symbolic
    from autoshard.variants import best_plans as best_plans
    from autoshard.variants import why_not as why_not
    from autoshard.verification import Verification as Verification
    from autoshard.verification import verify as verify

_AT_FIRST_USE = {
    "Audit": "autoshard._audit",
    "audit": "autoshard._audit",
    "Calibration": "autoshard.calibration",
    "calibrate": "autoshard.calibration",
    "PhasePlans": "autoshard.phases",
    "search_phases": "autoshard.phases",
    "SymbolicTrace": "autoshard.symbolic",
    "trace_symbolic": "autoshard.symbolic",
    "best_plans": "autoshard.variants",
    "why_not": "autoshard.variants",
    "Verification": "autoshard.verification",
    "verify": "autoshard.verification",
}
"""What few runs need, by the module that it is in; the others are there at once."""


def __dir__() -> list[str]:
    return sorted({*globals(), *_AT_FIRST_USE})


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module 'autoshard' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_AT_FIRST_USE[name]), name)
