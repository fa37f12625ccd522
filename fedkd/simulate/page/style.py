"""The style of the page: light and dark, narrow and wide, and on paper."""

from __future__ import annotations

#: Of text and of lines; a number stands for the color of a method. Against the background, text has a contrast of at
#: least 4.5, and lines of 3.
_LIGHT = """
--back: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #566272; --line: #d5dbe3; --grid: #e3e8ee; --accent: #2059b5;
--wrong: #a3221a; --wrong-back: #fdeeec; --note-back: #eaf1fc;
--c0: #0067a8; --c1: #c04e00; --c2: #00795a; --c3: #a9447c; --c4: #8a6100; --c5: #3b7ba6; --c6: #16202c;
"""
_DARK = """
--back: #12161c; --card: #1a2028; --ink: #e8edf3; --soft: #a6b2bf; --line: #36404c; --grid: #2b343f; --accent: #8ab4f4;
--wrong: #ffb1a8; --wrong-back: #3b1f1d; --note-back: #1d2a3d;
--c0: #62b6ee; --c1: #ff9a57; --c2: #3fcf9f; --c3: #e79bc6; --c4: #e2b43f; --c5: #a9bbff; --c6: #e8edf3;
"""
COLORS = 7

CSS = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}\n"
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3rem) clamp(0.75rem, 3vw, 2rem); }
h1 { margin: 0; font-size: clamp(1.4rem, 1.1rem + 1.4vw, 2rem); line-height: 1.2; letter-spacing: -0.015em; }
h1, h2, h3, p, li, dd, caption, summary, figcaption { overflow-wrap: anywhere; }
h2 { margin: 0 0 0.75rem; font-size: 1.15rem; line-height: 1.3; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1rem; }
p { margin: 0.5rem 0; max-width: 75ch; }
a { color: var(--accent); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.9em; overflow-wrap: anywhere; }
header p { margin: 0.5rem 0 0; color: var(--soft); }
header .lead { color: var(--ink); font-size: 1.1rem; text-wrap: pretty; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.1rem; margin: 1rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.2rem 0; font-size: 0.925rem; }
section {
  margin-top: 1.25rem; padding: clamp(0.9rem, 2.5vw, 1.5rem); border: 1px solid var(--line); border-radius: 0.9rem;
  background: var(--card);
}
.alert, .notice { margin: 1rem 0 0; padding: 0.7rem 1rem; border-radius: 0.6rem; max-width: none; }
.alert { background: var(--wrong-back); color: var(--wrong); }
.notice { background: var(--note-back); }
.note { color: var(--soft); font-size: 0.875rem; }
.scroll {
  overflow-x: auto; margin: 1rem 0 0.5rem;  /* a shadow where there is more */
  background:
    linear-gradient(to right, var(--card) 30%, transparent) left / 2.5rem 100% local no-repeat,
    linear-gradient(to left, var(--card) 30%, transparent) right / 2.5rem 100% local no-repeat,
    linear-gradient(to right, var(--line), transparent) left / 0.75rem 100% scroll no-repeat,
    linear-gradient(to left, var(--line), transparent) right / 0.75rem 100% scroll no-repeat;
}
.scroll:focus-visible, a:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { padding: 0 0 0.4rem; text-align: left; font-weight: 600; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(100%, 100vw - 5rem); }
th, td { padding: 0.35rem 0.55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; }
td:last-child, th:last-child { padding-right: 0; }
thead th { min-width: 3.5rem; color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
tbody th { min-width: 6rem; max-width: 18rem; font-weight: 500; white-space: normal; overflow-wrap: anywhere; }
@media (min-width: 40rem) { tbody th { min-width: 8rem; max-width: 24rem; } }
.texts th, .texts td { text-align: left; vertical-align: top; }
.texts td { min-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0.75rem 0 0; min-width: 0; max-width: 32rem; }
figcaption { font-size: 0.9rem; font-weight: 600; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .name { fill: var(--ink); }
@media (max-width: 30rem) { svg text { font-size: 15px; } }
.grid { stroke: var(--grid); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.band { stroke: none; fill-opacity: 0.16; }
.dot { stroke: none; fill-opacity: 0.75; }
.cell { fill: var(--accent); stroke: none; }
.size { fill: var(--soft); stroke: none; }
"""
    + "".join(f".c{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }}\n" for i in range(COLORS))
    + """
.d1 { stroke-dasharray: 7 4; } .d2 { stroke-dasharray: 2 4; } .d3 { stroke-dasharray: 9 3 2 3; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.25rem; margin: 0.75rem 0 0; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 0.45rem; min-width: 0; font-size: 0.9rem; }
.legend span { min-width: 0; overflow-wrap: anywhere; }
.legend svg { flex: none; width: 28px; height: 12px; }
details { margin: 0.75rem 0 0; }
summary { color: var(--accent); font-size: 0.9rem; cursor: pointer; }
pre { overflow-x: auto; padding: 0.75rem; border-radius: 0.5rem; background: var(--back); font-size: 0.8rem; }
footer { margin-top: 1.5rem; color: var(--soft); font-size: 0.875rem; }
@media (forced-colors: active) { .cell, .size, .dot, .curve, .band { forced-color-adjust: none; } }
@media print {
  @page { margin: 14mm; }
  html { font-size: 9pt; }
  body { background: none; }
  main { max-width: none; padding: 0; }
  p { max-width: none; }
  nav, details { display: none; }
  section { margin-top: 8mm; padding: 0; border: 0; }
  h2, h3, caption, figcaption { break-after: avoid; }
  figure, tr, .drawn, .alert, .notice { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; background: none; break-inside: avoid; }
  .note { break-before: avoid; }
  table { font-size: 8pt; }
  th, td { padding: 0.25rem 0.4rem; white-space: normal; }
  thead .long { min-width: 4rem; overflow-wrap: anywhere; }
  tbody th { min-width: 5.5rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure { max-width: 9cm; }
  svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)
