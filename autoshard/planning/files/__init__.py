"""Plans outside of a process: plan files, the cache on disk, and one plan for all processes of a cluster."""

from autoshard.planning.files.multihost import agree_on_plan as agree_on_plan
from autoshard.planning.files.plan_cache import load_or_make as load_or_make
from autoshard.planning.files.plan_file import dumps as dumps
from autoshard.planning.files.plan_file import load as load
from autoshard.planning.files.plan_file import loads as loads
from autoshard.planning.files.plan_file import save as save
