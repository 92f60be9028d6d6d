"""Which kernel computes attention where, and that docs/kernels.md says the same."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from kernels import select
from kernels.select import choose

DEVICES = {  # a column of the page's table: jax's platform and device_kind
    "CPU": ("cpu", "cpu"),
    "TPU": ("tpu", "TPU v5 lite"),
    "T4": ("gpu", "Tesla T4"),
    "L4": ("gpu", "NVIDIA L4"),
    "A100": ("gpu", "NVIDIA A100-SXM4-40GB"),
    "H100": ("gpu", "NVIDIA H100 80GB HBM3"),
}
HALF = {"head_dim": 64, "dtype": jnp.bfloat16}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"


def auto(device, windows=False, packed=False, **changed):
    return choose("auto", *DEVICES[device], windows=windows, packed=packed, **HALF | changed)


def test_auto_takes_the_fastest_that_can():
    assert [auto(device) for device in DEVICES] == ["xla", "tpu", "xla", "cudnn", "cudnn", "cudnn"]
    for rows in ({"packed": True}, {"windows": True}):
        assert [auto(device, **rows) for device in DEVICES] == ["xla", "tpu", "xla", "xla", "xla", "mgpu"]
    assert auto("H100", head_dim=256, windows=True) == auto("A100", head_dim=128, packed=True) == "xla"
    assert auto("H100", dtype="float32") == auto("A100", head_dim=256) == auto("H100", head_dim=36) == "xla"
    assert auto("H100", head_dim=256) == auto("H100", dtype=jnp.float16) == "cudnn"
    assert auto("TPU", dtype="float16") == "xla"


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("NVIDIA H200", "Hopper"),
        ("NVIDIA GH200 480GB", "Hopper"),
        ("NVIDIA H100 NVL", "Hopper"),
        ("NVIDIA B200", "Blackwell"),
        ("NVIDIA GB200", "Blackwell"),
        ("NVIDIA A10G", "Ampere"),
        ("NVIDIA GeForce RTX 3090 Ti", "Ampere"),
        ("NVIDIA RTX A6000", "Ampere"),
        ("NVIDIA GeForce RTX 4090", "Ada"),
        ("NVIDIA RTX 6000 Ada Generation", "Ada"),
        ("NVIDIA L40S", "Ada"),
        ("Quadro RTX 6000", "other GPU"),
        ("Quadro RTX 5000", "other GPU"),
        ("Tesla V100-SXM2-16GB", "other GPU"),
        ("AMD Instinct MI300X", "other GPU"),
        ("NVIDIA H1000", "other GPU"),
    ],
)
def test_cards_are_known_by_name(kind, expected):
    assert select.architecture("gpu", kind) == expected


def test_a_named_kernel_is_taken_where_it_can():
    for name, device in (("xla", "H100"), ("mgpu", "H100"), ("cudnn", "L4"), ("tpu", "TPU"), ("xla", "TPU")):
        assert choose(name, *DEVICES[device], windows=False, packed=False, **HALF) == name
    assert choose("mgpu", *DEVICES["H100"], windows=True, packed=True, **HALF) == "mgpu"


@pytest.mark.parametrize(
    "name, device, changed, message",
    [
        ("tpu", "CPU", {}, "on cpu: it runs on TPU only: set model.attention=auto, which takes xla"),
        ("cudnn", "T4", {}, "on Tesla T4: it runs on Ampere, Ada, Hopper, Blackwell only"),
        ("mgpu", "A100", {}, "it runs on Hopper only: set model.attention=auto, which takes cudnn"),
        ("cudnn", "H100", {"packed": True}, "it has no packed rows: "),
        ("cudnn", "H100", {"packed": True, "windows": True}, "it has no packed rows and no sliding windows: "),
        ("cudnn", "H100", {"dtype": "float32"}, "it computes in bfloat16 or float16, not in float32"),
        ("cudnn", "A100", {"head_dim": 256}, "its head dimension is a multiple of 8 up to 128, not 256"),
        ("mgpu", "H100", {"head_dim": 80}, "its head dimension is 64 or 128, not 80"),
        ("flash", "CPU", {}, "model.attention=flash: it is auto, xla, tpu, cudnn or mgpu"),
    ],
)
def test_a_name_that_cannot_is_refused_in_a_line_with_the_remedy(name, device, changed, message):
    with pytest.raises(ValueError) as error:
        choose(name, *DEVICES[device], **{"windows": False, "packed": False} | HALF | changed)
    assert message in str(error.value) and f"model.attention={name}" in str(error.value)
    assert "\n" not in str(error.value)


def test_blocks_go_by_their_names():
    assert select.block("xla").name == "xla"


def test_the_page_says_for_every_device_and_kind_of_rows_what_happens():
    lines = PAGE.read_text().split("| kernel | rows |")[1].split("\n\n")[0].splitlines()
    head, _, *table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert head == list(DEVICES)
    needs = {"whole": {}, "packed": {"packed": True}, "windows": {"windows": True}}
    expected = []
    for kernel in select.KERNELS:
        for rows, need in needs.items():
            cells = []
            for device, place in DEVICES.items():
                try:
                    choose(kernel, *place, **{"windows": False, "packed": False} | HALF | need)
                    cells.append("auto" if auto(device, **need) == kernel else "by name")
                except ValueError:
                    cells.append("no")
            expected.append([kernel, rows, *cells])
    assert table == expected
