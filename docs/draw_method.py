"""Draws docs/method.svg, the training step of SD-DiT in one picture: python docs/draw_method.py.

Needs the standard library only, and writes the same bytes each time. Colours follow the reader's light or dark mode.
"""

import random
from collections.abc import Iterator
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 900, 610
# The lanes' centers from the top: teacher, student, decoder; and the columns' centers from the left.
TEACHER, STUDENT, DECODER = 138, 300, 466
INPUTS, ENCODERS, HEADS, LOSSES = 132, 325, 535, 783
BOX_WIDTH, BOX_HEIGHT, HEAD_WIDTH, LOSS_WIDTH = 190, 100, 146, 194
# A picture of 5 x 5 tokens, each of 2 x 2 pixels.
SIDE, PIXELS, PIXEL, GAP = 5, 2, 8, 2
PITCH = PIXELS * PIXEL + GAP
PICTURE = SIDE * PITCH - GAP
INVISIBLE = {(0, 3), (1, 0), (2, 2), (3, 4), (4, 1)}  # (row, column): a fifth of the tokens

RGB = tuple[float, float, float]
Pixels = list[list[RGB]]

# class -> (light, dark)
COLOURS = {
    ".page": ("fill:#ffffff;stroke:#d1d9e0", "fill:#0d1117;stroke:#3d444d"),
    "text": ("fill:#1f2328", "fill:#e6edf3"),
    ".soft": ("fill:#59636e", "fill:#a3abb5"),
    ".line": ("stroke:#59636e", "stroke:#a3abb5"),
    ".tip": ("fill:#59636e", "fill:#a3abb5"),
    ".kept": ("fill:#ddf4ff;stroke:#0969da", "fill:#10284a;stroke:#4493f8"),
    ".only": ("fill:#f6f8fa;stroke:#818b98", "fill:#1b212a;stroke:#848d97"),
    ".d": ("fill:#fbefff;stroke:#8250df", "fill:#2b1c4a;stroke:#ab7df8"),
    ".g": ("fill:#fff1e5;stroke:#bc4c00", "fill:#3a2106;stroke:#f0883e"),
    ".hole": ("stroke:#afb8c1", "stroke:#59636e"),
}
SHAPES = """\
text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;font-size:14.5px;text-anchor:middle}
.left{text-anchor:start}
.title{font-size:16px;font-weight:600}
.index{font-size:13px;font-weight:400}
.pixels{shape-rendering:crispEdges}
.page{stroke-width:1}
.kept,.d,.g{stroke-width:1.6}
.only{stroke-width:1.4;stroke-dasharray:6 4}
.line{fill:none;stroke-width:1.6}
.dashed{stroke-dasharray:6 4}
.hole{fill:none;stroke-dasharray:3 3}
"""


def style(light: bool = True, dark: bool = True) -> str:
    """The style sheet; of both modes, or of one for a program that knows no media queries."""
    rules = ["".join(f"{name}{{{colour[mode]}}}\n" for name, colour in COLOURS.items()) for mode in (0, 1)]
    if light and dark:
        return f"{SHAPES}{rules[0]}@media (prefers-color-scheme:dark){{\n{rules[1]}}}\n"
    return SHAPES + rules[0 if light else 1]


def clean() -> Pixels:
    """x0, a landscape: sun, sky, and a hill."""
    rows = []
    for y in range(SIDE * PIXELS):
        row: list[RGB] = []
        for x in range(SIDE * PIXELS):
            sky = (110 + 11 * y, 170 + 7 * y, 228)
            hill = y > 6.4 - 2.6 * max(0.0, 1 - abs(x - 3) / 4.5)
            sun = (x - 7) ** 2 + (y - 2) ** 2 < 3.5
            row.append((74 - 2 * x, 150 - 6 * (y - 4), 84) if hill else (250, 200, 70) if sun else sky)
        rows.append(row)
    return rows


def noised(x0: Pixels, sigma: float) -> Pixels:
    """x0 + sigma * eps, with the same eps at each call."""
    eps = random.Random(1)
    return [[tuple(v + sigma * (2 * eps.random() - 1) for v in pixel) for pixel in row] for row in x0]


