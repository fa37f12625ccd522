"""Draw the pictures of the documentation: ``python docs/pictures/draw.py`` writes the SVG files beside this script.

Colors follow the reader's color scheme, so that the pictures are readable on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328; }
  .bold { font-weight: 600; }
  .small { font-size: 12px; fill: #59636e; }
  .box { fill: #f6f8fa; stroke: #818b98; stroke-width: 1.2; }
  .inner { fill: #ffffff; stroke: #818b98; stroke-width: 1; }
  .public { fill: #ddf4ff; stroke: #0969da; stroke-width: 1.2; }
  .line { fill: none; stroke: #59636e; stroke-width: 1.6; }
  .up { stroke: #0969da; stroke-width: 2.2; }
  .down { stroke: #bc4c00; stroke-width: 1.8; stroke-dasharray: 6 4; }
  .head { fill: #59636e; } .head-up { fill: #0969da; } .head-down { fill: #bc4c00; }
  .label-up { fill: #0969da; font-weight: 600; } .label-down { fill: #bc4c00; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; } .small { fill: #9198a1; }
    .box { fill: #151b23; stroke: #656c76; } .inner { fill: #212830; stroke: #656c76; }
    .public { fill: #0c2d4d; stroke: #4493f8; }
    .line { stroke: #9198a1; } .head { fill: #9198a1; }
    .up { stroke: #4493f8; } .head-up { fill: #4493f8; } .label-up { fill: #4493f8; }
    .down { stroke: #f0883e; } .head-down { fill: #f0883e; } .label-down { fill: #f0883e; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, lines: list[tuple[str, str]], kind: str = "box") -> str:
    """A box with lines of text, (words, class), centered."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>']
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    parts += [text(x + width / 2, top + 18 * i, words, style) for i, (words, style) in enumerate(lines)]
    return "\n".join(parts)


def arrow(points: list[tuple[float, float]], kind: str = "") -> str:
    """A line through some points with an arrow head at its end."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="{path}" class="line {kind}" marker-end="url(#{kind or "plain"})"/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole picture."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0 0 L10 5 L0 10 z" class="{style}"/></marker>'
        for name, style in (("plain", "head"), ("up", "head-up"), ("down", "head-down"))
    ).replace('markerWidth="7" markerHeight="7"', 'markerWidth="11" markerHeight="11"')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{heads}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


def round_picture() -> str:
    """Who sends what in a round of ensemble distillation."""
    parts = [
        box(250, 16, 320, 50, [("public proxy set", "bold"), ("unlabeled images, the same for all", "small")], "public")
    ]
    for place, name in enumerate(("client 0", "client 1", "client K")):
        y = 112 + 86 * place
        lines = [(name, "bold"), ("private samples → local model", ""), ("local training, predict the proxy", "small")]
        parts.append(box(16, y, 250, 70, lines))
    parts.append(box(540, 104, 264, 266, [], "box"))
    parts.append(text(672, 126, "server", "bold"))
    steps = [
        ("aggregator", "client logits → ensemble teacher"),
        ("distillation", "teacher → student, on the proxy"),
        ("global student", "evaluated, saved, exported"),
    ]
    for place, (name, what) in enumerate(steps):
        y = 142 + 76 * place
        parts.append(box(556, y, 232, 52, [(name, "bold"), (what, "small")], "inner"))
        if place:
            parts.append(arrow([(672, y - 24), (672, y - 2)]))
    parts += [
        arrow([(268, 170), (554, 170)], "up"),
        text(405, 160, "logits on the proxy", "label-up"),
        text(405, 188, "200 kB for 5,000 images, 10 classes", "small"),
        arrow([(538, 318), (268, 318)], "down"),
        text(403, 308, "round number", "label-down"),
        text(403, 336, "or soft labels, or student weights", "small"),
        arrow([(250, 41), (141, 41), (141, 110)]),
        arrow([(570, 41), (672, 41), (672, 102)]),
        text(403, 252, "private data stays on the client", "small"),
    ]
    return svg(
        820, 384, "A round of federated distillation: clients upload logits, the server distills a student", parts
    )


def architecture_picture() -> str:
    """The way of a round through the files."""
    way = [
        ("fedkd/simulate/__main__.py", "options → Config"),
        ("simulate/runner.py", "all runs of a config; run directory, screen, result.json"),
        ("simulate/rounds.py", "the round loop: broadcast → exchange → accept → aggregate"),
        ("simulate/flower/server_app.py", "messages to the sampled clients, replies, bytes"),
        ("simulate/flower/client_app.py", "decode, local update, encode; client memory"),
        ("algorithms/NAME.py", "one method: local_update on the client, aggregate on the server"),
        ("training/trainer.py", "train, distill, predict"),
        ("training/loop.py", "the only backward()"),
    ]
    parts = []
    for place, (name, what) in enumerate(way):
        y = 12 + 70 * place
        parts.append(box(250, y, 420, 50, [(name, "bold"), (what, "small")]))
        if place:
            parts.append(arrow([(460, y - 20), (460, y - 2)]))
    left = [
        ("simulate/experiment.py", ["names of a config → objects"], 82),
        ("data/", ["data sets, proxy sets, partitioners"], 152),
        ("core/communication/", ["codecs, deltas, validation, bytes"], 257),
        ("training/models/", ["networks, checkpoint files"], 432),
    ]
    right = [
        ("simulate/evaluation/metrics.py", ["one row per round"], 82),
        ("core/report/", ["screen, tables, figures"], 152),
        ("algorithms/aggregators.py", ["client logits → teacher"], 362),
        ("training/losses/, terms/", ["student against teacher"], 432),
    ]
    for x, boxes in ((6, left), (694, right)):
        for name, lines, y in boxes:
            parts.append(box(x, y, 220, 50, [(name, "bold"), *((line, "small") for line in lines)], "public"))
    parts += [
        arrow([(248, 107), (228, 107)]),
        arrow([(116, 134), (116, 150)]),
        arrow([(248, 177), (238, 177), (238, 275), (228, 275)]),
        arrow([(248, 317), (238, 317), (238, 290), (228, 290)]),
        arrow([(248, 457), (228, 457)]),
        arrow([(672, 107), (692, 107)]),
        arrow([(804, 134), (804, 150)]),
        arrow([(672, 387), (692, 387)]),
        arrow([(672, 457), (692, 457)]),
    ]
    return svg(920, 564, "How a round is executed, file by file", parts)


PICTURES = {"round.svg": round_picture, "architecture.svg": architecture_picture}

if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (Path(__file__).parent / name).write_text(picture(), encoding="utf-8")
