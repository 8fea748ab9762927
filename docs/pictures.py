"""The pictures of the concepts page, drawn as SVG.

    python docs/pictures.py          # docs/images/concept-*.svg

The pictures are text files with readable diffs. `tests/whole/test_docs.py` compares them with this script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
CHIPS = ("#2a78b5", "#d5752a", "#3a8f4d", "#a34b9b")
"""A colour per chip of a mesh of axes x (rows) and y (columns): 00, 01, 10, 11."""
NAMES = ("00", "01", "10", "11")
ALL = (0, 1, 2, 3)
CELL = 26
"""The side of an array's cell, in pixels."""

Owner = Callable[[int, int], Sequence[int]]
"""The chips that hold the cell in a row and a column."""


class Picture:
    """Shapes and words on a canvas."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 13, anchor: str = "start", bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def cell(self, x: float, y: float, chips: Sequence[int], partial: bool = False) -> None:
        """A cell of an array: a stripe for each chip that holds it, grey for none; pale where each holds a partial sum."""
        wide = CELL / max(len(chips), 1)
        if not chips:
            self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="#aab4be"/>')
        for i, chip in enumerate(chips):
            self.parts.append(
                f'<rect x="{x + i * wide:g}" y="{y:g}" width="{wide:g}" height="{CELL}" fill="{CHIPS[chip]}"'
                f' fill-opacity="{0.35 if partial else 0.9}"/>'
            )
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="none" stroke="#fff" stroke-width="1.5"/>'
        )

    def array(
        self, x: float, y: float, rows: int, columns: int, name: str, owner: Owner, partial: bool = False
    ) -> None:
        """An array with its name above; `partial` draws partial sums, which are still to be added."""
        self.text(x, y - 8, name)
        for i in range(rows):
            for j in range(columns):
                self.cell(x + j * CELL, y + i * CELL, owner(i, j), partial)

    def arrow(self, x: float, y: float, length: float, words: str) -> None:
        end = x + length
        self.parts.append(
            f'<path d="M{x:g} {y:g}H{end:g}m-7 -5l7 5l-7 5" fill="none" stroke="#6b7785" stroke-width="1.8"/>'
        )
        for i, line in enumerate(words.split("\n")):
            self.text(x + length / 2, y - 10 - 16 * (len(words.split("\n")) - 1 - i), line, 12, "middle")

    def legend(self, x: float, y: float) -> None:
        """The colours of the chips."""
        for chip, name in enumerate(NAMES):
            self.parts.append(
                f'<rect x="{x + 92 * chip}" y="{y - 11}" width="13" height="13" rx="3" fill="{CHIPS[chip]}"/>'
            )
            self.text(x + 92 * chip + 19, y, f"x={name[0]} y={name[1]}", 12)

    def svg(self) -> str:
        """The picture as a file; on a card of its own, so that it reads on light and dark pages."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
            f' role="img" font-family="system-ui, sans-serif" fill="#1c2126">\n<title>{escape(self.title)}</title>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#f5f7f9"/>\n{body}\n</svg>\n'
        )


# --- Who holds what of an array of four by four, on chips x=i y=j, numbered 2 i + j


def nobody(i: int, j: int) -> Sequence[int]:
    return ()


def whole(i: int, j: int) -> Sequence[int]:
    return ALL


def rows_over_x(i: int, j: int) -> Sequence[int]:
    return (0, 1) if i < 2 else (2, 3)


def columns_over_y(i: int, j: int) -> Sequence[int]:
    return (0, 2) if j < 2 else (1, 3)


def columns_over_xy(i: int, j: int) -> Sequence[int]:
    return (j,)


def rows_over_xy(i: int, j: int) -> Sequence[int]:
    return (i,)