def denoised(x0: Pixels) -> Pixels:
    """x0, a little blurred."""
    last = len(x0) - 1

    def near(y: int, x: int) -> RGB:
        around = [x0[min(max(y + i, 0), last)][min(max(x + j, 0), last)] for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        return tuple(0.6 * own + 0.1 * sum(others) for own, *others in zip(x0[y][x], *around, strict=True))

    return [[near(y, x) for x in range(last + 1)] for y in range(last + 1)]


def picture(pixels: Pixels, cx: float, cy: float, tokens: set[tuple[int, int]] | None = None) -> Iterator[str]:
    """A picture around a point; of the tokens that are not in `tokens` only outlines."""
    left, top, size = cx - PICTURE / 2, cy - PICTURE / 2, PIXELS * PIXEL
    for row in range(SIDE):
        for column in range(SIDE):
            x, y = left + column * PITCH, top + row * PITCH
            if tokens is not None and (row, column) not in tokens:
                yield f'<rect class="hole" x="{x + 0.5:g}" y="{y + 0.5:g}" width="{size - 1}" height="{size - 1}"/>'
                continue
            for i in range(PIXELS):
                for j in range(PIXELS):
                    rgb = pixels[row * PIXELS + i][column * PIXELS + j]
                    colour = "".join(f"{min(max(round(v), 0), 255):02x}" for v in rgb)
                    place = f'x="{x + j * PIXEL:g}" y="{y + i * PIXEL:g}"'
                    yield f'<rect class="pixels" {place} width="{PIXEL}" height="{PIXEL}" fill="#{colour}"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words around a point. "_S" is an index."""
    pieces, lowered = [], False
    for number, piece in enumerate(words.split("_")):
        if number:
            index, piece, lowered = piece[0], piece[1:], True
            pieces.append(f'<tspan class="index" dy="5">{index}</tspan>')
        if piece:
            pieces.append(f'<tspan dy="-5">{escape(piece)}</tspan>' if lowered else escape(piece))
            lowered = False
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:g}" y="{y:g}">{"".join(pieces)}</text>'


def box(kind: str, cx: float, cy: float, width: float, height: float, title: str, *lines: str) -> Iterator[str]:
    """A box around a point, with a title and lines of words."""
    yield (
        f'<rect class="{kind}" x="{cx - width / 2:g}" y="{cy - height / 2:g}" width="{width:g}" height="{height:g}" '
        'rx="8"/>'
    )
    first = cy - 10 * len(lines) + 6
    yield text(cx, first, title, "title")
    for number, line in enumerate(lines, 1):
        yield text(cx, first + 2 + 20 * number, line)


def badge(kind: str, cx: float, cy: float) -> Iterator[str]:
    """The mark of a box that a loss, "d" or "g", sends its gradient to."""
    yield f'<rect class="{kind}" x="{cx - 21:g}" y="{cy - 12:g}" width="42" height="24" rx="12"/>'
    yield text(cx, cy + 3, f"∇L_{kind.upper()}")


