"""HTML to the text that a reader of the page sees (resiliparse): entities decoded, paragraphs and list items in lines.

Scripts, styles, comments, forms and hidden elements go, and so do navigation, asides and footers where they are
marked as such. The library's guess at the main content is not used: it takes whole lists out of articles.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from resiliparse.extract.html2text import extract_plain_text

from pipelines.corpus.stages import Verdict

_NOT_TEXT = ["nav", "aside", "footer", "svg", "[hidden]", "[aria-hidden=true]"]  # CSS selectors

# The parser's time grows with the square of these. No page that is read has as many; browsers stop at a depth of 512.
MAX_ATTRIBUTES = 1_000  # of a tag
MAX_UNCLOSED = 2_000  # elements at one place, as tags are counted, which is more than a parser leaves open
# Elements that are empty or that the next of their kind closes: pages leave out their end tags.
_CLOSED_ANYWAY = frozenset(
    "a area base br col dd dt embed hr img input li link meta option p param source tbody td th tr track wbr".split()
)
# Tags as HTML's tokenizer reads them (WHATWG HTML, 13.2.5), and what holds no tags: comments and raw text. Nothing is
# read twice, so the time is linear.
_SPACE = r"\t\n\f\r "
_ATTRIBUTE = (
    rf"[{_SPACE}/]*+[^{_SPACE}/>][^{_SPACE}/>=]*+"
    rf"""(?:[{_SPACE}]*+=[{_SPACE}]*+(?:"[^"]*+"?|'[^']*+'?|[^{_SPACE}>]*+))?+"""
)
_ATTRIBUTES = re.compile(_ATTRIBUTE)
_TAG = re.compile(
    rf"<(?:!--(?:-?>|.*?(?:--!?>|\Z))"
    rf"|(script|style|textarea|title|xmp|iframe|noembed|noframes)(?=[{_SPACE}/>])((?:{_ATTRIBUTE})*+)"
    rf"[{_SPACE}/]*+>.*?(?=</\1[{_SPACE}/>]|\Z)"
    rf"|(/?)([a-z][^{_SPACE}/>]*+)((?:{_ATTRIBUTE})*+))",
    re.IGNORECASE | re.DOTALL,
)


def html_to_text(texts: Sequence[str]) -> list[Verdict]:
    """The text of each page, however broken its HTML; `no_text` where there is none, `bad_html` if made to stall."""
    return [_text_of(page) for page in texts]


def _text_of(page: str) -> Verdict:
    if problem := _problem(page):
        return "", f"bad_html: {problem}"
    text = extract_plain_text(page, alt_texts=False, skip_elements=_NOT_TEXT)
    return text, None if text.strip() else "no_text"


def _problem(page: str) -> str | None:
    """What a parser would take more than linear time for."""
    unclosed: Counter[str] = Counter()
    num_unclosed = 0
    for _, raw_attributes, end, name, own_attributes in _TAG.findall(page):
        attributes = raw_attributes or own_attributes
        if len(attributes) > 2 * MAX_ATTRIBUTES and len(_ATTRIBUTES.findall(attributes)) > MAX_ATTRIBUTES:
            return "too many attributes"
        if not name or (name := name.lower()) in _CLOSED_ANYWAY:
            continue
        if not end:
            unclosed[name] += 1
            num_unclosed += 1
        elif unclosed[name]:
            unclosed[name] -= 1
            num_unclosed -= 1
        if num_unclosed > MAX_UNCLOSED:
            return "too deep"
    return None
