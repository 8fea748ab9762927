"""The run of a sweep: every point is looked up, ruled out or solved, and stored at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from autoshard.errors import AutoshardError
from autoshard.sweep.engines import Engine, WorkerDied, run_here
from autoshard.sweep.job import Constraints
from autoshard.sweep.lower_bounds import reason_to_prune
from autoshard.sweep.points import Point, Unmade, key
from autoshard.sweep.results import FAILED, PRUNED, Result
from autoshard.sweep.store import Store, StoreError
from autoshard.sweep.worker import solve

Said = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A point to solve, as sent to a worker."""

    point: Point
    key: str

    def __call__(self) -> Result:
        return solve(self.point, self.key)


@dataclass(frozen=True)
class Done:
    """A point with its result; `known` if it was in the store, `key` if it is in the store or was searched."""

    point: Point | Unmade
    result: Result
    key: str = ""
    known: bool = False


@dataclass
class Sweep:
    """A running sweep: iterate over it for every finished point, in any order.

    `unkept` has the results that could not be stored, with the reason in `trouble`.
    """

    points: Sequence[Point | Unmade]
    store: Store | None = None
    engine: Engine = run_here
    constraints: Constraints = field(default_factory=Constraints)
    say: Said = lambda _: None
    unkept: list[Done] = field(default_factory=list)
    trouble: str = ""
    solved: int = 0
    _open: dict[str, list[Point]] = field(default_factory=dict)
    _ended: dict[str, Result] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Done]:
        first, rest = None, iter(self.points)
        for point in rest:  # points without a search are done at once
            found = self._settle(point)
            if isinstance(found, Done):
                yield found
            elif found is not None:
                first = found
                break
        if first is None:
            return
        settled: deque[Done] = deque()
        for task, outcome in self.engine(self._begun(self._tasks(first, rest, settled))):
            self.solved += 1
            result = _result(outcome)
            if result.outcome != FAILED:
                self._keep(Done(task.point, result, task.key))
            self._ended[task.key] = replace(result, plans={})
            for point in self._open.pop(task.key):
                yield Done(point, result, task.key)
            while settled:
                yield settled.popleft()
        yield from settled
        self._keep_the_rest()

    def _tasks(self, first: Task, rest: Iterator[Point | Unmade], settled: deque[Done]) -> Iterator[Task]:
        """The points to search; the next one is traced while workers search the previous ones."""
        yield first
        for point in rest:
            found = self._settle(point)
            if isinstance(found, Task):
                yield found
            elif found is not None:
                settled.append(found)

    def _settle(self, point: Point | Unmade) -> Done | Task | None:
        """The result of a point that needs no search, or the task to search it; None if an equal one is being searched."""
        if isinstance(point, Unmade):
            return Done(point, Result(FAILED, point.why))
        try:
            name, why = key(point), reason_to_prune(point, *self._limits())
        except AutoshardError as error:
            return Done(point, Result(FAILED, str(error)))
        except Exception as error:  # the user's function may raise anything while it is traced
            return Done(point, Result(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}"))
        if name in self._open:
            self._open[name].append(point)
            return None
        if name in self._ended:
            return Done(point, self._ended[name], name)
        if (found := self._look_up(name)) is not None:
            return Done(point, found, name, True)
        if why:
            return Done(point, Result(PRUNED, why))
        self._open[name] = [point]
        return Task(point, name)

    def _limits(self) -> tuple[float | None, float | None]:
        return self.constraints.seconds_per_token, self.constraints.seconds_to_first_token

    def _look_up(self, name: str) -> Result | None:
        return self.store.get(name) if self.store is not None else None

    def _begun(self, tasks: Iterable[Task]) -> Iterator[Task]:
        for task in tasks:
            if self.store is not None:
                try:
                    self.store.begin(task.key)
                except StoreError as error:
                    self._complain(str(error))
            yield task

    def _keep(self, done: Done) -> None:
        if self.store is None:
            return
        try:
            self.store.add(done.key, done.point.name, done.result)
        except StoreError as error:
            self._complain(str(error))
            self.unkept.append(done)

    def _complain(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            self.say(f"{trouble} Continuing. Results that are not stored are shown, and stored at the end if possible.")

    def _keep_the_rest(self) -> None:
        """A second attempt to store results, since there may be space again."""
        again, self.unkept = self.unkept, []
        for done in again:
            self._keep(replace(done))


def _result(outcome: object) -> Result:
    if isinstance(outcome, Result):
        return outcome
    if isinstance(outcome, WorkerDied):
        return Result(FAILED, f"The worker died: {outcome}. The usual cause is a lack of memory; try fewer workers.")
    return Result(FAILED, f"{type(outcome).__name__}: {outcome}")
