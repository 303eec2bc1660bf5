"""The pieces of a report's page: escaped text, numbers, tables, figures. Imports report_style, plots_style.

Every function returns HTML. Text from outside (samples, paths, names) enters through ``text``, numbers through
``number``, which keeps the value as it was written beside the rounded one that is shown.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rlhf_jax.evaluation import plots_style
from rlhf_jax.evaluation.plots_style import Look
from rlhf_jax.evaluation.report_style import style_sheet


def text(value: Any) -> str:
    """Any value as text that a browser shows and never obeys."""
    return html.escape(str(value), quote=True)


def number(value: Any, form: str = ".2f") -> str:
    """A number to ``form``, its full value in the element's ``value``; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else text(value)
    if not math.isfinite(value):
        return text(value)
    return f'<data value="{text(repr(value))}">{text(format(value, form))}</data>'


def page(title: str, body: str) -> str:
    """A whole document that needs nothing beside itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style_sheet()}\n</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def section(anchor: str, title: str, *parts: str) -> str:
    """A titled section; nothing at all where every part is empty."""
    found = [part for part in parts if part]
    return (
        f'<section id="{anchor}">\n<h2>{text(title)}</h2>\n' + "\n".join(found) + "\n</section>"
        if found
        else ""
    )


def paragraph(content: str, kind: str = "") -> str:
    """``content`` is HTML."""
    return f'<p class="{kind}">{content}</p>' if kind else f"<p>{content}</p>"


def hue(look: Look) -> str:
    """The style attribute that gives an element its policy's colour."""
    return f'style="--hue: var(--{look.css})"'


def named(label: str, look: Look) -> str:
    """A policy's name led by its marker, in its colour."""
    return f'<span class="glyph" {hue(look)}>{look.glyph}</span>{text(label)}'


def legend(entries: Iterable[tuple[str, Look]]) -> str:
    """One line of markers with their labels."""
    return (
        '<p class="legend">'
        + "".join(f"<span>{named(label, look)}</span>" for label, look in entries)
        + "</p>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """``head`` and cells are HTML; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
        for first, *rest in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def figure(drawing: Figure, *, name: str, title: str, caption: str) -> str:
    """A drawing under its title, over a sentence that says what one sees. ``caption`` is HTML, ``title`` is text."""
    drawn = plots_style.to_svg(drawing, name=name, description=title)
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>\n<h3>{text(title)}</h3>\n{drawn}\n{below}\n</figure>"


def figures(drawn: Iterable[str], kind: str = "") -> str:
    """Drawings side by side; nothing where there is none."""
    found = "\n".join(drawn)
    return f'<div class="figures {kind}">\n{found}\n</div>' if found else ""


def folded(title: str, aside: str, content: str) -> str:
    """Something for those who look it up; ``title`` and ``aside`` are text, ``content`` is HTML."""
    return f"<details><summary>{text(title)}<span>{text(aside)}</span></summary>\n{content}\n</details>"


def as_json(value: Mapping[str, Any]) -> str:
    """A mapping as escaped, indented JSON."""
    return f"<pre>{text(json.dumps(value, indent=1))}</pre>"