def arrow(*points: tuple[float, float], dashed: bool = False) -> Iterator[str]:
    """Straight lines through points, with a tip at the last."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    ends = [*points[:-1], (x - 7 * dx, y - 7 * dy)]
    path = "M" + "L".join(f"{px:g} {py:g}" for px, py in ends)
    yield f'<path class="line{" dashed" if dashed else ""}" d="{path}"/>'
    wing = f"{x - 9 * dx - 4.5 * dy:g} {y - 9 * dy - 4.5 * dx:g}L{x - 9 * dx + 4.5 * dy:g} {y - 9 * dy + 4.5 * dx:g}"
    yield f'<path class="tip" d="M{x:g} {y:g}L{wing}Z"/>'


def trajectory() -> Iterator[str]:
    """The curve from x0 to noise, with the two points that the encoders see."""
    x, left = 34, INPUTS - PICTURE / 2
    start, end = TEACHER - 72, STUDENT + 92
    yield f'<path class="line" d="M{x} {start}C{x - 22} {TEACHER},{x + 22} {STUDENT},{x} {end}"/>'
    # Where the curve passes the two lanes.
    for y, at in ((TEACHER, x - 7.6), (STUDENT, x + 7.2)):
        yield f'<path class="line" d="M{at:g} {y}H{left - 8:g}"/>'
        yield f'<circle class="tip" cx="{at:g}" cy="{y}" r="5"/>'
    yield f'<circle class="tip" cx="{x}" cy="{start}" r="3.5"/>'
    yield f'<circle class="tip" cx="{x}" cy="{end}" r="3.5"/>'
    yield text(x + 12, start + 5, "x_0, σ = 0", "left soft")
    yield text(x + 12, end + 5, "noise", "left soft")


def content() -> Iterator[str]:
    """All that is drawn."""
    x0 = clean()
    all_tokens = {(row, column) for row in range(SIDE) for column in range(SIDE)}
    x_s = noised(x0, 80)
    yield f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>'
    yield text(22, 32, "One image x_0 and one noise ε give two points x_0 + σε of one trajectory of the PF-ODE", "left")
    yield from trajectory()
    yield from picture(noised(x0, 6), INPUTS, TEACHER)
    yield from picture(x_s, INPUTS, STUDENT, all_tokens - INVISIBLE)
    yield from picture(x_s, INPUTS, DECODER, INVISIBLE)
    below = PICTURE / 2 + 20
    yield text(INPUTS, TEACHER + below, "x_T, lowest σ")
    yield text(INPUTS, STUDENT + below, "x_S, random σ")
    yield text(INPUTS, DECODER + below, "invisible 20 % of x_S")

    # Teacher.
    half, head, loss = BOX_WIDTH / 2, HEAD_WIDTH / 2, LOSSES - LOSS_WIDTH / 2
    right = INPUTS + PICTURE / 2 + 8
    yield from arrow((right, TEACHER), (ENCODERS - half, TEACHER))
    yield from box(
        "only", ENCODERS, TEACHER, BOX_WIDTH, BOX_HEIGHT, "Teacher encoder", "[CLS] + all tokens", "no gradient"
    )
    yield from arrow((ENCODERS + half, TEACHER), (HEADS - head, TEACHER))
    yield from box("only", HEADS, TEACHER, HEAD_WIDTH, BOX_HEIGHT, "Teacher head", "center, softmax", "no gradient")
    yield from arrow((HEADS + head, TEACHER), (loss, TEACHER))
    yield text((HEADS + head + loss) / 2, TEACHER - 10, "P_T")
    # Student.
    yield from arrow((right, STUDENT), (ENCODERS - half, STUDENT))
    yield from box("kept", ENCODERS, STUDENT, BOX_WIDTH, BOX_HEIGHT, "Student encoder", "[CLS] + visible 80 %")
    yield from arrow((ENCODERS + half, STUDENT), (HEADS - head, STUDENT))
    yield from box("only", HEADS, STUDENT, HEAD_WIDTH, BOX_HEIGHT, "Student head", "softmax")
    yield from arrow((HEADS + head, STUDENT), (loss, STUDENT))
    yield text((HEADS + head + loss) / 2, STUDENT - 10, "P_S")
    for x in (ENCODERS, HEADS):
        yield from arrow((x, STUDENT - BOX_HEIGHT / 2), (x, TEACHER + BOX_HEIGHT / 2), dashed=True)
        yield text(x + 10, (TEACHER + STUDENT) / 2 + 5, "EMA", "left soft")
    middle, tall = (TEACHER + STUDENT) / 2, STUDENT - TEACHER + BOX_HEIGHT
    words = "L_D: P_S predicts P_T", "for the visible tokens", "and for [CLS]"
    yield from box("d", LOSSES, middle, LOSS_WIDTH, tall, "Discriminative loss", *words)
    # Decoder.
    yield from arrow((right, DECODER), (ENCODERS - half, DECODER))
    yield from arrow((ENCODERS, STUDENT + BOX_HEIGHT / 2), (ENCODERS, DECODER - BOX_HEIGHT / 2))
    yield text(ENCODERS + 12, (STUDENT + DECODER) / 2 + 5, "encoded visible tokens", "left soft")
    yield from box("kept", ENCODERS, DECODER, BOX_WIDTH, BOX_HEIGHT, "Decoder", "all tokens in order")
    yield from arrow((ENCODERS + half, DECODER), (HEADS - PICTURE / 2 - 8, DECODER))
    yield from picture(denoised(x0), HEADS, DECODER)
    yield text(HEADS, DECODER + below, "denoised image D")
    yield from arrow((HEADS + PICTURE / 2 + 8, DECODER), (loss, DECODER))
    yield from box(
        "g", LOSSES, DECODER, LOSS_WIDTH, BOX_HEIGHT, "Denoising loss", "L_G: D approximates x_0", "on all tokens"
    )
    yield text(LOSSES, (STUDENT + DECODER) / 2 + 5, "L = L_G + 0.1 L_D", "title")
    # Who gets gradient.
    low = BOX_HEIGHT / 2
    yield from badge("d", ENCODERS - half + 28, STUDENT + low)
    yield from badge("g", ENCODERS + half - 28, STUDENT + low)
    yield from badge("d", HEADS + head - 28, STUDENT + low)
    yield from badge("g", ENCODERS + half - 28, DECODER + low)
    yield from legend(HEIGHT - 32)


def legend(y: float) -> Iterator[str]:
    """What the marks mean."""
    for x, kind, words in ((22, "kept", "used for sampling"), (204, "only", "only in training")):
        yield f'<rect class="{kind}" x="{x}" y="{y - 10}" width="30" height="20" rx="5"/>'
        yield text(x + 40, y + 5, words, "left")
    yield from arrow((368, y), (402, y), dashed=True)
    yield text(410, y + 5, "moving average (EMA)", "left")
    yield from badge("d", 606, y)
    yield from badge("g", 654, y)
    yield text(684, y + 5, "gets this loss's gradient", "left")


def draw(css: str) -> str:
    """The picture with a style sheet."""
    label = "Training step of SD-DiT: student, teacher, decoder and the two losses"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>\n{css}</style>", *content(), "</svg>\n"])


if __name__ == "__main__":
    (Path(__file__).parent / "method.svg").write_text(draw(style()), encoding="utf-8", newline="\n")
