"""The layout search: strategies, reshards, the CP-SAT model and its independent checker, without JAX."""

from search.answer.assignment import Choice as Choice
from search.answer.check import check as check
from search.answer.solution import Limits as Limits
from search.answer.solution import NoPlan as NoPlan
from search.answer.solution import Proof as Proof
from search.answer.solution import Solution as Solution
from search.formulation.layouts import Layout as Layout
from search.formulation.strategies import Strategy as Strategy
from search.solve import search as search
