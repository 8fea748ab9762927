"""Matmuls of grouped rows: each row is multiplied by the matrix of its group, as in a mixture of experts.

The rows of one group are consecutive, and the sizes of the groups are known only at run time. If the groups are split over
$s_g$ chips, a chip has on average one in $s_g$ of the rows. The chip with the most rows has $\\lambda$ times as many
(`Pricing.expert_load`), so of $m$ rows one chip multiplies

$$R = \\min(m, \\lambda m / s_g), \\qquad G' = \\min(G / s_g, \\lceil R \\rceil)$$

rows and groups: a group without a row is neither computed nor read. A kernel works on tiles of $T = \\min(t, m)$ rows, and on
one group at a time. A tile that holds rows of two groups is computed twice, so it computes

$$\\lceil R / T \\rceil + G' (G - 1) / G$$

tiles. So does the kernel of the TPU compiler (libtpu 0.0.50): its program for a `ragged_dot` begins with a loop that lists
the pairs of a tile and a group with rows in it. Its tiles have the rows of the matrix unit's: 128, and 256 on v6e.

A chain is several such matmuls with elementwise work between them, on the same rows and groups (`ragged_chain`). Its hidden
arrays have $R$ rows: the results of the first matmuls, and what is made of them for the last. It may gather its rows from those
of tokens first, and add its results to those of tokens. If its groups are split, its rows lie in a buffer of whole registers of
8 rows, $R = \\min(m, \\lceil \\lambda m / s_g \\rceil_8)$.

Such a chain may split its tokens over $s_t$ chips, and the groups over $s_g$ of these: all, or those along some of the axes.
A chip sends each of its rows to the chip of its group, and gets the result back: two all-to-alls over $s_g$ chips. If the
groups are whole, nothing is sent. A chip multiplies

$$R = \\min(\\lceil m \\min(s_g, \\lambda) / s_t \\rceil_8, X), \\qquad
X = s_g \\min(\\lceil m / s_t \\rceil, \\lceil b + 3 \\sqrt b \\rceil_8), \\qquad
b = m \\min(s_g, \\lambda) / (s_t s_g)$$

rows, and sends buffers of $X$ rows, because the buffer for each chip has as many rows as that for any other: $b$ and three
standard deviations of a Poisson count, in whole registers of 8. All chips know the router's choice, and each counts the rows
between any two chips: a product of one-hot arrays `[m, s_t]` and `[m, s_g]`, $2 m s_t s_g$ FLOPs. If a buffer of any chip is
too small, all chips get all rows instead, $R / 2$ at a time (`OVERFLOW`), and each computes those of its own groups. So results
are those of the unsplit chain for any router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from costmodels.program.program import Operation

CHAIN = "ragged_chain"
"""The primitive of a chain of grouped matmuls over the same rows and groups."""
OVERFLOW = "rows_beyond_a_buffer"
"""The name of the path where a buffer for rows is too small: all rows are gathered, or the buffer is filled again.

Audits leave it out by this name.
"""
DEVIATIONS = 3
"""The standard deviations of a Poisson count that the buffer for one chip has beyond the mean of the chip with the most rows.

With 64 chips, 64 experts' chips and 16 rows from each to each, buffers of 1.5 times these, 24 rows, overflow for nearly all
random routers, and those of 40 rows for 0.04 % of them (`costmodels.overflow`).
"""
ROW_TILE = 8
"""Rows of a register of a TPU's vector unit: a buffer has a multiple of them."""


@dataclass(frozen=True)
class Matrix:
    """One matrix per group: its operand, or None if it is the result, and the factors of its two dimensions."""

    operand: int | None
    contracted: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Grouped:
    """The factors of a grouped matmul or a chain.

    - `rows`, `groups`, `batch`: the factors of the rows, of the groups, and of batches with groups of their own.
    - `hidden`: the factor of the columns of a chain's hidden arrays; None without a chain.
    - `gathers`, `adds`: whether a chain gathers its rows from tokens, and adds them to those of tokens.
    - `tables`: the number of arrays, with a row per group, from which the elementwise work before and after the last matmul
      gathers rows, such as biases.
    - `tokens`: the factor of the tokens if it may be split, and rows sent to the chips of their groups; None if not.
    """

    rows: tuple[int, ...]
    groups: int
    batch: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    hidden: int | None = None
    gathers: bool = False
    adds: bool = False
    tables: tuple[int, int] = (0, 0)
    tokens: int | None = None

    @property
    def hidden_arrays(self) -> int:
        """The number of arrays `[rows, hidden]` between the matmuls of a chain."""
        return len(self.matrices) if self.hidden is not None else 0


