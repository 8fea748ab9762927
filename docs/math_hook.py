"""Formulas of the documentation site as MathML, converted when the site is built.

MkDocs calls `on_page_content` for every page. `pymdownx.arithmatex` has marked the formulas by then. Browsers render MathML
themselves, so a page needs no script and no network.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """The page with every formula as MathML."""
    html = _INLINE.sub(lambda match: convert(unescape(match[1])), html)
    return _DISPLAY.sub(lambda match: convert(unescape(match[1]), display="block"), html)
