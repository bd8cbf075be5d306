"""Counting in compiled programs: real ones on the CPU, and the notations of other compilers."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sddit_jax.cost import hlo

pytestmark = pytest.mark.usefixtures("uncached")


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_in_nested_loops_count_as_often_as_they_turn():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w), None), x, length=7)[0] @ w

    x, w = jnp.ones((16, 32)), jnp.ones((32, 32))
    assert hlo.matrix_flops(compiled(outer, x, w)) == (5 * 7 + 1) * 2 * 16 * 32 * 32


def test_batched_products():
    text = compiled(lambda a, b: jnp.einsum("bhqc,bhkc->bhqk", a, b), jnp.ones((2, 3, 8, 4)), jnp.ones((2, 3, 16, 4)))
    assert hlo.matrix_flops(text) == 2 * 2 * 3 * 8 * 16 * 4


def convolution(shapes, attributes):
    lhs, rhs, out = shapes
    return f"""HloModule m
ENTRY %main (a: {lhs}, b: {rhs}) -> {out} {{
  %a = {lhs}{{1,0:T(8,128)(2,1)}} parameter(0)
  %b = {rhs}{{1,0}} parameter(1)
  ROOT %c = {out}{{1,0:T(8,128)(2,1)S(1)}} convolution(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize(
    ("shapes", "attributes", "expected"),
    [
        (("bf16[16,32]", "bf16[32,8]", "bf16[16,8]"), "dim_labels=bf_io->bf", 2 * 16 * 32 * 8),
        (("bf16[16,32]", "bf16[8,32]", "bf16[16,8]"), "dim_labels=bf_oi->bf", 2 * 16 * 32 * 8),
        # Batched: 16 x 12 products of [256, 72] and [72, 64], as a convolution whose window meets one pair at a time.
        (
            ("bf16[16,256,12,72]", "bf16[16,64,12,72]", "bf16[16,12,256,64]"),
            "window={size=16x12 stride=15x11 lhs_dilate=16x12}, dim_labels=0b1f_0o1i->01bf",
            2 * 16 * 12 * 256 * 64 * 72,
        ),
        # One of [16, 32] with six of [32, 8], by padding: of 11 places only one of each six is inside.
        (
            ("bf16[16,1,32]", "bf16[32,6,8]", "bf16[16,6,8]"),
            "window={size=6 pad=5_5 rhs_reversal=1}, dim_labels=b0f_i0o->b0f",
            2 * 16 * 32 * 8 * 6,
        ),
        # A true one, 3x3 with same padding on 8x8: of 9 * 64 places (3 * 8 - 2)^2 are inside.
        (
            ("f32[2,8,8,4]", "f32[3,3,4,5]", "f32[2,8,8,5]"),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * 5 * 4 * 22**2,
        ),
    ],
)
def test_convolutions_count_only_what_is_there(shapes, attributes, expected):
    assert hlo.matrix_flops(convolution(shapes, attributes)) == expected


def test_collectives_on_eight_devices():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)

    def body(x):  # [8, 128] float32 on each device: 4 KiB
        x = jax.lax.scan(lambda x, _: (jnp.tanh(jax.lax.psum(x, "b")), None), x, length=3)[0]
        gathered = jax.lax.all_gather(x, "a", tiled=True)
        scattered = jax.lax.psum_scatter(gathered * 2, "b", tiled=True)
        exchanged = jax.lax.all_to_all(scattered, "a", 1, 0, tiled=True)
        return jax.lax.ppermute(exchanged, "b", [(i, (i + 1) % 4) for i in range(4)])

    step = jax.shard_map(body, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
    found = {c.kind: c for c in hlo.collectives(compiled(step, jnp.ones((64, 128))))}
    kib = {kind: (c.bytes / 1024, c.times) for kind, c in found.items()}
    assert kib == {
        "all-reduce": (2 * 4 * 3 / 4, 3),
        "all-gather": (8 / 2, 1),
        "reduce-scatter": (8 * 3 / 4, 1),
        "all-to-all": (2 / 2, 1),
        "collective-permute": (2, 1),
    }
    assert "psum" in found["all-reduce"].op_name


@pytest.mark.parametrize(
    ("groups", "share"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 3 / 4),
        ("[2,8]<=[16]", 7 / 8),
        ("[2,8]<=[8,2]T(1,0)", 7 / 8),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 7 / 8),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1'}", 15 / 16),
        ("mesh['axis_0'=16] {'axis_0':(1)4}", 3 / 4),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 3 / 4),
    ],
)
def test_an_overlapped_collective_counts_once_and_groups_are_read_in_each_notation(groups, share):
    """A gather that the compiler has split over two fusions in a loop whose trip count is only in its condition."""
    gather = (
        f"all-gather(%p), channel_id=3, replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true, "
        'frontend_attributes={chain_id="0"}'
    )
    text = f"""HloModule m

%first (p: bf16[4,8]) -> bf16[64,8] {{
  %p = bf16[4,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %g.1 = bf16[64,8]{{1,0:T(8,128)(2,1)S(1)}} {gather}
}}

%second (p: bf16[4,8]) -> bf16[64,8] {{
  %p = bf16[4,8]{{1,0}} parameter(0)
  ROOT %g.2 = bf16[64,8]{{1,0}} {gather}, metadata={{op_name="jit(step)/gather"}}
}}

%condition (s: (s32[], bf16[4,8])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(29)
  %s = (s32[]{{:T(128)}}, /*index=1*/bf16[4,8]{{1,0}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction=LT
}}

%body (s: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {{
  %s = (s32[]{{:T(128)}}, bf16[4,8]{{1,0}}) parameter(0)
  %x = bf16[4,8]{{1,0}} get-tuple-element(%s), index=1
  %f.1 = bf16[64,8]{{1,0}} fusion(%x), kind=kCustom, calls=%first
  %f.2 = bf16[64,8]{{1,0}} fusion(%x), kind=kCustom, calls=%second
  ROOT %t = (s32[]{{:T(128)}}, bf16[4,8]{{1,0}}) tuple(%s, %x)
}}

ENTRY %main (x: bf16[4,8]) -> (s32[], bf16[4,8]) {{
  %x = bf16[4,8]{{1,0}} parameter(0)
  %one = s32[]{{:T(128)}} constant(1)
  %copy = s32[]{{:T(128)}} copy(%one)
  %t = (s32[]{{:T(128)}}, bf16[4,8]{{1,0}}) tuple(%copy, %x)
  ROOT %loop = (s32[]{{:T(128)}}, bf16[4,8]{{1,0}}) while(%t), condition=%condition, body=%body
}}
"""
    (collective,) = hlo.collectives(text)
    n = 1 / (1 - share)
    assert (collective.kind, collective.times) == ("all-gather", 28)
    assert collective.bytes == pytest.approx(4 * 8 * 2 * (n - 1))
    assert collective.op_name == "jit(step)/gather"


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.matrix_flops("module @jit_f {}")
