"""From a function to its plan: trace, annotate, search, and an account of what was found in the user's words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import jax
import numpy as np

from autoshard import trees
from autoshard.blocks import Literal, Traced
from autoshard.devices import topology_of
from autoshard.infeasible import explained
from autoshard.plan import ArrayPlan, Estimate, OperationPlan, Plan, PlannedCollective, abstract
from autoshard.trace import fingerprint, trace
from costmodels.operations import evaluate, flops, hbm_bytes
from costmodels.program import Operation, Program
from costmodels.topology import Topology
from search.layouts import Layout, replicated, shards
from search.memory import rows
from search.problem import Problem
from search.solution import Choice, Collective, collectives, kept, needed, produced
from search.solve import Limits, NoPlan, Solution
from search.solve import search as solve