def blocks(i: int, j: int) -> Sequence[int]:
    return (2 * (i // 2) + j // 2,)


# --- The pictures


def factors() -> Picture:
    picture = Picture(620, 185, "An operation is an einsum over factors")
    picture.array(30, 60, 4, 4, "x [B, E]", nobody)
    picture.text(150, 118, "·", 22)
    picture.array(175, 60, 4, 4, "w [E, F]", nobody)
    picture.arrow(300, 112, 60, "sum over E")
    picture.array(385, 60, 4, 4, "y [B, F]", nobody)
    picture.text(508, 84, "B: rows of x and y", 12)
    picture.text(508, 108, "F: columns of w and y", 12)
    picture.text(508, 132, "E: summed", 12)
    picture.width = 660
    return picture


def strategies() -> Picture:
    table: tuple[tuple[str, str, Owner, Owner, Owner, bool, str], ...] = (
        ("data parallel", "B over xy", rows_over_xy, whole, rows_over_xy, False, "every chip needs all of w"),
        ("WS-1D", "F over xy", whole, columns_over_xy, columns_over_xy, False, "y is left in pieces"),
        ("WS-2D", "E over x, F over y", rows_over_x, blocks, columns_over_y, True, "y: partial sums over x"),
        ("WG-X", "B over x, F over y", rows_over_x, columns_over_y, blocks, False, "w is gathered over x first"),
    )
    picture = Picture(660, 40 + 150 * len(table), "Four strategies of one matrix product")
    for n, (name, splits, x, w, y, partial, words) in enumerate(table):
        top = 50 + 150 * n
        picture.text(20, top + 32, name, 15, bold=True)
        picture.text(20, top + 54, splits)
        picture.text(20, top + 74, words, 12)
        # E is split over x in WS-2D: columns of the activations
        x_owner = (lambda i, j: (0, 1) if j < 2 else (2, 3)) if partial else x
        picture.array(240, top, 4, 4, "x [B, E]", x_owner)
        picture.array(375, top, 4, 4, "w [E, F]", w)
        picture.arrow(492, top + 52, 36, "")
        picture.array(540, top, 4, 4, "y [B, F]", y, partial)
    picture.legend(20, picture.height - 12)
    return picture


def layouts() -> Picture:
    picture = Picture(660, 200, "Layouts of one array on a mesh of two by two")
    each: tuple[tuple[str, Owner, bool], ...] = (
        ("P()", whole, False),
        ("P('x', None)", rows_over_x, False),
        ("P('x', 'y')", blocks, False),
        ("P(None, ('x', 'y'))", columns_over_xy, False),
        ("partial over xy", whole, True),
    )
    for n, (name, owner, partial) in enumerate(each):
        picture.array(20 + 128 * n, 55, 4, 4, name, owner, partial)
    picture.legend(20, 188)
    return picture


def reshards() -> Picture:
    picture = Picture(660, 470, "Changes of layout and the collective that each one is")
    each: tuple[tuple[str, str, Owner, bool, str, Owner, bool], ...] = (
        ("P('x', 'y')", "all-gather\nover y", blocks, False, "P('x', None)", rows_over_x, False),
        ("partial over x", "reduce-scatter\nover x", whole, True, "P('x', None)", rows_over_x, False),
        (
            "P(None, ('x', 'y'))",
            "all-to-all\nover xy",
            columns_over_xy,
            False,
            "P(('x', 'y'), None)",
            rows_over_xy,
            False,
        ),
        ("partial over xy", "all-reduce\nover xy", whole, True, "P()", whole, False),
        ("P()", "slice", whole, False, "P('x', 'y')", blocks, False),
    )
    for n, (before, words, owner, partial, after, wanted, still) in enumerate(each):
        left, top = 20 + 330 * (n % 2), 45 + 145 * (n // 2)
        picture.array(left, top, 4, 4, before, owner, partial)
        picture.arrow(left + 115, top + 58, 70, words)
        picture.array(left + 195, top, 4, 4, after, wanted, still)
    picture.text(350, 380, "Pale cells are partial sums: each chip", 12)
    picture.text(350, 398, "of the cell holds a part of the value.", 12)
    picture.legend(20, 458)
    return picture


def gathering() -> Picture:
    picture = Picture(660, 370, "Weight-stationary and weight-gathered")
    picture.text(20, 28, "Weight-stationary (WS-2D): the weights stay, activations move", 14, bold=True)
    picture.array(20, 70, 1, 4, "x: few tokens", lambda i, j: (0, 1) if j < 2 else (2, 3))
    picture.array(175, 70, 4, 4, "w, as it is stored", blocks)
    picture.arrow(300, 120, 60, "multiply")
    picture.array(380, 70, 1, 4, "y: partial sums", columns_over_y, True)
    picture.arrow(492, 83, 44, "")
    picture.text(514, 118, "all-reduce over x", 12, "middle")
    picture.array(546, 70, 1, 4, "y", columns_over_y)
    picture.text(20, 208, "Weight-gathered (WG-X): weights move, the activations stay", 14, bold=True)
    picture.array(20, 245, 4, 4, "w, as it is stored", blocks)
    picture.arrow(140, 295, 70, "all-gather\nover x")
    picture.array(225, 245, 4, 4, "w, while it is used", columns_over_y)
    picture.arrow(350, 295, 70, "multiply")
    picture.array(440, 245, 4, 4, "y: many tokens", blocks)
    return picture


PICTURES = {
    "factor": factors,
    "strategy": strategies,
    "layout": layouts,
    "reshard": reshards,
    "weight-gathering": gathering,
}


def main() -> None:
    for name, drawn in PICTURES.items():
        (IMAGES / f"concept-{name}.svg").write_text(drawn().svg())


if __name__ == "__main__":
    main()
