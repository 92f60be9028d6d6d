"""What a person sees: names are text, whatever stands in them."""

import io

import numpy as np

from infinite_jax import progress
from infinite_jax.heldout import DomainResult

NAMES = ["copy[/b]", "a [red] one", ":smile:"]  # a closing tag without an opening one, a style, an emoji's code
RESULTS = {name: DomainResult(np.array([1.0, 4.0, 3.0, 2.0], np.float32), None) for name in NAMES}


def test_brackets_in_a_domains_name_are_no_markup():
    for table in (progress.results_table(RESULTS), progress.before_after(RESULTS, RESULTS, (0, 5))):
        assert all(f"| {name} " in table for name in NAMES)


def test_nor_in_the_live_view():
    shown = progress.Progress(NAMES, 5, 0)
    shown.console.file = io.StringIO()
    shown.console.print(shown._table({f"triage/share/{name}": 0.25 for name in NAMES}))
    text = shown.console.file.getvalue()
    assert all(name in text for name in NAMES) and text.count("0.250") == 3
