"""HTML for a report: text that cannot act, tables, bars. One style for any width and for dark mode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

MAX_TEXT = 600  # characters shown of a text, MAX_LABEL of a name or a path
MAX_LABEL = 120
# Characters that would change how the rest of the page is read: controls, marks of direction, what has no width.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf8;--card:#fff;--ink:#22242a;--soft:#6a6f7a;--line:#e4e2dd;--bad:#c2504a;
--c0:#3b6ea8;--c1:#c98a2b;--c2:#4f9a6b;--c3:#8a63b0;--c4:#c2607f;--c5:#4aa3ab;--c6:#8b7a52;--c7:#6d7fb8;--c8:#a3a848;--c9:#b0703f}
@media(prefers-color-scheme:dark){:root{--paper:#17181b;--card:#1f2125;--ink:#e3e2de;--soft:#9a9ea8;--line:#33363c;--bad:#e07f78;
--c0:#7eabdf;--c1:#e0b05e;--c2:#82c79b;--c3:#b897da;--c4:#e394ad;--c5:#7fcdd4;--c6:#bfae82;--c7:#a2b0e0;--c8:#cdd176;--c9:#dba274}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:2.5rem 1.25rem 5rem;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1{margin:0;font-size:1.9rem;font-weight:650;letter-spacing:-.015em}
h2{margin:3rem 0 .75rem;font-size:1.15rem;font-weight:650}
h3{margin:1.5rem 0 .4rem;font-size:.95rem;font-weight:600}
p,.soft{color:var(--soft);overflow-wrap:anywhere}p{margin:.3rem 0 .8rem;max-width:46rem}
code,pre{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.75rem 0 0}
.tiles div,figure,.sheet{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tiles div{padding:.8rem 1rem}
.tiles b{display:block;white-space:nowrap;font-size:1.45rem;font-weight:600;letter-spacing:-.01em}
.tiles span{color:var(--soft);font-size:.82rem}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:.75rem}
figure{margin:0;padding:.9rem .9rem .4rem}figure svg{display:block;width:100%;height:auto}
.sheet{overflow-x:auto;padding:.25rem .5rem}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{color:var(--soft);font-weight:500;font-size:.8rem;text-align:left;white-space:nowrap}
td,th{padding:.38rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
.n{text-align:right;white-space:nowrap}
td:first-child:not(.n){overflow-wrap:anywhere;min-width:9.5rem}
td:last-child:not(.n){min-width:9rem}
.bar{display:flex;min-width:clamp(4.5rem,14vw,11rem);height:.62rem;margin-top:.4rem;border-radius:3px;overflow:hidden;background:var(--line)}
.words{max-width:30rem;min-width:14rem}
details{margin:.5rem 0;border:1px solid var(--line);border-radius:10px;background:var(--card)}
summary{cursor:pointer;padding:.5rem .9rem}
details>*:not(summary){margin:0 .9rem .8rem}
details .sheet{border:0;padding:0}
pre{margin:.2rem 0 .8rem;padding:.6rem .8rem;border-radius:7px;background:var(--paper);white-space:pre-wrap;
overflow-wrap:anywhere;overflow:hidden;max-height:16rem;unicode-bidi:isolate}
.u{color:var(--bad);font-size:.85em}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.82rem;color:var(--soft);margin:.6rem 0}
.key i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.35rem}
.wide{grid-column:1/-1}.wide .plot{height:19rem}
pre.whole{max-height:none}
figcaption{font-size:.88rem;font-weight:600}
figcaption .soft{font-weight:400;margin-left:.6rem}
.plot{position:relative;height:11rem;margin:1.1rem .6rem 1.9rem 3rem;font-size:.76rem;line-height:1;color:var(--soft)}
.plot svg{position:absolute;inset:0;height:100%;fill:none;stroke-linejoin:round;stroke-linecap:round}
.plot svg *{vector-effect:non-scaling-stroke}
.plot span{position:absolute;white-space:nowrap}
.plot .y{right:100%;margin-right:.5rem;transform:translateY(50%)}
.plot .x{top:100%;margin-top:.5rem;transform:translateX(-50%)}
.plot .m{bottom:100%;margin-bottom:.2rem;transform:translateX(-50%)}
.written{background:var(--card);border:1px solid var(--line)}
details .written{background:var(--paper);border:0}.written b{color:var(--soft);font-weight:400}
"""