def grouped(op: Operation) -> Grouped | None:
    """The factors of a grouped matmul; None for any other operation."""
    if op.op_class != "matmul" or op.primitive not in ("ragged_dot_general", CHAIN):
        return None
    return _chain(op) if op.primitive == CHAIN else _single(op)


def groups_factor(counts: Sequence[Sequence[int]]) -> int:
    """The factor of the groups, which the rules create just before that of the counts, from the counts' dimensions."""
    return counts[-1][0] - 1


def _single(op: Operation) -> Grouped:
    groups = groups_factor(op.inputs[-1].dims)
    left, right, made = ({i for dim in use.dims for i in dim} for use in (*op.inputs[:2], op.outputs[0]))
    batch = (left & right & made) - {groups}
    if groups in right:
        rows, contracted, columns, operand = left & made - batch, left & right - batch, right & made, 1
    else:  # the gradient of the matrices: the rows are contracted
        rows, contracted, columns, operand = left & right - made, left & made, right & made, None
    contracted, columns = contracted - {groups}, columns - batch - {groups}
    matrix = Matrix(operand, tuple(sorted(contracted - batch)), tuple(sorted(columns)))
    return Grouped(tuple(sorted(rows)), groups, tuple(sorted(batch)), (matrix,))


def _chain(op: Operation) -> Grouped:
    groups, rows = groups_factor(op.inputs[-1].dims), (0,)  # the rule creates the factor of the rows first
    found = []
    for k, use in enumerate(op.inputs):
        if len(use.dims) == 3 and use.dims[0] == (groups,):
            found.append(Matrix(k, use.dims[1], use.dims[2]))
    found.sort(key=lambda each: each.columns == op.outputs[0].dims[1])
    first, last = found[0], found[-1]
    gathers = any(use.dims[1:] == (first.contracted,) and use.dims[0] != rows for use in op.inputs)
    adds = op.outputs[0].dims[0] != rows
    sides = [use.dims[1] for use in op.inputs if use.dims[:1] == ((groups + 1,),) and len(use.dims) == 2]
    tables = sides.count(last.contracted), sides.count(last.columns)
    return Grouped(rows, groups, (), tuple(found), last.contracted[0], gathers, adds, tables, tokens_factor(op))


def tokens_factor(op: Operation) -> int | None:
    """The factor of the tokens whose rows may be sent to the chips of their groups; None without one."""
    return next((i for i, factor in enumerate(op.factors) if factor.kind == "dispatched"), None)


def own_rows(rows: int, chips: int, load: float) -> int:
    """The rows of the buffer of one of `chips` chips with groups, where all of them have all rows: $R$."""
    return min(rows, ceil(load * rows / chips / ROW_TILE) * ROW_TILE)


def rows_for_each(rows: int, sources: int, chips: int, load: float) -> int:
    """The rows of the buffer that one of `sources` chips sends to one of `chips` chips with groups: $X / s_g$."""
    most = rows * min(chips, load) / (sources * chips)
    most += DEVIATIONS * sqrt(most)
    return min(ceil(rows / sources), ceil(most / ROW_TILE) * ROW_TILE)


def rows_in_all(rows: int, sources: int, chips: int, load: float) -> int:
    """The rows of the buffer in which a chip multiplies rows that it is sent: $R$."""
    balanced = ceil(rows * min(chips, load) / sources / ROW_TILE) * ROW_TILE
    return min(balanced, chips * rows_for_each(rows, sources, chips, load))


def slab_rows(room: int) -> int:
    """The rows of a slab on the path for an overflow, of buffers of `room` rows: half of them, in whole registers."""
    return ceil(room / (2 * ROW_TILE)) * ROW_TILE
