"""Section of the report that shows what infinite_jax.calibrate found: whether grades mean a comparable thing."""

import numpy as np

from infinite_jax.page.pieces import GAP, Section, absent, card, esc, line, number, table
from infinite_jax.page.run import Run
from rubric import calibration

TITLE = "Calibration"
MARGIN = 0.2  # difference in pass rate beyond which two rubrics are named as unlike
SHARES = tuple(f"share_{grade}" for grade in range(1, 5))


def calibrated(run: Run) -> Section:
    found = run.calibration
    if not found:
        how = f"Not measured: python -m infinite_jax.calibrate {esc(run.folder)}"
        return Section("calibration", TITLE, "", absent(how))
    lede = (
        f"The held-out replies of one frozen policy, that of step {found['step']:,}: how each domain's rubric spreads "
        "its grades over them, and what every other rubric makes of the same replies. Where a rubric grades other "
        "replies much as their own rubrics do, a grade of 3 means a comparable thing; where rows hold nothing that it "
        "could check, there is no grade."
    )
    body = card("Grades under the own rubric", "shares of the replies graded", _spreads(found))
    body += card(
        "Every domain's replies under every rubric",
        "columns: the rubric; pass rate, mean grade below",
        _matrix(found),
    )
    return Section("calibration", TITLE, lede, body)


def unlike(found: dict) -> list[str]:
    """A line for each rubric that passes a domain's replies more or less often than the domain's own does."""
    parts = (np.array(found[key], float) for key in ("graded", "asked", "mean", "passed"))
    matrix = calibration.Matrix(tuple(found["names"]), *parts)
    return [
        f"{name}'s replies pass {abs(gap):.2f} {'more' if gap > 0 else 'less'} often under {under}'s rubric"
        for domain, name in enumerate(matrix.names)
        for under, gap in calibration.uncalibrated(matrix, domain, MARGIN)
    ]


def _spreads(found: dict) -> str:
    lines = []
    for name in found["names"]:
        of = found["table"][name]
        cells = [f"{of['n']:,}", f"{of['invalid']:,}", *(number(of[key], 2) for key in SHARES)]
        lines.append(line(esc(name), [*cells, number(of["pass_rate"]), number(of["mean"], 2)]))
    return table(("domain", "graded", "not graded", "1", "2", "3", "4", "pass rate", "mean grade"), lines)


def _matrix(found: dict) -> str:
    """The darker a cell, the more passes; a cell of the diagonal has a frame."""
    lines = []
    for row, name in enumerate(found["names"]):
        cells = []
        for column in range(len(found["names"])):
            passed, mean = (found[key][row][column] for key in ("passed", "mean"))
            graded, asked = found["graded"][row][column], found["asked"][row]
            kind = "cell own" if row == column else "cell"
            if passed is None:
                cells.append(f'<td class="{kind}" title="none of {asked:,} graded">{GAP}</td>')
                continue
            part = "" if graded == asked else f'<span class="range"> of {graded:,}</span>'
            cells.append(
                f'<td class="{kind}" style="--part:{100 * passed:.0f}%" title="{graded:,} of {asked:,} graded">'
                f'{number(passed, 2)}{part}<br><span class="range">{number(mean, 2)}</span></td>'
            )
        lines.append(line(esc(name), cells))
    gaps = unlike(found)
    said = "; ".join(map(esc, gaps)) if gaps else f"No pass rate differs by more than {MARGIN:g} from the own"
    heads = ("replies of", *map(esc, found["names"]))
    return f'{table(heads, lines)}<p class="under">{said}.</p>'
