"""The tuned parameters of a search: when presolve stops, the size of CP-SAT's problems, the choice of branches.

None of them changes what is proven, only how long that takes. Most were chosen by hand before there was a record.
Where a measurement is known, it is given. Cases: `bench` is `make bench-search`; `training` is a step of Llama 3 8B,
batch 64 × 1024, on v5e 4×4, where memory binds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """The parameters, each with its meaning and reason. A *part* is a share, from 0 to 1."""

    # --- Elimination
    eliminated_pairs: int = 60_000
    """The most pairs of layouts of a new edge: larger tables cost a sweep more than the node between them does."""
    eliminated_triples: int = 30_000_000
    """The most pairs times states that are compared for one new edge: the limit on the work of making it."""

    # --- Merged orders of axes
    merged_pairs: int = 50_000_000
    """The pairs of layouts of the whole problem from which states are first removed by a coarser one.

    With four mesh axes of two chips there are 233 million; the coarser problem takes 6 s of a processor, and the ascent 0.1 s
    instead of 38.
    """
    merged_flat_part: float = 0.05
    """The coarser problem is left when three sweeps lift its bound by less than this part of the gap."""

    # --- The bound, without multipliers
    flat_part: float = 1e-5
    """A turn counts as stalled if it lifts the bound by less than this part of it."""
    flat_part_of_open: float = 3e-3
    """The same, as a part of the gap between bound and best plan: the worth of a turn depends on the gap."""
    flat_part_to_price: float = 3e-4
    """The same while memory overflows: a multiplier then lifts the bound more than another turn."""
    few_struck: float = 1e-3
    """The most states that a stalled turn may fix, as a part of the survivors; else the next turn is cheaper, and made."""
    last_rounds: int = 4
    """The most further lifts of the bound at the best multipliers."""

    # --- Plans
    near: float = 0.03
    """With a plan to start from: the gap, as a part, at which others are read off the dual."""
    reading: int = 3
    """Then plans are read off once in this many turns.

    Without a plan, in this many turns they are read in several ways.
    """
    forests: int = 4
    """The most forests of nodes drawn to improve a plan; a forest that changes nothing ends the improvement."""
    improvements: int = 20
    """The most rounds of improving all states one at a time; a round that improves nothing ends it."""
    alike: float = 1e-7
    """The part of the bound below which states count as equal: sweeps have not evened out such differences yet."""

    # --- Multipliers of memory
    trials: int = 14
    """The most moves of the multipliers at the root; training took six."""
    branch_trials: int = 6
    """The most moves in a branch: its parent's multipliers are nearly right."""
    settling: int = 4
    """The most lifts of the bound for one trial."""
    step_part: float = 0.5
    """The step of each trial from the best multipliers known towards those that the plans give (Wentges 1997)."""
    settled_part: float = 1e-4
    """The part of the bound by which it may still rise when multipliers are good enough."""
    settled_part_of_open: float = 0.02
    """The same, as a part of the gap."""
    feeble_part: float = 0.1
    """A trial counts as feeble if it lifts the bound by less than this part of that."""
    feeble_trials: int = 3
    """The number of feeble trials in a row after which multipliers stay fixed."""
    growth: float = 4.0
    """The factor by which a multiplier rises while no plan that fits is known."""

    # --- Sizes and limits of CP-SAT's problems
    open_pairs: int = 30_000
    """The most pairs of layouts of the whole problem if the bound leaves a gap."""
    tied_pairs: int = 3_000
    """The same without a gap, when only plans of equal cost are left.

    `make bench-search` then gives CP-SAT 126 to 3,643 booleans, which take it 0.1 to 0.9 s.
    """
    part_pairs: int = 600_000
    """The same in a branch: the time to build the model limits it."""
    part_seconds: float = 5.0
    """CP-SAT's time limit, on its own clock, for the whole problem or a branch, before that is divided."""
    least_wall_seconds: float = 1.0
    """The least time for CP-SAT to confirm a plan, also after the deadline."""
    refinements: int = 4
    """The most further calls with its own answer as hint: costs are then counted in a finer unit."""
    survivor_sweeps: int = 2
    """The sweeps that even out survivors' costs before: with two or three states a node, that is enough."""
    more_survivor_sweeps: int = 30
    """The most further sweeps while each lifts the bound by more than `survivor_flat_part` of the slack.

    A prefill of GPT-2 XL on v5e 4×4 leaves 795 states. With two sweeps CP-SAT takes four calls of 8 to 17 s and leaves a gap
    for branches, with these one call of 1.4 s. Training's models are the same.
    """
    survivor_flat_part: float = 0.01
    """The part of the slack by which a further sweep must lift the bound: less slack excludes states from the model."""

    # --- Branches
    small_pairs: int = 10_000
    """Pairs of layouts, after elimination, below which a branch goes to CP-SAT."""
    close_pairs: int = 40_000
    """The same with a small gap: CP-SAT's cut then closes what branching would divide again and again.

    With 40,000, 30,000 and 20,000 pairs training takes 28, 29 and 31 s of a processor, and in four parts 10, 11 and 24 s. A
    prefill of 256 prompts by PaLM 540B on 64 v4 takes 7, 7 and 3 s.
    """
    close_part: float = 1e-3
    """The part of the best plan that counts as a small gap."""
    branch_flat_part: float = 0.01
    """A branch counts as stalled if two sweeps lift its bound by less than this part of the gap."""
    branch_few_struck: float = 0.01
    """The most that may be fixed then, as a part of the surviving states."""
    contested_part: float = 0.01
    """The part of the gap by which memory must lift the bound for a branch to be about it."""
    hopeful_part: float = 0.2
    """The part of the gap by which a side must lift the bound on its own to be tried (strong branching)."""
    priced_candidates: int = 12
    """The number of candidate nodes among those that depend most on memory's multipliers."""
    other_candidates: int = 6
    """The number of candidates among the others, those with the most bytes around them first."""


POLICY = Policy()
