"""Self-contained HTML pages for reports: no network, no scripts, readable in black and white, in light and dark."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

STYLE = """<style>
:root{color-scheme:light dark} body{font:16px/1.5 system-ui,sans-serif;margin:0}
main{max-width:72rem;margin:2rem auto;padding:0 1rem} h1{margin-bottom:0} h2{margin-top:2.5rem} .lead{color:GrayText}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
th,td{border-bottom:1px solid #8886;padding:.25rem .75rem;text-align:left;vertical-align:top;font-variant-numeric:tabular-nums}
svg{max-width:100%;height:auto;background:#fff;border-radius:6px}
</style>"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page; `parts` are HTML, made by the functions below."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>{STYLE}'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, lead: bool = False) -> str:
    return f"<p{' class=lead' if lead else ''}>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text and are escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def links(targets: Sequence[tuple[str, str]]) -> str:
    """A list of links; each is what it says and where it leads, both text."""
    items = (f'<li><a href="{html.escape(where)}">{html.escape(says)}</a></li>' for says, where in targets)
    return f"<ul>{''.join(items)}</ul>"


def svg(figure: Any) -> str:
    """A matplotlib figure as inline SVG; the figure is closed by the caller."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
