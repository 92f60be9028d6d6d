"""`python -m infinite_jax.plan`: reading programs, the chip table, arithmetic by hand, refusals; and compiled."""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from configs import cli
from configs.schema import override
from infinite_jax import plan
from infinite_jax.placement import abstract_train_state
from infinite_jax.planning import chips, collectives, counts, fit, hlo, memory, programs, roofline, table
from infinite_jax.planning.chips import CHIPS, GIB, Chip
from infinite_jax.types import learning
from models import shapes, source
from sharding.mesh import AXES

ROOT = Path(__file__).resolve().parent.parent
# Forms that the compilers write, TPU (libtpu 0.0.42) and GPU, with numbers small enough to count by hand.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%sliced (p0: bf16[3,16,8], p1: s32[]) -> bf16[16,8] {
  %p0 = bf16[3,16,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,16,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,16,8}
  ROOT %seen = bf16[16,8]{1,0} bitcast(%slice.1)
}

%begin (q0: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %q0 = bf16[4,8]{1,0} parameter(0)
  %started = bf16[16,8]{1,0} all-gather(%q0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %pair = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) tuple(%q0, %started)
}

%along (a0: bf16[4,8], a1: bf16[16,8], a2: bf16[2,16]) -> (bf16[16,8], bf16[2,8]) {
  %a0 = bf16[4,8]{1,0} parameter(0)
  %a1 = bf16[16,8]{1,0} parameter(1)
  %a2 = bf16[2,16]{1,0} parameter(2)
  %carried = bf16[16,8]{1,0} all-gather(%a0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %made = bf16[2,8]{1,0} convolution(%a2, %a1), dim_labels=bf_io->bf
  ROOT %both = (bf16[16,8]{1,0}, bf16[2,8]{1,0}) tuple(%carried, %made)
}

%finish (b0: bf16[16,8]) -> bf16[16,8] {
  %b0 = bf16[16,8]{1,0} parameter(0)
  %over = bf16[16,8]{1,0} all-gather(%b0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,8]{1,0} custom-call(%over), custom_call_target="AsyncCollectiveDone"
}

%body (loop: (s32[], f32[2,16], bf16[3,16,8])) -> (s32[], f32[2,16], bf16[3,16,8]) {
  %loop = (s32[], f32[2,16]{1,0:T(8,128)S(1)}, /*index=2*/bf16[3,16,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %rows = f32[2,16]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %stack = bf16[3,16,8]{2,1,0} get-tuple-element(%loop), index=2
  %weight = bf16[16,8]{1,0:S(1)} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %product = f32[2,8]{1,0:S(1)} dot(%rows, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %total = f32[2,8]{1,0:S(1)} all-reduce(%product), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %sent = (f32[2,8]{1,0:S(1)}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%total), channel_id=2, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %busy = f32[2,8]{1,0:S(1)} dot(%rows, %weight), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %got = f32[2,8]{1,0} collective-permute-done(%sent)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %again = (s32[], f32[2,16]{1,0:S(1)}, bf16[3,16,8]{2,1,0}) tuple(%next, %rows, %stack)
}

%more (state: (s32[], f32[2,16], bf16[3,16,8])) -> pred[] {
  %state = (s32[], f32[2,16]{1,0}, bf16[3,16,8]{2,1,0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %most = s32[] constant(3)
  ROOT %less = pred[] compare(%number, %most), direction=LT
}

ENTRY %main (w: bf16[3,16,8], r: f32[2,16], s: bf16[4,8], t: bf16[2,16]) -> f32[2,16] {
  %w = bf16[3,16,8]{2,1,0} parameter(0)
  %r = f32[2,16]{1,0} parameter(1)
  %s = bf16[4,8]{1,0} parameter(2)
  %t = bf16[2,16]{1,0} parameter(3)
  %start.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0:S(1)}) fusion(%s), kind=kCustom, calls=%begin
  %partly = bf16[16,8]{1,0:S(1)} get-tuple-element(%start.1), index=1
  %chained = (bf16[16,8]{1,0:S(1)}, bf16[2,8]{1,0:S(1)}) fusion(%s, %partly, %t), kind=kOutput, calls=%along
  %nearly = bf16[16,8]{1,0:S(1)} get-tuple-element(%chained), index=0
  %whole = bf16[16,8]{1,0:S(1)} fusion(%nearly), kind=kCustom, calls=%finish
  %vmem = (f32[2,16]{1,0}, f32[2,16]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%r)
  %there = f32[2,16]{1,0:S(1)} copy-done(%vmem)
  %none = s32[] constant(0)
  %init = (s32[], f32[2,16]{1,0:S(1)}, bf16[3,16,8]{2,1,0}) tuple(%none, %there, %w)
  %while.1 = (s32[], f32[2,16]{1,0:S(1)}, bf16[3,16,8]{2,1,0}) while(%init), condition=%more, body=%body
  ROOT %out = f32[2,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def mesh_of(**sizes) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 4)


def setting(*keys: str):
    sizes = [f"mesh.{axis}=1" for axis in (*AXES, "rollout_tensor")]
    return override(cli.compose_config("config", None, ["model=qwen2_5_0_5b"]), [*sizes, *keys])


# --- reading programs ---


def test_operations_are_counted_by_hand_with_loops_multiplied_out():
    found = counts.count(TEXT, 8)
    # in the loop, 3 times, two products of [2, 16] with [16, 8]; outside one convolution of the same size
    assert found.flops == 3 * 2 * (2 * 2 * 16 * 8) + 2 * 2 * 16 * 8
    assert found.unknown_loops == found.silent_calls == 0


def test_bytes_of_hbm_are_counted_by_hand():
    """Slices count by what they touch, arrays in S(1) not at all."""
    in_loop = 16 * 8 * 2 + 2 * 8 * 4  # the slice of the weights; the permute's destination, all else in VMEM
    chain = 4 * 8 * 2 + 2 * 16 * 2  # the shard that is gathered, the rows it is multiplied with
    moved_in = 2 * 16 * 4
    assert counts.count(TEXT, 8).bytes == 3 * in_loop + chain + moved_in


def test_collectives_have_their_bytes_their_groups_and_what_hides_them():
    found = {each.op: each for each in counts.count(TEXT, 8).collectives}
    assert set(found) == {"all-gather", "all-reduce", "collective-permute"}
    gather, reduce, permute = (found[op] for op in ("all-gather", "all-reduce", "collective-permute"))
    assert (gather.times, gather.sent) == (1, 16 * 8 * 2 * 3 / 4)  # a chain of three fusions is one
    assert (reduce.times, reduce.sent) == (3, 3 * 2 * (2 * 8 * 4) * 3 / 4)
    assert (permute.times, permute.sent) == (3, 3 * 2 * 8 * 4)
    assert [each.asynchronous for each in (gather, reduce, permute)] == [True, False, True]
    assert [each.overlaps for each in (gather, reduce, permute)] == [True, False, True]
    idle = re.sub(r"  %busy = .*\n", "", TEXT)
    permute = next(each for each in counts.count(idle, 8).collectives if each.op == "collective-permute")
    assert permute.asynchronous and not permute.overlaps
    mesh = Mesh(np.array([jax.devices()[0]] * 8).reshape(1, 2, 1, 4), AXES)
    assert table.over(gather.groups, mesh) == "tensor 4" and table.over(permute.groups, mesh) == "fsdp 2"


@pytest.mark.parametrize(
    ("written", "first", "shape"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2], (2, 2)),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3], (2, 4)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], (4, 2)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3], (2, 4)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 1, 2, 3], (2, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2], (4, 2)),
        ("replica_groups={}", list(range(8)), (1, 8)),
    ],
)
def test_every_way_to_write_groups_is_read(written, first, shape):
    instruction = hlo.Instruction("x", "all-reduce", (), (), "", f", channel_id=1, {written}, to_apply=%add", False)
    found = hlo.groups(instruction, 8)
    assert found[0].tolist() == first and found.shape == shape


