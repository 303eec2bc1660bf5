"""Counts read from compiled programs, against programs whose counts are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.parallel import hlo
from rlhf_jax.parallel import mesh as meshes


def test_a_loop_counts_as_often_as_it_runs():
    def repeated(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    text = jax.jit(repeated).lower(jnp.ones((32, 64)), jnp.ones((5, 64, 64))).compile().as_text()
    counts = hlo.count(text)
    assert counts.flops == 5 * 2 * 32 * 64 * 64
    # Each step reads a slice of the weights, not the stack.
    assert 5 * 64 * 64 * 4 < counts.traffic < 5 * 64 * 64 * 4 * 6
    assert counts.collectives == () and counts.unknown_loops == 0


def test_a_loop_of_unknown_length_counts_as_often_as_it_is_said_to_run():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: x @ w, x)

    text = jax.jit(until).lower(jnp.ones((8, 16)), jnp.ones((16, 16))).compile().as_text()
    counts = hlo.count(text, unknown_trips=7)
    assert counts.flops == 7 * 2 * 8 * 16 * 16 and counts.unknown_loops == 1


def test_communication_has_a_kind_a_size_and_a_group():
    mesh = meshes.make_mesh("data:4,fsdp:2")
    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("data", None)))
    w = jax.device_put(jnp.ones((16, 6)), NamedSharding(mesh, P("fsdp", None)))
    summed = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, P()))
    (found,) = hlo.count(summed.lower(x).compile().as_text()).collectives
    assert (found.kind, found.bytes, found.devices, found.times) == ("all-reduce", 16 * 4, 4, 1)
    assert found.wire_bytes == 2 * 3 / 4 * 64
    gather = jax.jit(lambda w: w + 1, out_shardings=NamedSharding(mesh, P()))
    (found,) = hlo.count(gather.lower(w).compile().as_text()).collectives
    assert (found.kind, found.bytes, found.devices) == ("all-gather", 16 * 6 * 4, 2)
    assert found.wire_bytes == 16 * 6 * 4 / 2


TPU_PROGRAM = """HloModule tiny, is_scheduled=true

%fused (param_0.1: bf16[128,64], param_1.2: bf16[4,64,32], param_2: s32[]) -> bf16[128,32] {
  %param_0.1 = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[4,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %slice = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_1.2, %param_2), dynamic_slice_sizes={1,64,32}
  %flat = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %conv = bf16[128,32]{1,0:T(8,128)(2,1)} convolution(%param_0.1, %flat), dim_labels=bf_io->bf
}

ENTRY %main (a: bf16[128,64], b: bf16[4,64,32], i: s32[]) -> bf16[128,256] {
  %a = bf16[128,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %product = bf16[128,32]{1,0:T(8,128)(2,1)} fusion(%a, %b, %i), kind=kOutput, calls=%fused
  %start = (bf16[128,32]{1,0}, bf16[128,256]{1,0}) all-gather-start(%product), replica_groups=[2,8]<=[16]
  ROOT %done = bf16[128,256]{1,0} all-gather-done(%start)
}
"""

TPU_LOOP = """HloModule loop, is_scheduled=true

%scatter (input: f32[128,256]) -> f32[32,256] {
  %input = f32[128,256]{1,0} parameter(0)
  %sum = f32[128,256]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[32,256]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={32,256}
}

%first (x: bf16[16,64]) -> bf16[128,64] {
  %x = bf16[16,64]{1,0} parameter(0)
  ROOT %gather.1 = bf16[128,64]{1,0} all-gather(%x), channel_id=2, CHAINED
}

%second (y: bf16[16,64]) -> bf16[128,64] {
  %y = bf16[16,64]{1,0} parameter(0)
  ROOT %gather.2 = bf16[128,64]{1,0} all-gather(%y), channel_id=2, CHAINED
}

%body (state: (s32[], f32[128,256], bf16[16,64])) -> (s32[], f32[128,256], bf16[16,64]) {
  %state = (s32[], f32[128,256]{1,0}, bf16[16,64]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %gradient = f32[128,256]{1,0} get-tuple-element(%state), index=1
  %weight = bf16[16,64]{1,0} get-tuple-element(%state), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%step, %one)
  %begin = bf16[128,64]{1,0} fusion(%weight), kind=kOutput, calls=%first
  %end = bf16[128,64]{1,0} fusion(%weight), kind=kOutput, calls=%second
  %scattered = f32[32,256]{1,0} fusion(%gradient), kind=kCustom, calls=%scatter
  ROOT %out = (s32[], f32[128,256]{1,0}, bf16[16,64]{1,0}) tuple(%next, %gradient, %weight)
}

%condition (state.1: (s32[], f32[128,256], bf16[16,64])) -> pred[] {
  %state.1 = (s32[], f32[128,256]{1,0}, bf16[16,64]{1,0}) parameter(0)
  %step.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(33)
  ROOT %less = pred[] compare(%step.1, %limit), direction=LT
}

ENTRY %main (g: f32[128,256], w: bf16[16,64]) -> f32[128,256] {
  %g = f32[128,256]{1,0} parameter(0)
  %w = bf16[16,64]{1,0} parameter(1)
  %start = s32[] constant(1)
  %all = (s32[], f32[128,256]{1,0}, bf16[16,64]{1,0}) tuple(%start, %g, %w)
  %loop = (s32[], f32[128,256]{1,0}, bf16[16,64]{1,0}) while(%all), condition=%condition, body=%body
  ROOT %result = f32[128,256]{1,0} get-tuple-element(%loop), index=1
}
""".replace(
    "CHAINED", """replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, frontend_attributes={chain_id="0"}"""
)


def test_what_a_tpu_program_says():
    """Its matrix products are convolutions inside fusions, and its communication starts and ends apart."""
    counts = hlo.count(TPU_PROGRAM)
    assert counts.flops == 2 * 128 * 64 * 32
    (gather,) = counts.collectives
    assert (gather.kind, gather.shape, gather.bytes, gather.devices) == ("all-gather", (128, 256), 65536, 8)
    # One of the four slices is read; the index is small change.
    assert counts.traffic == pytest.approx(2 * (128 * 64 + 64 * 32 + 128 * 32), abs=8)


def test_what_a_tpu_leaves_unsaid():
    """How long a loop is follows from its condition; a sum of which each device keeps a slice is a reduce-scatter; one
    gather that goes on beside two fusions is one."""
    counts = hlo.count(TPU_LOOP, unknown_trips=1000)
    assert counts.unknown_loops == 0
    gather, scatter = sorted(counts.collectives, key=lambda found: found.kind)
    assert (gather.kind, gather.bytes, gather.devices, gather.times) == ("all-gather", 128 * 64 * 2, 8, 32)
    assert (scatter.kind, scatter.bytes, scatter.devices, scatter.times) == (
        "reduce-scatter",
        128 * 256 * 4,
        4,
        32,
    )
    assert scatter.wire_bytes == 32 * 128 * 256 * 4 * 3 / 4


GPU_PROGRAM = """HloModule tiny, is_scheduled=true

ENTRY %main (a: bf16[128,64], b: bf16[64,32]) -> bf16[128,32] {
  %a = bf16[128,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm = (bf16[128,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %out = bf16[128,32]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501


def test_a_gpus_library_call_is_a_matrix_product():
    assert hlo.count(GPU_PROGRAM).flops == 2 * 128 * 64 * 32
