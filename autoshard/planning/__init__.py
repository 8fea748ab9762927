"""The third pass, around `search`: an annotated function is solved, and the solution becomes a record that files hold."""

from autoshard.planning.options import Options as Options
from autoshard.planning.recording import record as record
from autoshard.planning.records import PlanRecord as PlanRecord
from autoshard.planning.solving import solve as solve