def test_convolutions_of_the_tpu_compiler_are_matrix_products():
    """[512, 1536] x [1536, 2, 8, 128] written with two spatial dimensions in padding: one pair meets at each place."""
    text = """ENTRY %main (a: bf16[512,1536,1,1], b: bf16[1536,2,8,128]) -> bf16[512,2,8,128] {
  %a = bf16[512,1536,1,1]{1,0,3,2} parameter(0)
  %b = bf16[1536,2,8,128]{0,3,2,1} parameter(1)
  ROOT %c = bf16[512,2,8,128]{0,3,2,1} convolution(%a, %b), window={size=2x8 pad=1_1x7_7 rhs_reversal=1x1}, dim_labels=bf01_i01o->b01f
}
"""  # noqa: E501
    assert counts.count(text, 1).flops == 2 * 512 * 1536 * 2 * 8 * 128


def test_kernels_state_their_work_or_are_reported():
    text = """ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %k = bf16[8,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":{"flops":"12345","transcendentals":"5","bytes_accessed":"777"}}}
}
"""  # noqa: E501
    assert counts.count(text, 1)[:2] == (12345.0, 777.0) and counts.count(text, 1).silent_calls == 0
    silent = counts.count(re.sub(r',"cost_estimate":{[^}]*}', "", text), 1)
    assert silent.flops == 0 and silent.bytes == 2 * 8 * 16 * 2 and silent.silent_calls == 1


