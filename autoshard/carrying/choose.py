"""The choice of constraints, by compiling.

Beginning with none, the places whose source lines have the costliest differences from the plan are constrained: one, then
two more, four more, ..., because one end of a reshard helps little without the other. This ends when the program is within
`STEP`, `WIRE` and `PEAK` of the manual one, or at all places. Then each place without which the best program stays within
these bounds, or as good as it is, is left out, and of the others each layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autoshard.carrying.candidates import Place
from autoshard.planning.carriage import CarriedProgram

STEP, WIRE, PEAK = 0.03, 0.02, 0.05
"""The parts by which step, bytes on the wire and peak may exceed those of the manual program."""
LITTLE = 0.001
"""The part of a step that unplanned collectives may take without counting, such as sums of scalars."""
WORTH = 0.0015
"""The part of a step that a constraint must save to be kept, if no program is within its bounds."""
MOST = 40
"""The number of programs that are compiled to choose constraints."""


@dataclass(frozen=True)
class Trial:
    """A compiled program with some places constrained, and its unplanned seconds by source line."""

    chosen: tuple[Place, ...]
    program: CarriedProgram
    costs: Mapping[str, float]


Compile = Callable[[Sequence[Place]], Trial]


def choose(compile: Compile, every: Sequence[Place], manual: CarriedProgram, most: int = MOST) -> Trial:
    """The fewest constraints found with which the program is within its bounds, or the fastest program found.

    **Arguments:**

    - `every`: all places.
    - `manual`: the program that the others are compared with.
    - `most`: the number of programs to compile; at least one is.
    """
    return _Chooser(compile, every, manual, most).run()


def within(program: CarriedProgram, manual: CarriedProgram, step: float = STEP) -> bool:
    """Whether a program is within the bounds of the manual one; `step` is that of its step."""
    little = program.wire_seconds <= manual.wire_seconds + LITTLE * manual.step_seconds
    return (
        program.step_seconds <= manual.step_seconds * (1 + step)
        and (program.wire_bytes <= manual.wire_bytes * (1 + WIRE) or little)
        and program.peak_bytes <= manual.peak_bytes * (1 + PEAK)
    )


def loss(program: CarriedProgram, manual: CarriedProgram) -> float:
    """Seconds by which programs are compared: the step, what its collectives take more, and a peak out of bounds."""
    over = max(program.peak_bytes / manual.peak_bytes - 1 - PEAK, 0.0) if manual.peak_bytes else 0.0
    more = max(program.wire_seconds - manual.wire_seconds, 0.0)
    return program.step_seconds + more + over * manual.step_seconds


class _Chooser:
    """The programs compiled so far."""

    def __init__(self, compile: Compile, every: Sequence[Place], manual: CarriedProgram, most: int) -> None:
        self.compile, self.every, self.manual, self.left = compile, every, manual, most
        self.known: dict[frozenset[Place], Trial] = {}

    def run(self) -> Trial:
        found = [self.trial(())]
        for count in (2**k for k in range(len(self.every))):
            last = found[-1]
            if self.within(last) or self.left <= 0 or len(last.chosen) == len(self.every):
                break
            found.append(self.trial((*last.chosen, *self.next(last, count))))
        return self.pruned(min(found, key=lambda trial: (not self.within(trial), self.loss(trial))))

    def next(self, trial: Trial, count: int) -> Sequence[Place]:
        """The next places to constrain, the costliest differences first; all the others if none has any."""
        chosen = {id(place) for place in trial.chosen}
        scores = [(_score(place, trial.costs), place) for place in self.every if id(place) not in chosen]
        found = sorted((pair for pair in scores if pair[0] > 0), key=lambda pair: -pair[0])
        return [place for _, place in (found[:count] or scores)]

    def pruned(self, best: Trial) -> Trial:
        """Without the places that are not needed, left out in ever smaller groups, and then without single layouts."""
        size = max(1, len(best.chosen) // 2)
        while self.left > 0:
            best = self.without_groups(best, size)
            if size == 1:
                break
            size //= 2
        for place in reversed(best.chosen):
            best = self.without_layouts(best, place)
        return best

    def without_groups(self, best: Trial, size: int) -> Trial:
        """Without the groups of this many places that are not needed, the last chosen, which gain least, first."""
        end = len(best.chosen)
        while end > 0 and self.left > 0:
            begin = max(end - size, 0)
            best = self.better(best, (*best.chosen[:begin], *best.chosen[end:]))
            end = begin
        return best

    def without_layouts(self, best: Trial, place: Place) -> Trial:
        """Without the layouts of a place that are not needed, such as one that its operands give the value anyway."""
        for layout in place.constraint.layouts if len(place.constraint.layouts) > 1 else ():
            left = tuple(each for each in place.constraint.layouts if each != layout)
            if not left or self.left <= 0:
                break
            less = replace(place, constraint=replace(place.constraint, layouts=left))
            found = self.better(best, tuple(less if each == place else each for each in best.chosen))
            best, place = (best, place) if found is best else (found, less)
        return best

    def better(self, best: Trial, fewer: Sequence[Place]) -> Trial:
        """The program with fewer constraints if it is as good, else the best one."""
        found = self.trial(fewer)
        fits = self.within(found) if self.within(best) else self.loss(found) <= self.loss(best) * (1 + WORTH)
        return found if fits else best

    def trial(self, chosen: Sequence[Place]) -> Trial:
        key = frozenset(chosen)
        if key not in self.known:
            self.left -= 1
            self.known[key] = self.compile(chosen)
        return self.known[key]

    def within(self, trial: Trial) -> bool:
        return within(trial.program, self.manual)

    def loss(self, trial: Trial) -> float:
        return loss(trial.program, self.manual)


def _score(place: Place, costs: Mapping[str, float]) -> float:
    """Seconds of differences at the place's line, and half of those at the lines that read its values."""
    own = place.constraint.source
    return costs.get(own, 0.0) + sum(costs.get(source, 0.0) for source in {*place.readers} - {own}) / 2
