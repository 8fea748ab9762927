"""Tables: they fit their width, wrap below the full one, and paths keep what tells them apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoshard._util.tables import NARROW, WIDTH, columns, table, wrap_text
from tests.support.effort import examples

WORDS = st.text("abcdefgh", min_size=1, max_size=9)
SENTENCES = st.lists(WORDS, min_size=1, max_size=9).map(" ".join)
PATHS = st.lists(WORDS, min_size=1, max_size=6).map(lambda keys: "params" + "".join(f"['{key}']" for key in keys))


@examples(100)
@given(rows=st.lists(st.tuples(PATHS, SENTENCES, WORDS), min_size=1, max_size=6), width=st.integers(40, 118))
def test_a_table_fits_and_loses_no_word_of_a_wrapped_cell(rows, width: int) -> None:
    lines = table(("path", "what", "n"), rows, "/~>", width)
    assert all(len(line) <= width for line in lines)
    if width < WIDTH - 2:
        letters = sorted("".join(sentence for _, sentence, _ in rows).replace(" ", ""))
        where = lines[1].split("  ")
        left = len(where[0]) + 2
        shown = "".join(line[left : left + len(where[1])] for line in lines[2:])
        assert sorted(shown.replace(" ", "")) == letters


@examples(100)
@given(SENTENCES, st.integers(30, 60))
def test_wrapped_text_keeps_its_words(text: str, width: int) -> None:
    lines = wrap_text(f"  head         {text}", width, 15)
    assert " ".join(" ".join(lines).split()) == f"head {text}"
    assert all(len(line) <= width for line in lines)


def test_long_paths_keep_the_keys_that_tell_them_apart() -> None:
    paths = [
        f"params['block_3']['attention']['{name}']['kernel'].value" for name in ("query", "key", "value_proj", "gate")
    ]
    lines = table(("path", "bytes"), [(path, "1") for path in paths], "/>", 30)[2:]
    shown = [line.split()[0] for line in lines]
    assert len(set(shown)) == len(paths)
    assert all(f"['{name}']" in line for name, line in zip(("query", "key", "value_proj", "gate"), shown, strict=True))


def test_the_width_is_that_of_the_terminal(monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert columns() == WIDTH  # a pipe
    for given_, used in (("60", NARROW), ("100", 100), ("300", WIDTH)):
        monkeypatch.setenv("COLUMNS", given_)
        assert columns() == used
