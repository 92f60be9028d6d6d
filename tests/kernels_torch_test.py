"""benchmarks/kernels_torch.py as benchmarks/kernels.py asks it, in a process of its own."""

import pytest

from benchmarks.kernels import Torch, inputs
from benchmarks.measure import in_turns

pytest.importorskip("torch", reason="compares with torch")


def test_asked_and_answered():
    torch = Torch(tiny=True)
    with torch.process:  # ends it
        name = torch.names[0]
        assert all(0 < error < 1e-2 for error in torch.errors(name, 64, 128, False))
        given, _ = inputs(1, 128, 64, False, layers=2)
        found = in_turns(dict(enumerate(torch.timers(name, 64, given))), 2)
        assert 0 < found[0] < 10 and 0 < found[1] < 10
        with pytest.raises(RuntimeError, match="no such"):
            torch.ask("errors", "no such", (9, 3), 128, 64)
        torch.ask("forget")
        with pytest.raises(RuntimeError):
            torch.ask("time", name, 0, 1)
    assert torch.process.returncode == 0
