"""HTML to the text that a reader of the page sees (resiliparse): entities decoded, paragraphs and list items in lines.

Scripts, styles, comments, forms and hidden elements go, and so do navigation, asides and footers where they are
marked as such. The library's guess at the main content is not used: it takes whole lists out of articles.
"""

from __future__ import annotations

from collections.abc import Sequence

from resiliparse.extract.html2text import extract_plain_text

from pipelines.corpus.stages import Verdict

_NOT_TEXT = ["nav", "aside", "footer", "svg", "[hidden]", "[aria-hidden=true]"]  # CSS selectors


def html_to_text(texts: Sequence[str]) -> list[Verdict]:
    """The text of each page, however broken its HTML; `no_text` where there is none."""
    pages = [extract_plain_text(text, alt_texts=False, skip_elements=_NOT_TEXT) for text in texts]
    return [(page, None if page.strip() else "no_text") for page in pages]
