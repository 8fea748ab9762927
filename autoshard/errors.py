"""What can go wrong, each as its own error; all are `AutoshardError`s."""

from __future__ import annotations


class AutoshardError(Exception):
    """The base of every error that autoshard raises on purpose."""


class InfeasibleError(AutoshardError):
    """No layout fits: which arrays need how many bytes against what a chip holds, and the smallest topology that would do."""


class UnsupportedPrimitiveError(AutoshardError):
    """A primitive has no rule and was not allowed to be replicated; names the primitive and the user's source line."""


class PlanMismatchError(AutoshardError):
    """A plan does not belong to this function, these shapes or this file format; names the paths that differ."""


class TopologyError(AutoshardError):
    """A topology is malformed, names no known chip, or does not fit the devices."""


class TraceError(AutoshardError):
    """A function or a target file could not be traced; the cause is chained."""


class ExportError(AutoshardError):
    """A plan cannot be said in another format; names the arrays that cannot, and what would do."""


class MissingProgramError(AutoshardError, ValueError):
    """A plan from an older file does not hold its program, so it cannot be analysed."""
