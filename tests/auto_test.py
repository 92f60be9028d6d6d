"""mesh=auto by hand: bytes, splits and reasons."""

import dataclasses

import pytest

from sharding.auto import Need, choose, possible, row_bytes, state_bytes
from sharding.mesh import AXES, MeshConfig, axis_sizes

AUTO = MeshConfig(0, 0, 0, 0, 0, 0, "none")
GB = 10**9
HALF = Need(
    500_000_000, 500_000_000, width=900, layers=24, kv_heads=2, rows=128, sampled=128, longest=2048, memory=80 * GB
)
LARGE = Need(
    7_000_000_000, 7_000_000_000, width=4096, layers=32, kv_heads=8, rows=64, sampled=64, longest=2048, memory=80 * GB
)


def found(need, devices, config=AUTO, **changes):
    """(data, fsdp, seq, tensor), rollout_tensor, reason."""
    config, reason = choose(config, devices, dataclasses.replace(need, **changes))
    assert axis_sizes(config, devices) == config.sizes
    assert "\n" not in reason and all(f"{axis}={size}" for axis, size in zip(AXES, config.sizes))
    return config.sizes, config.rollout_tensor, reason


def test_bytes_by_hand():
    assert state_bytes(AUTO, LARGE) == 140 * GB  # 16 + 4 bytes each
    assert state_bytes(dataclasses.replace(AUTO, offload="optimizer"), LARGE) == 84 * GB
    assert state_bytes(dataclasses.replace(AUTO, offload="both"), LARGE) == 70 * GB
    assert row_bytes(HALF) == 2048 * 2 * 900 * 56


@pytest.mark.parametrize(
    "need, devices, changes, sizes, rollout_tensor, because",
    [
        (HALF, 1, {}, (1, 1, 1, 1), 1, "1 device"),
        (HALF, 8, {}, (8, 1, 1, 1), 1, "10.0 GB"),  # 10 of 0.6 x 80 GB: nothing to split
        (LARGE, 8, {"memory": None}, (8, 1, 1, 1), 1, "memory is unknown"),
        (LARGE, 8, {}, (2, 4, 1, 1), 1, "35.0 of a device's 80.0 GB"),  # 140 / 48 = 2.9; 14 GB of weights within 24
        (LARGE, 8, {"memory": 16 * GB}, (1, 8, 1, 1), 4, "too much"),  # 140 / 9.6 = 14.6; 14 / 4.8 = 2.9
        (LARGE, 8, {"longest": 2**17}, (1, 1, 8, 1), 1, "a row of 131072 tokens takes 68.7 GB"),  # 68.7 / 16 = 4.3
        (LARGE, 8, {"rows": 4}, (2, 2, 1, 2), 1, "4 rows of a micro-batch feed 4 devices"),
        (LARGE, 8, {"rows": 4, "kv_heads": 1}, (2, 2, 2, 1), 1, "4 rows"),  # tensor would repeat the one kv head
        (LARGE, 8, {"rows": 4, "kv_heads": 1, "longest": 200}, (2, 2, 1, 2), 1, "4 rows"),  # 100 tokens are too few
        (HALF, 6, {"rows": 96, "sampled": 96}, (6, 1, 1, 1), 1, "6 devices"),
        (HALF, 6, {"rows": 64}, (2, 1, 3, 1), 3, "64 rows"),  # 64 rows, and 128 sampled, over 2; 2 kv heads not over 3
    ],
)
def test_choice_by_hand(need, devices, changes, sizes, rollout_tensor, because):
    *chosen, reason = found(need, devices, **changes)
    assert chosen == [sizes, rollout_tensor] and because in reason, reason


def test_what_is_given_stays():
    assert found(LARGE, 8, MeshConfig(0, 0, 0, 4, 0, 0, "none"))[0] == (2, 1, 1, 4)
    assert found(LARGE, 8, MeshConfig(0, 2, 0, 0, 2, 0, "none"))[:2] == ((2, 2, 1, 2), 2)
    assert found(LARGE, 8, MeshConfig(0, 0, 0, 0, 0, 4, "none"))[0] == (1, 4, 1, 1)  # four devices train
    assert found(LARGE, 8, MeshConfig(0, 0, 0, 0, 0, 0, "both"))[0] == (4, 2, 1, 1)  # 70 / 48 = 1.5


@pytest.mark.parametrize(
    "given, sizes",
    [
        ((0, -1, 0, 0), (1, 8, 1, 1)),
        ((0, 0, 0, -1), (1, 1, 1, 8)),
        ((-1, 2, 0, 0), (4, 2, 1, 1)),
        ((2, -1, 0, 2), (2, 2, 1, 2)),
    ],
)
def test_one_axis_takes_what_the_given_ones_leave(given, sizes):
    assert found(HALF, 8, MeshConfig(*given, 0, 0, "none"))[0] == sizes  # which alone would be (8, 1, 1, 1)
    assert found(HALF, 12, MeshConfig(*given, 0, 4, "none"))[0] == sizes  # four sample, whatever tensor is


def test_impossible_sizes_are_one_line():
    with pytest.raises(ValueError, match=r"mesh data=-1, fsdp=-1, seq=1, tensor=1: .* at most one may be -1"):
        possible(MeshConfig(-1, -1, 0, 0, 0, 0, "none"), 8, 64)
    with pytest.raises(ValueError, match="mesh data=1, fsdp=-1, seq=1, tensor=3 does not fit 8 devices"):
        possible(MeshConfig(0, -1, 0, 3, 0, 0, "none"), 8, 64)
    with pytest.raises(ValueError, match="mesh data=1, fsdp=8, seq=1, tensor=1 on 8 devices: the 6 rows"):
        possible(MeshConfig(0, -1, 0, 0, 0, 0, "none"), 8, 6)
    with pytest.raises(ValueError, match="mesh tensor=3 does not fit 8 devices"):
        possible(MeshConfig(0, 0, 0, 3, 0, 0, "none"), 8, 64)
    with pytest.raises(ValueError, match="the 6 rows of a micro-batch are not divisible"):
        possible(MeshConfig(4, 0, 0, 0, 0, 0, "none"), 8, 6)
    with pytest.raises(ValueError, match="rollout_devices=8: must be 0"):
        possible(MeshConfig(0, 0, 0, 0, 0, 8, "none"), 8, 64)
    with pytest.raises(ValueError, match="rollout_tensor=3: 3 must divide"):
        axis_sizes(MeshConfig(8, 1, 1, 1, 3, 0, "none"), 8)
    with pytest.raises(ValueError, match="data=0, fsdp=8"):
        axis_sizes(MeshConfig(0, 8, 1, 1, 0, 0, "none"), 8)
