"""How every figure looks: colours, axes, and the way to inline SVG. Imports Matplotlib only.

Figures are drawn in the colours of the light theme. ``to_svg`` then names each colour by a CSS variable, so that a page
can show the same drawing on a dark ground.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Iterable, Mapping, Set

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1c2430", "#667080", "#e3e6eb", "#fefefe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How one policy or stage is drawn everywhere.

    label: its name for people. css: its CSS variable. marker, glyph: for Matplotlib and for text.
    """

    label: str
    color: str
    dark: str
    css: str
    marker: str
    glyph: str


# Hues of Okabe and Ito (2008), which stay apart under every common colour blindness; markers tell them apart in print.
KNOWN = {
    "sft": Look(label="SFT", color="#6b7482", dark="#a9b2c0", css="sft", marker="o", glyph="●"),
    "reward_model": Look(
        label="Reward model", color="#b27a00", dark="#e3b04b", css="reward-model", marker="p", glyph="⬟"
    ),
    "ppo": Look(label="PPO", color="#0072b2", dark="#56aee8", css="ppo", marker="^", glyph="▲"),
    "ppo_no_leash": Look(
        label="PPO, no leash", color="#d55e00", dark="#ff8c4d", css="ppo-no-leash", marker="v", glyph="▼"
    ),
    "dpo": Look(label="DPO", color="#009e73", dark="#37c99e", css="dpo", marker="s", glyph="■"),
    "best_of_n": Look(
        label="Best of n", color="#b4508f", dark="#e08fc2", css="best-of-n", marker="D", glyph="◆"
    ),
}
_OTHERS = (
    ("#3f8fc4", "#7cc4f2", "<", "◀"),
    ("#8a6a3d", "#cda873", ">", "▶"),
    ("#5b5fc7", "#a3a6f5", "P", "✚"),
    ("#a3333d", "#ec8a92", "X", "✖"),
)
_THEME = (
    ("ink", INK, "#e8eaee"),
    ("muted", MUTED, "#9ba4b2"),
    ("grid", GRID, "#2d333d"),
    ("paper", PAPER, "#15181d"),
)
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf_jax",
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
}


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name; one that is not known gets the next free colour, in the order given."""
    found: dict[str, Look] = {}
    for name in names:
        if name in KNOWN:
            found.setdefault(name, KNOWN[name])
        elif name not in found:
            number = sum(other not in KNOWN for other in found)
            color, dark, marker, glyph = _OTHERS[number % len(_OTHERS)]
            css = f"other-{number % len(_OTHERS)}"
            found[name] = Look(label=name, color=color, dark=dark, css=css, marker=marker, glyph=glyph)
    return found


def css_colors(*, dark: bool) -> str:
    """Declarations of every CSS variable that a drawing uses."""
    pairs = [(name, night if dark else day) for name, day, night in _THEME]
    pairs += [(look.css, look.dark if dark else look.color) for look in KNOWN.values()]
    pairs += [(f"other-{i}", night if dark else day) for i, (day, night, _, _) in enumerate(_OTHERS)]
    return " ".join(f"--{name}: {color};" for name, color in pairs)


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of ``width`` x ``height`` CSS pixels, with one pair of calm axes."""
    with settings():
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
    calm(axes)
    return figure, axes


def calm(axes: Axes, font: float = 13.0) -> None:
    """No box, no ticks, faint horizontal lines."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=1.0)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=font, length=0, pad=5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(MUTED)
        label.set_size(font)
    axes.set_facecolor("none")


def settings():
    """The context in which figures are made and saved: plain text, text kept as text, the same output every time."""
    return matplotlib.rc_context(_SETTINGS)


def to_svg(figure: Figure, *, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element: colours as CSS variables, ids led by ``name``, nothing from outside.

    Args:
      figure: a figure of ``new_figure``.
      name: unique on the page; letters, digits and dashes.
      description: what a person who cannot see it is told.
    """
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    with settings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]*)"', text).group(1)
    opening = f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(description)}">'
    text = text[text.index(">") + 1 :]
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)  # it would style the whole page
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    # Only tags are touched, never the text between them.
    return opening + re.sub(r"<[^>]*>", lambda match: _adapt_tag(match[0], name, used), text).strip()


def _adapt_tag(tag: str, name: str, used: Set[str]) -> str:
    """A tag of Matplotlib's SVG as a page needs it: ids of its own, named colours, the page's typeface."""
    tag = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", tag)
    tag = re.sub(r"font-family: [^;\"]*;?\s*", "", tag)
    for color, variable in _variables().items():
        tag = re.sub(re.escape(color), f"var(--{variable})", tag, flags=re.IGNORECASE)
    # Hundredths of a pixel are enough.
    return re.sub(r"-?\d+\.\d{3,}(?![\d.])", lambda match: f"{float(match[0]):.2f}", tag)


def _variables() -> Mapping[str, str]:
    named = {day: name for name, day, _ in _THEME} | {look.color: look.css for look in KNOWN.values()}
    return named | {color: f"other-{i}" for i, (color, _, _, _) in enumerate(_OTHERS)}
