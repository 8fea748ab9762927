"""Layout search for JAX: the proven fastest sharding of a function over a torus of chips."""

from typing import TYPE_CHECKING, Any

from autoshard.errors import AutoshardError as AutoshardError
from autoshard.errors import ExportError as ExportError
from autoshard.errors import InfeasibleError as InfeasibleError
from autoshard.errors import OptionError as OptionError
from autoshard.errors import PlanMismatchError as PlanMismatchError
from autoshard.errors import TopologyError as TopologyError
from autoshard.errors import TraceError as TraceError
from autoshard.errors import UnsupportedPrimitiveError as UnsupportedPrimitiveError
from autoshard.workload import Workload as Workload

if TYPE_CHECKING:
    __version__: str
    from autoshard.auditing.audit import Audit as Audit
    from autoshard.auditing.audit import audit as audit
    from autoshard.calibrating.calibration import Calibration as Calibration
    from autoshard.calibrating.calibration import calibrate as calibrate
    from autoshard.carrying.carry import carry as carry
    from autoshard.carrying.render import carriage_text as carriage_text
    from autoshard.comparing.diff import Difference as Difference
    from autoshard.comparing.diff import diff as diff
    from autoshard.comparing.other_plans import best_plans as best_plans
    from autoshard.comparing.other_plans import why_not as why_not
    from autoshard.comparing.verify import Verification as Verification
    from autoshard.comparing.verify import verify as verify
    from autoshard.comparing.what_if import Remedies as Remedies
    from autoshard.comparing.what_if import remedies as remedies
    from autoshard.decorator import autoshard as autoshard
    from autoshard.emitting.formats import choose_formats as choose_formats
    from autoshard.explaining.rule_coverage import Census as Census
    from autoshard.explaining.rule_coverage import census as census
    from autoshard.phases import PhasePlans as PhasePlans
    from autoshard.phases import search_phases as search_phases
    from autoshard.pipeline import search as search
    from autoshard.plan import Plan as Plan
    from autoshard.plan import load as load
    from autoshard.rules.einsum import RuleError as RuleError
    from autoshard.rules.pin import PinError as PinError
    from autoshard.rules.pin import pin as pin
    from autoshard.rules.registered import rule as rule
    from autoshard.symbolic import SymbolicTrace as SymbolicTrace
    from autoshard.symbolic import trace_symbolic as trace_symbolic

_AT_FIRST_USE = {
    "autoshard": "autoshard.decorator",
    "search": "autoshard.pipeline",
    "Plan": "autoshard.plan",
    "load": "autoshard.plan",
    "RuleError": "autoshard.rules.einsum",
    "PinError": "autoshard.rules.pin",
    "pin": "autoshard.rules.pin",
    "rule": "autoshard.rules.registered",
    "carry": "autoshard.carrying.carry",
    "carriage_text": "autoshard.carrying.render",
    "Difference": "autoshard.comparing.diff",
    "diff": "autoshard.comparing.diff",
    "Remedies": "autoshard.comparing.what_if",
    "remedies": "autoshard.comparing.what_if",
    "choose_formats": "autoshard.emitting.formats",
    "Census": "autoshard.explaining.rule_coverage",
    "census": "autoshard.explaining.rule_coverage",
    "Audit": "autoshard.auditing.audit",
    "audit": "autoshard.auditing.audit",
    "Calibration": "autoshard.calibrating.calibration",
    "calibrate": "autoshard.calibrating.calibration",
    "PhasePlans": "autoshard.phases",
    "search_phases": "autoshard.phases",
    "SymbolicTrace": "autoshard.symbolic",
    "trace_symbolic": "autoshard.symbolic",
    "best_plans": "autoshard.comparing.other_plans",
    "why_not": "autoshard.comparing.other_plans",
    "Verification": "autoshard.comparing.verify",
    "verify": "autoshard.comparing.verify",
}
"""Names by module, imported at first use: the command line answers `--help` without JAX."""


def __dir__() -> list[str]:
    return sorted({*globals(), *_AT_FIRST_USE, "__version__"})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from autoshard._util.version import version

        return version()
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module 'autoshard' has no attribute {name!r}")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(_AT_FIRST_USE[name]), name)
    return found
