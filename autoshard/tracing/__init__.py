"""The first pass: from a JAX function to a program over factors, and blocks that can be run."""

from autoshard.tracing.blocks import Traced as Traced
from autoshard.tracing.traced_function import TracedFunction as TracedFunction
from autoshard.tracing.traced_function import trace_function as trace_function
