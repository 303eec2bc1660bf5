"""The look of a report's page: one style sheet, for light, dark and narrow screens, and paper. Imports plots_style."""

from __future__ import annotations

from rlhf_jax.evaluation import plots_style

_SHEET = """
:root { color-scheme: light dark; %(light)s --page: #fefefe; --card: #f6f7f9; --line: #e3e6eb; --accent: #0072b2;
  --prose: Charter, "Bitstream Charter", "Iowan Old Style", "Source Serif 4", Georgia, Cambria, serif;
  --sans: Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media screen and (prefers-color-scheme: dark) {
  :root { %(dark)s --page: #15181d; --card: #1d2128; --line: #2d333d; --accent: #56aee8; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%%; text-size-adjust: 100%%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 400 18px/1.6 var(--prose); }
main { overflow-x: clip; max-width: 1080px; margin: 0 auto; padding: 72px 32px 96px; }
header { border-bottom: 1px solid var(--line); padding-bottom: 36px; }
.kicker { font: 600 13px/1.4 var(--sans); letter-spacing: .08em; text-transform: uppercase;
  color: var(--muted); margin: 0; }
h1 { font: 600 44px/1.12 var(--prose); letter-spacing: -.015em; margin: 14px 0 18px; text-wrap: balance;
  overflow-wrap: anywhere; }
h2 { font: 600 28px/1.25 var(--prose); letter-spacing: -.008em; margin: 84px 0 10px; text-wrap: balance; }
h3 { font: 600 15px/1.4 var(--sans); margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 14px; max-width: 70ch; text-wrap: pretty; }
.facts { font: 400 15px/1.6 var(--sans); color: var(--muted); max-width: none; }
.note { color: var(--muted); font: 400 15px/1.55 var(--sans); }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 3px; }
nav { font: 400 15px/1.9 var(--sans); margin-top: 22px; display: flex; flex-wrap: wrap; gap: 0 20px; }
.findings { list-style: none; padding: 0; margin: 36px 0 0; display: grid; gap: 18px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%%, 210px), 1fr)); }
.findings li { border-left: 3px solid var(--hue, var(--accent)); padding: 2px 0 2px 18px; }
.findings b { display: block; font: 650 31px/1.15 var(--sans); letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.findings span { font: 400 15px/1.5 var(--sans); color: var(--muted); display: block; }
.steps { list-style: none; margin: 26px 0 0; padding: 0; display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%%, 184px), 1fr)); }
.steps li { background: var(--card); border-top: 3px solid var(--hue); border-radius: 3px; padding: 14px 16px 15px;
  font: 400 14px/1.5 var(--sans); }
.steps p { margin: 0 0 8px; } .steps small { color: var(--muted); font-size: 13px; display: block; }
.wide { overflow-x: auto; margin: 24px 0 20px; }
table { border-collapse: collapse; font: 400 16px/1.4 var(--sans); font-variant-numeric: tabular-nums; width: 100%%; }
th { font-weight: 600; font-size: 14px; color: var(--muted); text-align: right; vertical-align: bottom;
  padding: 6px 12px; border-bottom: 1.5px solid var(--ink); white-space: nowrap; }
th small { display: block; font-weight: 400; font-size: 12.5px; }
td, tbody th { vertical-align: baseline; }
td { padding: 10px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
td small { color: var(--muted); font-size: 13px; }
td.words { white-space: normal; text-align: left; color: var(--muted); font-size: 14px; min-width: 15em; }
tbody th { min-width: 7.6em; text-align: left; white-space: normal; padding-block: 10px;
  border-bottom: 1px solid var(--line); color: var(--ink); font-size: 16px; }
table.small { font-size: 14px; } table.small td, table.small tbody th { padding-block: 6px; font-size: 14px; }
.glyph { color: var(--hue); margin-right: .5em; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 24px; font: 400 15px/1.5 var(--sans); margin: 22px 0 4px;
  max-width: none; }
.figures { display: grid; gap: 28px 32px; margin: 14px 0 26px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%%, 400px), 1fr)); }
.figures.many { grid-template-columns: repeat(auto-fill, minmax(min(100%%, 290px), 1fr)); }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figure svg { display: block; width: 100%%; max-width: 620px; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; } figure svg text { font-family: var(--sans); }
figcaption { font: 400 14.5px/1.5 var(--sans); color: var(--muted); margin-top: 8px; max-width: 62ch; }
dl { font: 400 15px/1.55 var(--sans); margin: 18px 0 0; display: grid; gap: 5px 16px; max-width: 84ch;
  grid-template-columns: max-content 1fr; }
dt { font-weight: 600; } dd { margin: 0; color: var(--muted); }
.prompt { margin: 40px 0 0; break-inside: avoid; }
blockquote { margin: 0 0 14px; padding-left: 18px; border-left: 3px solid var(--line); font-style: italic;
  max-width: 76ch; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%%, 190px), 1fr)); }
.card { background: var(--card); border-top: 3px solid var(--hue); border-radius: 3px; padding: 13px 16px 15px;
  break-inside: avoid; min-width: 0; }
.card small { display: block; font: 400 13px/1.5 var(--sans); color: var(--muted);
  font-variant-numeric: tabular-nums; }
.card small b { color: var(--ink); font-weight: 600; } .card h3 { margin: 0; }
.card .text { font-size: 16px; line-height: 1.5; margin: 9px 0 0; max-height: 30em; overflow-y: auto; }
.beside { display: grid; gap: 10px 32px; margin: 14px 0 40px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%%, 400px), 1fr)); }
details { border-top: 1px solid var(--line); font: 400 15px/1.55 var(--sans); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: 10px 2px; font-weight: 600; }
summary span { font-weight: 400; color: var(--muted); margin-left: .6em; }
details ul { margin: 0 0 16px; padding-left: 1.2em; overflow-wrap: anywhere; color: var(--muted); }
pre { font: 400 13px/1.5 var(--mono); margin: 0 0 18px; padding: 14px 16px; background: var(--card);
  border-radius: 3px;
  overflow-x: auto; }
footer { margin-top: 84px; padding-top: 18px; border-top: 1px solid var(--line); color: var(--muted);
  font: 400 14px/1.6 var(--sans); overflow-wrap: anywhere; }
@media (max-width: 640px) { body { font-size: 17px; } main { padding: 40px 18px 64px; } h1 { font-size: 33px; }
  h2 { font-size: 25px; margin-top: 60px; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 10px; }
  .findings b { font-size: 30px; } table { font-size: 15px; } td, th { padding-inline: 9px; } }
@media print { @page { margin: 14mm; } body { font-size: 10.5pt; }
  main { padding: 0; max-width: none; } nav { display: none; }
  h1 { font-size: 25pt; } h2 { font-size: 16pt; margin-top: 26pt; }
  h2, h3, h2 + p, .legend, blockquote { break-after: avoid; }
  tr, li, dl, .findings, .steps { break-inside: avoid; } .wide { overflow: visible; }
  table, dl, .legend, .note, .facts { font-size: 9.5pt; } figcaption, .findings span { font-size: 8.5pt; }
  .findings { grid-template-columns: repeat(4, 1fr); gap: 12px; } .findings b { font-size: 17pt; }
  .findings li { padding-left: 10px; }
  .figures, .beside { grid-template-columns: 1fr 1fr; } .figures.many { grid-template-columns: 1fr 1fr 1fr; }
  .steps, .cards { grid-template-columns: repeat(auto-fit, minmax(116px, 1fr)); gap: 8px; }
  .steps li, .card { padding: 8px 10px; font-size: 8.5pt; } .steps small, .card small { font-size: 7.5pt; }
  .card h3, .steps h3 { font-size: 9pt; } .card .text { font-size: 9pt; max-height: none; }
  .card, .steps li { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def style_sheet() -> str:
    """The CSS of a report, with the colours of its figures for light and for dark."""
    colors = {"light": plots_style.css_colors(dark=False), "dark": plots_style.css_colors(dark=True)}
    return (_SHEET % colors).strip()