def test_a_compiled_loop_is_counted_whole():
    """A real program of this machine's compiler: 5 times [8, 16] x [16, 16]."""

    def step(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    found = counts.count(jax.jit(step).lower(*shapes).compile().as_text(), 1)
    assert found.flops == 5 * 2 * 8 * 16 * 16 and found.collectives == [] and found.unknown_loops == 0


def test_of_branches_the_dearest_counts():
    def step(x, w, which):
        return jax.lax.cond(which, lambda: x @ w, lambda: jnp.pad(x[:8] @ w, ((0, 24), (0, 0))))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 64), (64, 64))]
    text = jax.jit(step).lower(*shapes, jax.ShapeDtypeStruct((), bool)).compile().as_text()
    assert "conditional(" in text and counts.count(text, 1).flops == 2 * 32 * 64 * 64


def test_what_a_refused_program_asked_for_is_read():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.04G) exceeds"
    )
    assert programs.asked_for(text) == int(22.04 * 2**30)
    assert programs.asked_for("RESOURCE_EXHAUSTED: Used 512.5M of 15.75G hbm") == int(512.5 * 2**20)
    assert programs.asked_for("INTERNAL: something else (22.04G)") is None


# --- what chips offer ---


def test_chip_table_is_the_makers():
    """bf16 flop/s, GiB of HBM, its bandwidth, and that of all links of a chip, both directions, as published."""
    published = {
        "v4": (275e12, 32, 1200e9, 600e9), "v5e": (197e12, 16, 819e9, 400e9), "v5p": (459e12, 95, 2765e9, 1200e9),
        "v6e": (918e12, 32, 1638e9, 800e9), "tpu7x": (2307e12 / 2, 192 / 2, 7380e9 / 2, 1200e9 / 2),
    }  # fmt: skip
    table = {chip.name: chip for chip in CHIPS}
    for name, (flops, gib, bandwidth, links) in published.items():
        chip = table[name]
        found = (chip.flops, chip.hbm / GIB, chip.bandwidth, chip.link * 2 * chip.torus * 2)
        assert found == (flops, gib, bandwidth, links), name
        assert 0.9 < chip.usable / chip.hbm < 1.01
    assert table["H100"].flops == table["H200"].flops == 989e12 and table["H200"].bandwidth == 4.8e12


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5e:4x4x4", "2 sizes"),
        ("v5litepod:4x4", "v4, v5e"),
        ("v5p:4x4", "3 sizes"),
        ("v5e", "2 sizes"),
        ("h100:8", "v4, "),
    ],
)
def test_unknown_topologies_are_refused_in_one_line(capsys, topology, words):
    with pytest.raises(SystemExit) as raised:
        plan.main([f"topology={topology}"])
    error = capsys.readouterr().err
    assert raised.value.code == cli.BAD_INPUT and error.count("\n") == 1 and topology in error and words in error


def test_a_group_sends_over_the_dimensions_it_spans():
    class Device:
        def __init__(self, *coords):
            self.coords = coords

    v5p = next(chip for chip in CHIPS if chip.name == "v5p")
    line, plane = [Device(i, 0, 0) for i in range(4)], [Device(i, j, 0) for i in range(2) for j in range(2)]
    assert chips.outgoing(v5p, line) == 2 * 100e9 and chips.outgoing(v5p, plane) == 4 * 100e9
    assert chips.outgoing(v5p, line, neighbours=True) == 100e9
    h100 = next(chip for chip in CHIPS if chip.name == "H100")
    assert chips.outgoing(h100, line) == 450e9


def test_larger_topologies_are_the_chips_own_first():
    v5e = next(chip for chip in CHIPS if chip.name == "v5e")
    found = chips.larger(v5e, 64)
    assert found[:2] == ["v5e:8x16", "v5e:16x16"] and found[2].startswith(("v4:", "v6e:", "v5p:", "tpu7x:"))


