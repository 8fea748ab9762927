"""The third pass, around `search`: from an annotated function to a solution, and to a record for plan files."""

from autoshard.planning.options import Options as Options
from autoshard.planning.recording import record as record
from autoshard.planning.records import PlanRecord as PlanRecord
from autoshard.planning.solving import solve as solve
