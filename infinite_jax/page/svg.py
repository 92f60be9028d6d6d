"""A matplotlib figure as inline SVG that takes its colours and its typeface from the page.

matplotlib writes colours as literals, a style rule for every element of the document, and names that two pictures of
one page would share. Here colours become variables of the style sheet, the rule goes, names that nobody refers to go,
and coordinates keep a tenth of a pixel.
"""

import html
import io
import re

import matplotlib
from matplotlib.figure import Figure

from infinite_jax import drawing

COLOURS = {
    drawing.INK: "--ink",
    drawing.MUTED: "--muted",
    drawing.LINE: "--line",
    drawing.CARD: "--card",
    drawing.HELD: "--held",
    drawing.SHARE: "--share",
    **{tint: f"--band-{band}" for tint, band in zip(drawing.TINTS, ("low", "medium", "high"))},
    **{colour: f"--grade-{grade}" for grade, colour in enumerate(drawing.GRADES, 1)},
    **{colour: f"--term-{term}" for term, (colour, _) in drawing.TERMS.items()},
    **{colour: f"--layer-{layer}" for layer, colour in enumerate(drawing.LAYERS)},
    **{colour: f"--layer-{layer}" for colour, layer in zip(drawing.PHASES.values(), (0, 2, 1, 5))},
}
_COLOUR = re.compile("|".join(COLOURS))
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_FONT = re.compile(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*|font-family: [^;\"]*;? ?")


def inline(figure: Figure, name: str, label: str) -> str:
    """An <svg> element; `name` is unique on the page, `label` says in words what the picture shows."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    body = text.getvalue()
    box = re.search(r'viewBox="([^"]*)"', body).group(1)
    body = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r' (style|d|points|transform|x|y|width|height)="([^"]*)"', _attribute, body)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", body)
    body = re.sub(r">\s+<", "><", body).replace("<g/>", "").strip()
    title = html.escape(label, quote=True)
    return f'<svg viewBox="{box}" role="img" aria-label="{title}" stroke-linejoin="round">{body}</svg>'


def _attribute(found: re.Match) -> str:
    key, value = found.groups()
    if key == "style":
        value = _FONT.sub(_font, _COLOUR.sub(lambda colour: f"var({COLOURS[colour.group()]})", value))
    else:
        value = _NUMBER.sub(lambda number: f"{float(number.group()):.1f}".removesuffix(".0"), value)
    if key == "transform" and value.startswith("rotate(-0 "):
        return ""
    if key == "d":
        value = re.sub(r"\s*([MLQCz])\s*", r"\1", value)
    return f' {key}="{value.strip()}"'


def _font(found: re.Match) -> str:
    weight, size = found.groups()
    return ("" if size is None else f"font-size: {size}px") + (f"; font-weight: {weight}" if weight else "")