# --- arithmetic ---


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2_5_0_5b", 494_032_768), ("qwen2_5_1_5b", 1_543_714_304), ("qwen3_0_6b", 596_049_920),
        ("llama3_8b", 8_030_261_248), ("qwen2_5_72b", 72_706_203_648),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    config = cli.compose_config("config", None, [f"model={name}"])
    assert memory.num_parameters(source.network(config.model)) == parameters


def test_every_shape_has_a_config():
    files = {file.stem for file in (ROOT / "configs/model").glob("*.yaml")}
    assert set(shapes.names()) <= files


def test_a_step_of_a_small_network_by_hand():
    """Widths 4 heads x 2, 2 kv heads, E 8, F 16, V 32, 3 layers; 2 prompts of 3 tokens, 2 samples of 2 each."""
    decoder = dataclasses.replace(
        source.network(setting().model), embed_dim=8, mlp_dim=16, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=2, vocab_size=32, windows=(0, 0, 0),
    )  # fmt: skip
    layer = 8 * (4 + 2 + 2) * 2 + 4 * 2 * 8 + 3 * 8 * 16
    assert roofline.layer_weights(decoder) == layer
    assert roofline.pairs(0, 3, 0) == 1 + 2 + 3 and roofline.pairs(3, 2, 0) == 4 + 5 and roofline.pairs(3, 2, 2) == 4
    config = setting(
        "algorithm.prompts=2", "algorithm.group_size=2", "algorithm.prompt_buckets=[3]", "algorithm.max_new_tokens=2"
    ).algorithm
    prompt = 2 * 3 * 3 * layer + 3 * 4 * 4 * 2 * 6
    completion = 2 * 2 * (3 * layer + 8 * 32) + 3 * 4 * 4 * 2 * 9
    work = roofline.rollout_work(decoder, config)
    assert work == (2 * prompt + 4 * completion, 2 * 3 + 4 * 2)
    assert roofline.train_work(decoder, config).flops == 3 * work.flops
    # a window of one token: each sees itself alone
    local = dataclasses.replace(decoder, windows=(1, 1, 1))
    assert roofline.forward_flops(decoder, 0, 3, False) - roofline.forward_flops(local, 0, 3, False) == 3 * 32 * 3


def test_the_roofline_takes_the_slowest_part_and_the_exposed_ones_on_top():
    chip = Chip("x", "X", 1.0, 1.0, flops=100.0, bandwidth=10.0, link=5.0, torus=0, shapes=())
    both = np.array([[0, 1]])
    hidden = collectives.Collective("all-gather", both, 40, 2, 0, True, True)  # 40 bytes sent
    exposed = collectives.Collective("all-reduce", both, 10, 1, 0, False, False)  # 10 bytes
    found = roofline.roofline(chip, counts.Counts(300.0, 50.0, [hidden, exposed], 0, 0), [None, None])
    assert (found.compute, found.hbm, found.links, found.exposed) == (3.0, 5.0, 10.0, 2.0)
    assert (found.bound, found.by, found.scheduled) == (10.0, "links", 10.0)
    assert roofline.mfu(chip, roofline.Work(500.0, 0), 2, 10.0) == 0.25


def test_state_on_a_device_by_hand():
    """Qwen2.5-0.5B on fsdp 4: matrices and embedding split by 4, norms and biases whole; AdamW twice the parameters."""
    config = setting("mesh.fsdp=4", "mesh.rollout_tensor=1")
    decoder = dataclasses.replace(source.network(config.model), dtype="bfloat16")
    whole = 24 * (2 * 896 + 2 * 9 * 64) + 896  # two norms and the bias of 2 x (7 + 2) x 64 a layer, the last norm
    split = (494_032_768 - whole) // 4
    found = memory.resident(config, decoder, mesh_of(fsdp=4))
    assert found.parameters == 4 * (split + whole)
    assert found.optimizer == 2 * found.parameters + 4  # and a counter
    norms = 24 * 2 * 896 + 896
    assert found.reference == 2 * (split + whole) + 2 * norms  # bfloat16, norms as they are
    assert memory.resident(setting("mesh.fsdp=4", "algorithm.kl_type=none"), decoder, mesh_of(fsdp=4)).reference == 0


