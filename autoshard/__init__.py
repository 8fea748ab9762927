"""Layout search for JAX: the proven fastest sharding of a function over a torus of chips."""

from autoshard._audit import Audit as Audit
from autoshard._audit import audit as audit
from autoshard.calibration import Calibration as Calibration
from autoshard.calibration import calibrate as calibrate
from autoshard.decorator import autoshard as autoshard
from autoshard.errors import AutoshardError as AutoshardError
from autoshard.errors import ExportError as ExportError
from autoshard.errors import InfeasibleError as InfeasibleError
from autoshard.errors import PlanMismatchError as PlanMismatchError
from autoshard.errors import TopologyError as TopologyError
from autoshard.errors import TraceError as TraceError
from autoshard.errors import UnsupportedPrimitiveError as UnsupportedPrimitiveError
from autoshard.phases import search_phases as search_phases
from autoshard.pins import PinError as PinError
from autoshard.pins import pin as pin
from autoshard.plan import Plan as Plan
from autoshard.plan_file import load as load
from autoshard.planning import search as search
from autoshard.remedies import Remedies as Remedies
from autoshard.remedies import remedies as remedies
from autoshard.symbolic import SymbolicTrace as SymbolicTrace
from autoshard.symbolic import trace_symbolic as trace_symbolic
from autoshard.workload import Workload as Workload
