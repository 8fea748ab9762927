"""The cost of matmuls of grouped rows on one chip, in $d_i$ and $s_i$ (derived in `costmodels.program.grouped`)."""

from __future__ import annotations

from costmodels.factor_symbols import flatten, number, points, shards_symbol, size_symbol, tile_symbol, tiles
from costmodels.machine.conventions import EXPERT_LOAD
from costmodels.machine.lazy_sympy import sympy
from costmodels.program.grouped import DEVIATIONS, ROW_TILE, Grouped, grouped
from costmodels.program.program import Operation, Output, Program


def grouped_flops(groups: Grouped, load_rows: float, load: float) -> sympy.Expr:
    """$2 B$ tiles $\\max(T, t/2) \\sum_w \\lceil K_w \\rceil_t \\lceil N_w \\rceil_t$ (`costmodels.program.grouped`)."""
    rows, own = points(groups.rows), grouped_rows(groups, load)
    height = sympy.Min(tile_symbol(), rows, evaluate=False)
    size = size_symbol(groups.groups)
    visited = sympy.ceiling(own / height) + _groups_read(groups, load) * (size - 1) / size
    least = number(load_rows) if load_rows else tile_symbol() / 2
    areas = sympy.Add(*(tiles(each.contracted) * tiles(each.columns) for each in groups.matrices))
    return 2 * points(groups.batch) * visited * sympy.Max(height, least, evaluate=False) * areas + _counted(
        groups, least
    )


def counting_flops(groups: Grouped) -> sympy.Expr:
    """$2 m s_t s_g$: FLOPs of the matmul that counts the rows between each pair of chips; 0 if no rows are sent."""
    if groups.tokens is None:
        return sympy.Integer(0)
    pairs = shards_symbol(groups.groups) * shards_symbol(groups.tokens)
    return 2 * _is_sent(groups) * points(groups.rows) * pairs


def _counted(groups: Grouped, least: sympy.Expr) -> sympy.Expr:
    """`counting_flops` in whole tiles: the chips with tokens stream by those with groups."""
    if groups.tokens is None:
        return sympy.Integer(0)
    streamed = sympy.Max(shards_symbol(groups.tokens), least, evaluate=False)
    columns = tile_symbol() * sympy.ceiling(shards_symbol(groups.groups) / tile_symbol())
    return 2 * _is_sent(groups) * tiles(groups.rows) * streamed * columns


def grouped_rows(groups: Grouped, load: float) -> sympy.Expr:
    """$R$: the rows that the chip with the most rows multiplies, in $d_i$ and $s_i$ (`costmodels.program.grouped`)."""
    rows, chips = points(groups.rows), shards_symbol(groups.groups)
    if groups.hidden is None:
        return sympy.Min(rows, number(load) * rows / chips, evaluate=False)
    balanced = number(load) * rows / chips
    if groups.tokens is None:
        return sympy.Min(rows, _registers(balanced), evaluate=False)
    parts = sympy.Max(chips, shards_symbol(groups.tokens), evaluate=False)
    balanced = rows * sympy.Min(chips, number(load), evaluate=False) / parts
    return sympy.Min(rows, _registers(balanced), _buffer_rows(groups, load), evaluate=False)


def sent_rows(groups: Grouped, load: float) -> sympy.Expr:
    """$X$: the rows of the buffers that a chip sends to the chips of the groups, in $d_i$ and $s_i$; 0 if tokens are whole."""
    if groups.tokens is None:
        return sympy.Integer(0)
    return _is_sent(groups) * _buffer_rows(groups, load)


def _buffer_rows(groups: Grouped, load: float) -> sympy.Expr:
    """$X$, whether or not the tokens are split."""
    assert groups.tokens is not None
    rows, chips, sources = points(groups.rows), shards_symbol(groups.groups), shards_symbol(groups.tokens)
    most = rows * sympy.Min(chips, number(load), evaluate=False) / (sources * chips)
    room = _registers(most + DEVIATIONS * sympy.sqrt(most))
    return chips * sympy.Min(sympy.ceiling(rows / sources), room, evaluate=False)


def _registers(rows: sympy.Expr) -> sympy.Expr:
    """Rows in whole registers."""
    return ROW_TILE * sympy.ceiling(rows / ROW_TILE)


def _is_sent(groups: Grouped) -> sympy.Expr:
    """1 if rows are sent to the chips of their groups, 0 if not."""
    if groups.tokens is None:
        return sympy.Integer(0)
    shared = sympy.Min(shards_symbol(groups.groups), shards_symbol(groups.tokens), evaluate=False)
    return sympy.Min(shared - 1, 1, evaluate=False)


def _groups_read(groups: Grouped, load: float) -> sympy.Expr:
    """$G'$: the groups of one chip that can have rows."""
    return sympy.Min(points((groups.groups,)), sympy.ceiling(grouped_rows(groups, load)), evaluate=False)


def hidden_bytes(program: Program, operation: Operation, load: float = EXPERT_LOAD) -> sympy.Expr:
    """The bytes of the hidden arrays of a chain of grouped matmuls on one chip; 0 for any other operation."""
    groups = grouped(operation)
    if groups is None or groups.hidden is None:
        return sympy.Integer(0)
    size = number(groups.hidden_arrays * program.values[operation.outputs[0].value].itemsize)
    return size * hidden_elements(groups, load)


def hidden_elements(groups: Grouped, load: float) -> sympy.Expr:
    """The elements of one hidden array of a chain on one chip; 0 without a chain."""
    return points((groups.hidden,)) * grouped_rows(groups, load) if groups.hidden is not None else sympy.Integer(0)


def moved_points(operation: Operation, place: int | Output, load: float) -> sympy.Expr:
    """The elements of an operand or result that pass through HBM: of grouped matmuls, those of rows and groups in use."""
    dims, groups = operation.use(place).dims, grouped(operation)
    if groups is None or isinstance(place, Output):
        return points(flatten(dims))
    if (groups.groups,) in dims:
        return _groups_read(groups, load) * points(f for f in flatten(dims) if f != groups.groups)
    if groups.hidden is not None and groups.rows in dims:
        return grouped_rows(groups, load) * points(f for f in flatten(dims) if f not in groups.rows)
    return points(flatten(dims))


def between_elements(operation: Operation, load: float = EXPERT_LOAD) -> sympy.Expr:
    """Elements that the vector unit loads and stores between the matmuls of a chain, from and to HBM; 0 for other operations.

    The elementwise work passes over all hidden arrays. A gather of rows reads and writes them; to add rows, they are read, and
    those that they are added to are read and written. Without these, a chip with some of the groups copies its rows of the
    operand into a buffer, and those of the result out of it: each is read and written twice, as a buffer begins between tiles.
    Rows that are sent are copied once more before and after. Rows gathered for the elementwise work are written and read.
    """
    groups = grouped(operation)
    if groups is None or groups.hidden is None:
        return sympy.Integer(0)
    split = sympy.Min(shards_symbol(groups.groups) - 1, 1, evaluate=False)
    sent = 2 * _is_sent(groups)
    before = number(2 * groups.gathers) + sent if groups.gathers else 4 * split
    after = number(3 * groups.adds) + sent if groups.adds else 4 * split
    copied = before * points(groups.matrices[0].contracted)
    copied += (after + 2 * groups.tables[1]) * points(groups.matrices[-1].columns)
    passes = groups.hidden_arrays + 2 * groups.tables[0]
    return passes * hidden_elements(groups, load) + grouped_rows(groups, load) * copied