@pytest.mark.parametrize(
    "offload, critic", [("none", "none"), ("optimizer", "none"), ("both", "head"), ("both", "network")]
)
def test_state_is_that_of_training(offload, critic):
    """Two kv heads on tensor 4 stay whole; so do norms and biases."""
    judged = [] if critic == "none" else ["algorithm.advantage=gae", f"algorithm.critic={critic}"]
    config = setting("mesh.fsdp=2", "mesh.tensor=4", f"mesh.offload={offload}", *judged)
    decoder, mesh = dataclasses.replace(source.network(config.model), dtype="bfloat16"), mesh_of(fsdp=2, tensor=4)
    state = abstract_train_state(config.algorithm, decoder, mesh, offload)

    def held(tree, kind):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == "pinned_host") == kind]
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    found = memory.resident(config, decoder, mesh)
    both = learning(state), (state.opt_state, state.critic and state.critic.opt_state)
    assert (found.parameters, found.optimizer) == tuple(held(tree, False) for tree in both)
    copied = memory.cast_weights(decoder, mesh)
    assert found.host == held(both[1], True) + copied * (offload == "both")
    assert found.reference == copied * (offload != "both")


def test_keys_and_values_by_hand():
    """16 prompts x 8 samples over 4 devices: 4 prompts and 32 completions a device, bfloat16, 2 kv heads x 64."""
    config = setting("mesh.fsdp=4", "algorithm.prompt_buckets=[128]", "algorithm.max_new_tokens=32")
    decoder = dataclasses.replace(source.network(config.model), dtype="bfloat16")
    assert memory.kv_cache(config, decoder) == 2 * 2 * 24 * 2 * 64 * (4 * 128 + 32 * 32)


def test_two_compilations_give_both_factors_and_one_scales_alike():
    points = [((10.0, 4.0), 3 * 10 + 2 * 4), ((10.0, 8.0), 3 * 10 + 2 * 8)]
    assert memory.calibrate(points) == pytest.approx((3.0, 2.0))
    assert memory.calibrate(points[:1]) == (38 / 14, 38 / 14)
    assert memory.calibrate([((10.0, 4.0), 38.0), ((10.0, 8.0), 20.0)]) == (38 / 14, 38 / 14)  # less with more: noise


def test_the_largest_that_fits_is_the_last_power_of_two(monkeypatch):
    config = setting("algorithm.prompts=4", "algorithm.prompt_buckets=[16]", "algorithm.max_new_tokens=16")
    decoder = source.network(config.model)

    def linear(config, decoder, calibration):
        rows = config.algorithm.prompts * (config.algorithm.prompt_buckets[-1] + config.algorithm.max_new_tokens)
        return memory.Total(rows, 1)

    monkeypatch.setattr(memory, "total", linear)
    found = fit.fitting(fit.batches(config), decoder, memory.Calibration(), 4 * 32 * 9)
    assert [each.algorithm.prompts for each in found] == [32, 16, 8]
    found = fit.fitting(fit.contexts(config, 200), decoder, memory.Calibration(), 4 * 32 * 9)
    assert [each.algorithm.max_new_tokens for each in found] == [64, 32]  # 256 tokens a row are more than 200


def test_changes_come_in_the_order_of_their_cost():
    config = setting("mesh.data=4", "model.remat=dots", "algorithm.prompts=4")
    v5e = next(chip for chip in CHIPS if chip.name == "v5e")
    decoder = source.network(config.model)
    given = fit.remedies(config, memory.num_parameters(decoder), "v5e:2x2", v5e, 4, plan.chooser(decoder))
    found = [each.keys for each in itertools.takewhile(lambda each: each.topology == "v5e:2x2", given)]
    assert found[:2] == [("mesh.data=2", "mesh.fsdp=2"), ("mesh.data=1", "mesh.fsdp=4")]
    assert found[2:5] == [("algorithm.microbatches=2",), ("algorithm.microbatches=4",), ("model.remat=full",)]
    assert found[5:8] == [(f"mesh.offload={choice}",) for choice in ("reference", "optimizer", "both")]
    assert ("mesh.data=1", "mesh.fsdp=4", "algorithm.microbatches=4", "model.remat=full", "mesh.offload=both") in found


# --- refusals ---


