"""
Draws the figure of the algorithm, algorithm.svg beside this file:

    python docs/figures/draw_algorithm.py

Colours follow the theme of the reader, light or dark, by a media query inside of the file.
"""

# Signs of mathematics are meant
# ruff: noqa: RUF001

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 784
STYLE = """
svg { --ink: #1c2733; --soft: #5d6b7a; --line: #73808e; --page: #ffffff; --panel: #f3f5f8; --pill: #dfe6ee;
      --train: #2f5fb3; --on-train: #ffffff; --grad: #c2500b; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6ebf1; --soft: #a3afbc; --line: #8694a3; --page: #1e2129; --panel: #272b35; --pill: #3a424f;
        --train: #7aa5f0; --on-train: #10182a; --grad: #ff9d5c; }
}
text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; font-size: 15px; fill: var(--ink);
       text-anchor: middle; }
.title { font-size: 17px; font-weight: 600; text-anchor: start; }
.note { font-size: 13px; fill: var(--soft); }
.start { text-anchor: start; }
.panel { fill: var(--panel); }
.pill { fill: var(--pill); }
.box { fill: var(--page); stroke: var(--ink); stroke-width: 1.5; }
.trained { fill: var(--train); stroke: var(--train); }
.target { stroke-dasharray: 5 3; }
.on { fill: var(--on-train); font-weight: 600; }
.loss { fill: none; stroke: var(--grad); stroke-width: 1.5; }
.flow { fill: none; stroke: var(--line); stroke-width: 1.6; marker-end: url(#tip); }
.grad { fill: none; stroke: var(--grad); stroke-width: 2.4; marker-end: url(#gradtip); }
.gradtext { font-size: 13px; fill: var(--grad); }
.gradplain { fill: none; stroke: var(--grad); stroke-width: 2.4; }
.stop { stroke: var(--grad); stroke-width: 3.2; }
"""
MARKERS = """<defs>
<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto-start-reverse">
<path d="M0 0 8 4 0 8z" fill="var(--line)"/></marker>
<marker id="gradtip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto-start-reverse">
<path d="M0 0 8 4 0 8z" fill="var(--grad)"/></marker>
</defs>"""

shapes: list[str] = []


def text(x: float, y: float, words: str, style: str = "") -> None:
    """Words around x, their middle at height y. What follows an underscore is a subscript."""
    words, _, subscript = words.partition("_")
    below = f'<tspan dy="4" style="font-size:11px">{escape(subscript)}</tspan>' if subscript else ""
    shapes.append(f'<text class="{style}" x="{x:g}" y="{y + 5:g}">{escape(words)}{below}</text>')


def rectangle(x: float, y: float, width: float, height: float, style: str, radius: float) -> None:
    """A rectangle around the height y."""
    shapes.append(
        f'<rect class="{style}" x="{x:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
    )


def pill(x: float, y: float, width: float, words: str) -> None:
    """A tensor."""
    rectangle(x, y, width, 30, "pill", 15)
    text(x + width / 2, y, words)


def network(x: float, y: float, words: str, kind: str = "", width: float = 46) -> None:
    """A network: trained by the loss of its panel, a target copy, or one with fixed weights."""
    rectangle(x, y, width, 42, f"box {kind}", 5)
    text(x + width / 2, y, words, "on" if kind == "trained" else "")


def loss(x: float, y: float, width: float, words: str, height: float = 34) -> None:
    """A loss, or what leads to it."""
    rectangle(x, y, width, height, "loss", 5)
    text(x + width / 2, y, words)


def flow(*points: tuple[float, float], style: str = "flow") -> None:
    """An arrow along points."""
    path = " ".join(f"{x:g} {y:g}" for x, y in points)
    shapes.append(f'<path class="{style}" d="M{path}"/>')


def stop(x: float, y: float) -> None:
    """Where a gradient ends."""
    shapes.append(
        f'<path class="stop" d="M{x - 4:g} {y + 9:g} {x - 1:g} {y - 9:g} M{x + 2:g} {y + 9:g} {x + 5:g} {y - 9:g}"/>'
    )


def panel(top: float, height: float, title: str, note: str) -> None:
    """The ground of one loss, with its title and when it is used."""
    rectangle(0, top + height / 2, WIDTH, height, "panel", 8)
    text(16, top + 22, title, "title")
    shapes.append(f'<text class="note" style="text-anchor:end" x="{WIDTH - 16}" y="{top + 27:g}">{escape(note)}</text>')


def embed(y: float, state: str, encoder: str, embedding: str, kind: str) -> None:
    """An observation, the state encoder and z_s."""
    pill(12, y, 42, state)
    network(74, y, encoder, kind)
    pill(142, y, 54, embedding)
    flow((54, y), (73, y))
    flow((120, y), (141, y))