def document(title: str, body: str) -> str:
    """A whole page of its own: nothing in it is fetched from elsewhere."""
    meta = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    return (
        f"<!doctype html>\n<html lang=en><head>{meta}<title>{text(title, MAX_LABEL)}</title>"
        f"<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what is below it; nothing where nothing is."""
    return f"<h2>{title}</h2>\n{''.join(parts)}\n" if any(parts) else ""


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """Figures in a row, each over what it is of; both are HTML already."""
    return (
        f"<div class=tiles>{''.join(f'<div><b>{figure}</b><span>{what}</span></div>' for figure, what in shown)}</div>"
    )


def text(value: object, max_chars: int = MAX_TEXT) -> str:
    """Anything from outside as HTML that cannot act: cut, escaped, its invisible characters named."""
    given = str(value)
    cut = given[:max_chars]
    shown = _INVISIBLE.sub(lambda found: f"\0{ord(found[0]):04X}\1", cut.replace("\r\n", "\n"))
    named = escape(shown).replace("\0", "<span class=u>U+").replace("\1", "</span>")
    left_out = len(given) - len(cut)
    return f"{named}<span class=soft>… {counted(left_out, 'more character')}</span>" if left_out else named


def plain(value: object, max_chars: int = MAX_LABEL) -> str:
    """The same without tags of its own, for an attribute or a title."""
    return escape(_INVISIBLE.sub(lambda found: f"U+{ord(found[0]):04X}", str(value)[:max_chars]))


def size(num_bytes: float) -> str:
    """Bytes as people say them: 812 B, 12.3 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes:.0f} B"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as a table; a column is aligned as its first value is. Every text is escaped here."""
    rows = list(rows)
    if not rows:
        return ""
    numeric = [_is_number(next((row[n] for row in rows if row[n] not in ("", None)), "")) for n in range(len(head))]
    top = "".join(f"<th{' class=n' if n else ''}>{name}</th>" for name, n in zip(head, numeric, strict=True))
    lines = "".join(
        f"<tr>{''.join(_cell(value, n) for value, n in zip(row, numeric, strict=True))}</tr>\n" for row in rows
    )
    return f"<div class=sheet><table><tr>{top}</tr>\n{lines}</table></div>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, str) and re.fullmatch(r"[\d.,]+ (%|s|k?B|[MG]B)", value) is not None
    )


def _cell(value: Any, is_number: bool) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    if isinstance(value, float):
        value = f"{value:.2f}"
    elif isinstance(value, int):
        value = f"{value:,}"
    elif value is None:
        value = "–"
    return f"<td class=n>{text(value)}</td>" if is_number else f"<td><bdi>{text(value, MAX_LABEL)}</bdi></td>"


def bar(share: float, colour: str = "--c0") -> Html:
    """A bar that fills a share of its width."""
    return stack([(share, f"background:var({colour})")])


def stack(parts: Iterable[tuple[float, str]]) -> Html:
    """A bar of parts, each a share of its whole width and a style."""
    drawn = "".join(f'<i style="width:{100 * share:.2f}%;{style}"></i>' for share, style in parts if share > 0)
    return Html(f"<span class=bar>{drawn}</span>")


def fill(number: int | None) -> str:
    """The style of a part in the colour of this number; None: of all others."""
    return "background:var(--soft)" if number is None else f"background:var(--c{number})"


def details(summary: str, inside: str) -> str:
    """Something folded away under its summary; nothing where nothing is inside."""
    return f"<details><summary>{summary}</summary>{inside}</details>\n" if inside else ""


def count(value: float) -> str:
    """A large count as people say it: 812, 12.3k, 1.24M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}"


def counted(number: int, thing: str) -> str:
    """So many of a thing, as people say it: 1 cluster, 2 clusters."""
    return f"{number:,} {plural(number, thing)}"


def plural(number: int, thing: str) -> str:
    """The word for so many of a thing."""
    return thing if number == 1 else f"{thing}s"


def ratio(value: float | None) -> str:
    """Two decimals, a dash for none."""
    return "–" if value is None else f"{value:.2f}"