def test_a_state_that_does_not_fit_is_refused_before_anything_is_compiled(capsys, monkeypatch):
    monkeypatch.setattr(programs, "compile_update", None)  # calling it would raise
    assert plan.main(["topology=v5e:1x1", "model=qwen2_5_72b"]) == cli.FAILED
    text = capsys.readouterr().out
    assert "72,706,203,648 parameters" in text
    state = 72_706_203_648 * 14 / 2**30  # float32 parameters and moments, bfloat16 reference
    taken = float(re.search(r"the state alone takes ([\d.]+) of 15.75 GiB", text).group(1))
    assert taken == pytest.approx(state, rel=1e-3)
    assert re.search(r"cheapest change: topology=\S+ .*mesh\.fsdp=\d+.* by the memory model", text)


def test_a_shape_trains_from_random_weights_only_when_asked():
    with pytest.raises(ValueError, match=r"a shape has no weights.*random:qwen2_5_0_5b"):
        source.load(setting().model)


def test_random_weights_are_of_the_networks_own_start(monkeypatch, tmp_path):
    (tmp_path / "small.json").write_text(
        '{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, '
        '"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true}'
    )
    monkeypatch.setattr(shapes, "FOLDER", tmp_path)
    config = dataclasses.replace(setting().model, path="random:small")
    decoder, params = source.load(config)
    assert decoder.num_layers == 2 and params["embed"].shape == (64, 16) and params["embed"].dtype == jnp.float32
    assert float(jnp.std(params["embed"])) == pytest.approx(0.02, rel=0.1)
    assert source.network(config) == decoder and source.resolve(config.path) == source.resolve("tiny")


# --- compiled for real topologies ---

SLICES = [(model, topology) for model in ("qwen2_5_1_5b", "llama3_8b") for topology in ("v5e:16x16", "v5p:4x4x4")]
BATCH = ["algorithm.prompts=256", "algorithm.prompt_buckets=[512]", "algorithm.max_new_tokens=512"]


def planned(*arguments: str) -> tuple[int, str]:
    """Exit code and text of the verb, in a process of its own."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler here: pip install 'jax[tpu]'")
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, "-m", "infinite_jax.plan", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, ran.stdout


def cells(text: str, name: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [float(cell.rstrip("%")) for cell in line[table.FIRST :].replace(",", "").split()]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "topology"), SLICES)
def test_a_step_compiled_for_a_slice(model, topology):
    code, text = planned(f"topology={topology}", f"model={model}", "search=false", *BATCH)
    assert code == 0 and "fits:" in text, text
    assert "collectives of the update" in text and re.search(r"all-(gather|reduce) over", text)  # by the mesh chosen
    model_flops, compiled = cells(text, "model, Tflop"), cells(text, "compiled, Tflop")
    for least, found in zip(model_flops, compiled):
        assert 0.95 * least < found < 3 * least
    assert all(0 < share <= 100 for share in cells(text, "MFU at most"))
    parameters, optimizer = cells(text, "parameters")[0], cells(text, "optimizer")[0]
    assert optimizer == pytest.approx(2 * parameters, abs=0.02)


@pytest.mark.slow
def test_the_largest_batch_and_context_are_compiled():
    keys = ["algorithm.prompts=4", "algorithm.prompt_buckets=[256]", "algorithm.max_new_tokens=256"]
    code, text = planned("topology=v5e:2x2", "model=qwen2_5_0_5b", *keys)
    assert code == 0
    prompts = int(re.search(r"largest batch: (\d+) prompts x 8 samples, compiled, ([\d.]+) GiB", text).group(1))
    assert prompts > 4 and prompts & (prompts - 1) == 0
    width, new = map(int, re.search(r"largest context: (\d+) \+ (\d+) tokens, compiled", text).groups())
    assert width == new and width > 256


@pytest.mark.slow
def test_what_does_not_fit_is_told_the_cheapest_change_that_would():
    """The state fits, the batch does not: parameters split over more devices make room, and that is compiled."""
    sizes = ["mesh.data=4", "mesh.fsdp=1", "mesh.seq=1", "mesh.tensor=1", "mesh.rollout_tensor=1"]
    keys = ["algorithm.prompts=64", "algorithm.prompt_buckets=[512]", "algorithm.max_new_tokens=512"]
    code, text = planned("topology=v5e:2x2", "model=qwen2_5_0_5b", *sizes, *keys)
    assert code == 1
    needed = float(re.search(r"does not fit: ([\d.]+) of 15.75 GiB", text).group(1))
    found = re.search(r"cheapest change: (mesh|algorithm)\.\S+=\d+.*: ([\d.]+) of 15.75 GiB, compiled", text)
    assert needed > 15.75 > float(found.group(2)), text