def encoder_panel() -> None:
    """f, g and m, from a sub-trajectory of five transitions."""
    panel(0, 250, "1  Encoder loss trains f, g and m", "250 updates in a burst, each time the targets are replaced")
    y = 128
    embed(y, "s₀", "f", "z_s", "trained")
    pill(234, y + 56, 46, "a₀")
    network(234, y, "g", "trained")
    pill(302, y, 58, "z_sa")
    network(382, y, "m", "trained")
    text(405, y + 36, "linear", "note")
    for start, end in ((196, 233), (280, 301), (360, 381)):
        flow((start, y), (end, y))
    flow((257, y + 41), (257, y + 23))
    terms = (("z̃₁", "1.0 × squared error", "z₁"), ("r̂", "0.1 × cross entropy", "r₀"), ("d̂", "0.1 × squared error", "d₀"))
    for i, (prediction, term, target) in enumerate(terms):
        height = y + 52 * (i - 1)
        pill(464, height, 46, prediction)
        flow((428, y), (446, y), (446, height), (463, height))
        flow((510, height), (533, height))
        loss(534, height, 158, term)
        pill(716, height, 46, target)
        flow((716, height), (693, height))
    # The prediction goes back into g
    flow((487, y - 68), (487, y - 80), (218, y - 80), (218, y - 8), (233, y - 8))
    text(338, y - 67, "fed straight back, with a₁ to a₄", "note")
    # Target
    top = y - 52
    network(784, top, "f′", "target")
    pill(848, top, 42, "s₁")
    flow((848, top), (831, top))
    flow((784, top), (763, top))
    stop(774, top)
    text(772, y, "two-hot, 65 bins", "note start")
    text(772, y + 52, "0 or 1", "note start")
    flow((613, y + 92), (97, y + 92), (97, y + 24), style="grad")
    flow((613, y + 70), (613, y + 92), style="gradplain")
    text(420, y + 105, "gradient into m, g and f, through all five steps", "gradtext")


def value_panel() -> None:
    """Q, towards a target of three steps."""
    panel(262, 290, "2  Value loss trains Q", "once in every training step")
    y = 352
    embed(y, "s₀", "f", "z_s", "")
    pill(234, y - 50, 46, "a₀")
    network(234, y, "g")
    pill(302, y, 58, "z_sa")
    network(402, y, "Q", "trained")
    pill(470, y, 72, "Q₁, Q₂")
    for start, end in ((196, 233), (280, 301), (360, 401), (448, 469), (542, 577)):
        flow((start, y), (end, y))
    flow((257, y - 35), (257, y - 22))
    stop(380, y)
    loss(578, y, 114, "Huber loss")
    pill(722, y, 46, "y")
    flow((722, y), (693, y))
    flow((635, y + 17), (635, y + 38), (425, y + 38), (425, y + 23), style="grad")
    text(530, y + 51, "gradient", "gradtext")

    y = 458
    embed(y, "s₃", "f′", "z′", "target")
    network(234, y, "g′", "target")
    pill(302, y, 58, "z′_sa")
    network(402, y, "Q′", "target")
    pill(470, y, 72, "smaller")
    for start, end in ((196, 233), (280, 301), (360, 401), (448, 469), (542, 577)):
        flow((start, y), (end, y))
    network(146, y + 58, "π′", "target")
    flow((169, y + 15), (169, y + 36))
    pill(234, y + 58, 46, "a′")
    flow((192, y + 58), (233, y + 58))
    flow((257, y + 43), (257, y + 22))
    text(292, y + 58, "with clipped noise", "note start")
    loss(578, y, 300, "y = (r₀ + γr₁ + γ²r₂ + γ³ r̄′ min Q′) / r̄", 40)
    flow((745, y - 20), (745, 368))
    stop(745, 404)
    text(728, y + 40, "r̄: mean absolute reward of the buffer", "note")
    text(728, y + 58, "r̄′: the one the targets were trained under", "note")


def policy_panel() -> None:
    """pi, by the gradient of Q."""
    panel(564, 152, "3  Policy loss trains π", "once in every training step, on the same batch")
    y = 642
    embed(y, "s₀", "f", "z_s", "")
    network(240, y, "π", "trained")
    pill(312, y, 42, "a")
    network(380, y, "g")
    pill(452, y, 58, "z_sa")
    network(536, y, "Q")
    for start, end in ((196, 239), (286, 311), (354, 379), (426, 451), (510, 535), (582, 607)):
        flow((start, y), (end, y))
    stop(203, y)
    flow((217, y), (217, y - 34), (403, y - 34), (403, y - 22))
    loss(608, y, 240, "− mean Q + 10⁻⁵ × mean u²")
    flow((728, y + 17), (728, y + 44), (263, y + 44), (263, y + 23), style="grad")
    text(480, y + 57, "gradient through Q and g, whose weights stay as they are", "gradtext")


def legend() -> None:
    """What the shapes mean."""
    y = 752
    entries = (("trained", "trained here", 10), ("", "weights fixed", 160), ("target", "target copy", 314))
    for kind, words, x in entries:
        rectangle(x, y, 30, 26, f"box {kind}", 4)
        text(x + 40, y, words, "note start")
    pill(456, y, 30, "")
    text(496, y, "tensor", "note start")
    flow((570, y), (602, y), style="grad")
    text(612, y, "gradient", "note start")
    flow((700, y), (732, y))
    stop(715, y)
    text(742, y, "no gradient goes back", "note start")


def draw() -> str:
    """
    :return: the figure
    """
    shapes.clear()
    encoder_panel()
    value_panel()
    policy_panel()
    legend()
    label = "Data flow and gradients of the three losses of MR.Q"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n'
        f"<title>{label}</title>\n<style>{STYLE}</style>\n"
        f'{MARKERS}\n<rect width="{WIDTH}" height="{HEIGHT}" fill="var(--page)"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("algorithm.svg").write_text(draw(), encoding="utf-8")
