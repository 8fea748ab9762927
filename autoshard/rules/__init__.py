"""Sharding rules, one per primitive: factors as data, and the primitive's implementation on one chip's shards."""

from autoshard.rules import contract as contract
from autoshard.rules import elementwise as elementwise
from autoshard.rules import indexing as indexing
from autoshard.rules import linalg as linalg
from autoshard.rules import parts as parts
from autoshard.rules import ragged as ragged
from autoshard.rules import random as random
from autoshard.rules import registered as registered
from autoshard.rules import shape as shape
from autoshard.rules import window as window
from autoshard.rules.kernels import named_kernel as named_kernel
from autoshard.rules.kernels import rule_of_equation as rule_of_equation
from autoshard.rules.rule import Factors as Factors
from autoshard.rules.rule import Rule as Rule
from autoshard.rules.rule import register as register
from autoshard.rules.rule import rule_for as rule_for
