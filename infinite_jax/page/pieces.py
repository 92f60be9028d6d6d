"""The small parts that the report page is made of, as HTML text. Everything that a run wrote goes through `esc`."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from curriculum.triage import BANDS
from infinite_jax import drawing
from infinite_jax.page.svg import inline

GAP = "–"  # no value
GARBLING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Section(NamedTuple):
    key: str  # its anchor
    title: str
    lede: str  # how to read it, HTML
    body: str  # HTML


def esc(value: object) -> str:
    """Text for HTML; control characters and changes of direction are spelled out, so that no reply garbles the page."""
    return html.escape(GARBLING.sub(lambda found: f"\\x{ord(found.group()):02x}", str(value)), quote=True)


def slug(name: str) -> str:
    """The name as a part of an id: what is not a plain letter or digit becomes its number."""
    return "".join(c if c.isascii() and c.isalnum() else f"-{ord(c)}-" for c in name)


def number(value: float | None, digits: int = 3) -> str:
    """Rounded, with a true minus; a dash for None and NaN."""
    return GAP if value is None or value != value else f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole // 60 % 60:02d} min"


def absent(text: str) -> str:
    """Says that something is not there."""
    return f'<p class="absent">{text}</p>'


def card(title: str, value: str, body: str) -> str:
    return f'<div class="card"><div class="head"><h3>{title}</h3><span class="value">{value}</span></div>{body}</div>'


def band(value: float | None) -> str:
    return "" if value is None else f'<span class="band {BANDS[int(value)]}">{BANDS[int(value)]}</span>'


def legend(*entries: tuple[str, str, str]) -> str:
    """Entries of (shape: line, dot, diamond or "" for a square; CSS colour; HTML)."""
    items = (f'<li><i class="{shape}" style="background:{colour}"></i>{label}</li>' for shape, colour, label in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(head: Sequence[str], lines: Iterable[str], left: Sequence[int] = ()) -> str:
    """Scrolls sideways inside itself where the window is narrow; `left` are columns of text."""
    kinds = (' class="left"' if i in left else "" for i in range(len(head)))
    cells = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds))
    body = "".join(lines)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def line(name: str, cells: Iterable[str], kind: str = "") -> str:
    """A row of a table; a cell that does not bring its <td> gets one."""
    shown = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{name}</th>{shown}</tr>'


def picture(name: str, label: str, draw: Callable, width=320, height=176, **margins) -> str:
    """`draw(axes)` on axes of so many pixels; see svg.inline and drawing.blank."""
    figure, axes = drawing.blank(width, height, **margins)
    draw(axes)
    return f"<figure>{inline(figure, name, label)}</figure>"


def both_widths(name: str, label: str, draw: Callable, broad: dict, narrow: dict) -> str:
    """A picture drawn for wide windows and again for a phone, where the wide one's letters would be too small.

    Args:
      broad, narrow: size and margins of each, as drawing.blank takes them; narrow is 340 pixels wide.
    """
    wide = picture(f"{name}-broad", label, draw, **broad)
    slim = picture(f"{name}-narrow", label, draw, **({"width": 340} | narrow))
    return f'<div class="broad">{wide}</div><div class="narrow">{slim}</div>'
