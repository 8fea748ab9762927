"""What is tuned in a search: when presolve stops, how much CP-SAT is given, how branches are chosen.

None of it changes what is proven, only how long that takes. Most were chosen by hand before there was a record; where a
measurement is known, it is given. Cases: `bench` is `make bench-search`; `training` a step of Llama 3
8B, batch 64 × 1024, on v5e 4×4, where memory binds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """The numbers, each with what it is and why it is what it is. A *part* is a share, from 0 to 1."""

    # --- Elimination
    eliminated_pairs: int = 60_000
    """The most pairs of layouts that a new edge may have: larger tables cost a sweep more than the node between them does."""
    eliminated_triples: int = 30_000_000
    """The most pairs times states that are compared for one new edge: what it may cost to make."""

    # --- The bound, without multipliers
    flat_part: float = 1e-5
    """The part of the bound by which a turn lifts it when it is said to stall."""
    flat_part_of_open: float = 3e-3
    """The same, as a part of what is open between bound and best plan: what a turn is worth depends on what is left."""
    flat_part_to_price: float = 3e-4
    """The same while memory overflows: a multiplier then lifts the bound more than another turn."""
    few_struck: float = 1e-3
    """The part of the surviving states that such a turn strikes out, at most; if more, the next turn is cheaper, and made."""
    last_rounds: int = 4
    """How often the bound is lifted once more at the best multipliers, at most."""

    # --- Plans
    near: float = 0.03
    """With a plan to start from: how near the bound is, as a part, when others are read off the dual."""
    reading: int = 3
    """In every how many turns plans are read off then; without one, in how many they are read in more than one way."""
    forests: int = 4
    """How many forests of nodes are drawn, at most, to improve a plan; one that changes nothing ends it."""
    improvements: int = 20
    """How often all states are improved one at a time, at most; it ends when nothing improves."""
    alike: float = 1e-7
    """The part of the bound by which states may differ and still count as alike: what sweeps have not evened out yet."""
    repairs: int = 8
    """How often multipliers of overflowing rows are raised to make a plan fit."""
    repair_factor: float = 1.3
    """By what factor: eight of them make it eight times as high."""

    # --- Multipliers of memory
    trials: int = 14
    """How often multipliers are moved at the root, at most; training was seen to take six."""
    branch_trials: int = 6
    """How often in a branch, at most: its parent's are nearly right."""
    settling: int = 4
    """How often, at most, the bound is lifted for one trial."""
    step_part: float = 0.5
    """How far each trial goes from the best multipliers known to those that the plans tell (Wentges 1997)."""
    settled_part: float = 1e-4
    """The part of the bound by which it may still rise, at most, when multipliers are good enough."""
    settled_part_of_open: float = 0.02
    """The same, as a part of what is open."""
    feeble_part: float = 0.1
    """The part of that by which a trial lifts the bound when it is feeble."""
    feeble_trials: int = 3
    """After how many feeble trials in turn multipliers are left alone."""
    growth: float = 4.0
    """By what factor a multiplier rises while no plan that fits is known."""

    # --- Kernel search
    kernel_gap: float = 1e-3
    """The part of the best plan that is open when plans are put together."""
    kernel_pairs: int = 4_000
    """The most pairs of layouts that this leaves open, so that CP-SAT may end within its seconds."""
    kernel_halvings: int = 12
    """How often the window of further states is halved, at most, until they are few enough."""
    kernel_seconds: float = 3.0
    """How long CP-SAT may take over it, on its own clock."""
    kernel_excess: float = 0.01
    """The part of the excess over the bound within which its plan is good enough."""
    kernel_sweeps: int = 6
    """How often the kernel is swept before."""

    # --- What CP-SAT is given
    open_pairs: int = 30_000
    """The most pairs of layouts of the whole problem, where the bound leaves something open."""
    tied_pairs: int = 3_000
    """The same where it does not, and only plans of equal cost are left.

    `make bench-search` then gives CP-SAT 126 to 3,643 booleans, which take it 0.1 to 0.9 s.
    """
    part_pairs: int = 600_000
    """The same in a part: what building the model can take."""
    first_seconds: float = 5.0
    """How long CP-SAT may take, on its own clock, over what the bound leaves open, before that is divided."""
    least_wall_seconds: float = 1.0
    """What it has at least to confirm a plan, however late it is."""
    refinements: int = 4
    """How often it is asked again with what it found: costs are then counted in a finer unit."""
    survivor_sweeps: int = 2
    """How often survivors' costs are evened out before: of two or three states a node, that is enough."""

    # --- Branches
    small_pairs: int = 10_000
    """Pairs of layouts, after elimination, below which a branch goes to CP-SAT."""
    close_pairs: int = 200_000
    """The same where little is open: CP-SAT then closes by the cut what branching would have to divide again and again."""
    close_part: float = 1e-3
    """The part of the best plan that is little."""
    branch_flat_part: float = 0.01
    """The part of what is open by which two sweeps lift a branch's bound when it is said to stall."""
    branch_few_struck: float = 0.01
    """The part of the surviving states that is struck out then, at most."""
    promising_part: float = 0.5
    """The part of what is open in another branch by which the bound of one must be higher to be looked at after it."""
    contested_part: float = 0.01
    """The part of what is open by which memory must lift the bound for a branch to be about it."""
    hopeful_part: float = 0.2
    """The part of what is open by which a side must lift the bound by itself to be tried (strong branching)."""
    priced_candidates: int = 12
    """How many nodes are candidates of those on which memory's multipliers hang most."""
    other_candidates: int = 6
    """How many of the others, those with the most bytes around them first."""
    probing_rounds: int = 4
    """How often candidates are looked at again, at most, after sides were dropped."""


POLICY = Policy()
