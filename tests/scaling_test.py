"""benchmarks/scaling.py: what it draws and writes of rows; nothing is timed."""

import json

import matplotlib.figure
import pytest

from benchmarks import scaling


def row(layout, devices, efficiency, shape="tiny"):
    return [shape, layout, devices, 1.0, 1.0, 1.0, 3.0, 10.0, 20.0, efficiency, efficiency, None]


ONE = row("one device", 1, 1.0)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k)
    )
    return figures


def test_rows_of_one_device_are_drawn(tmp_path, drawn):
    scaling.plot([ONE, [*ONE[:3], *[None] * 6, 1.0, 1.0, "MemoryError: no"]], str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 0
    assert drawn[0].axes[0].get_ylim() == (0.85, 1.02)


def test_several_processes_are_named_apart(tmp_path, drawn):
    for processes in (1, 2):
        written = {"processes": processes, "rows": [ONE, row("fsdp", 2, 0.9 / processes)]}
        (tmp_path / f"{processes}.json").write_text(json.dumps(written))
    rows = [each for processes in (1, 2) for each in scaling.read(str(tmp_path / f"{processes}.json"))]
    assert [each[1] for each in rows] == [
        "one device", "fsdp", "one device, a process each", "fsdp, a process each"
    ]  # fmt: skip
    scaling.plot(rows, str(tmp_path / "a.png"))
    curves = {line.get_label(): line for line in drawn[0].axes[1].lines if len(line.get_xdata()) == 2}
    together, apart = curves["tiny fsdp"], curves["tiny fsdp, a process each"]
    assert list(together.get_ydata()) == [1.0, 0.9] and list(apart.get_ydata()) == [1.0, 0.45]
    assert together.get_color() == apart.get_color() and together.get_linestyle() != apart.get_linestyle()
    assert drawn[0].axes[0].get_ylim()[0] < 0.45


def test_what_was_measured_is_written_before_it_is_drawn(tmp_path, monkeypatch):
    """--counts 1 --plot to a folder that is not there."""
    out = tmp_path / "a.json"
    given = ["scaling", "--tiny", "--counts", "1", "--out", str(out), "--plot", str(tmp_path / "no" / "a.png")]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.setattr(scaling, "measure", lambda *asked: ONE[3:9])
    with pytest.raises(FileNotFoundError):
        scaling.main()
    assert json.loads(out.read_text())["rows"] == [ONE]
