"""Attention to the first keys of each row equals a softmax over those alone, on every path."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fluxjax.config import ConfigError
from fluxjax.models import block_attention
from fluxjax.models import chunked_attention as chunked
from fluxjax.models.attention import auto_attention, dot_product_attention
from fluxjax.models.block_attention import attend_block
from fluxjax.models.splash_attention import splash_attention, splash_with_logsum
from fluxjax.parallel.activations import attend_in_parts, attention_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.sequence import AXIS, Layout, attention_over, group_size
from fluxjax.plan import attention as plan_attention


def qkv(b, queries, keys, heads, k, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((b, queries, heads, k), (b, keys, heads, k), (b, keys, heads, k))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def loss(attend, q, k, v):
    out = attend(q, k, v)
    return jnp.sum(
        jnp.sin(out + jnp.arange(out.shape[-1], dtype=jnp.float32)[None, None, None])
    ), out


def value_and_gradients(attend, q, k, v):
    program = jax.jit(jax.value_and_grad(partial(loss, attend), (0, 1, 2), has_aux=True))
    (_, out), gradients = program(q, k, v)
    return out, *gradients


def of_real_keys(lengths, q, k, v):
    """Row by row, the padded keys cut off."""

    def row(q, k, v):
        if k.shape[0] == 0:
            return jnp.zeros_like(q)
        weights = jax.nn.softmax(jnp.einsum("lhk,mhk->hlm", q, k) / q.shape[-1] ** 0.5, axis=-1)
        return jnp.einsum("hlm,mhk->lhk", weights, v)

    rows = zip(q, k, v, lengths, strict=True)
    return jnp.stack([row(q, k[: max(n, 0)], v[: max(n, 0)]) for q, k, v, n in rows])


def assert_equal(found, lengths, q, k, v, bound=1e-5):
    """`found`: output and gradients; those of padded keys and values are 0 to the last bit."""
    wanted = value_and_gradients(
        partial(of_real_keys, lengths), *(x.astype(jnp.float32) for x in (q, k, v))
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, atol=bound * max(1, np.abs(b).max()), err_msg=name)
    for n, dk, dv in zip(lengths, *found[2:], strict=True):
        assert not np.asarray(dk)[max(n, 0) :].any() and not np.asarray(dv)[max(n, 0) :].any()


LENGTHS = (41, 1, 0, 17, 50)  # of 41 keys: all, one, none, some, and more than there are


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 16 * 41)
    monkeypatch.setattr(chunked, "_LEAST_CHUNK", 16)
    monkeypatch.setattr(plan_attention, "_CHUNK", 16)


@pytest.mark.parametrize("implementation", ["xla", "chunked", plan_attention.flash_like])
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_on_one_device(small_chunks, implementation, size):
    q, k, v = qkv(5, 37, 41, 3, 16)
    q, k = q * size, k * size
    attend = partial(
        dot_product_attention, key_lengths=jnp.asarray(LENGTHS), implementation=implementation
    )
    assert_equal(value_and_gradients(attend, q, k, v), LENGTHS, q, k, v, 1e-5 * size**2)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_bfloat16(small_chunks, implementation):
    q, k, v = qkv(5, 37, 41, 3, 16, jnp.bfloat16)
    attend = partial(
        dot_product_attention, key_lengths=jnp.asarray(LENGTHS), implementation=implementation
    )
    found = value_and_gradients(attend, q, k, v)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    assert_equal(found, LENGTHS, q, k, v, 2e-2)


def test_what_padding_holds_changes_nothing(small_chunks):
    q, k, v = qkv(2, 37, 41, 3, 16)
    lengths = jnp.asarray([20, 41])
    beyond = (jnp.arange(41)[None] >= lengths[:, None])[:, :, None, None]
    for implementation in ("xla", "chunked"):
        attend = partial(dot_product_attention, key_lengths=lengths, implementation=implementation)
        large = attend(q, jnp.where(beyond, 1e4, k), jnp.where(beyond, -1e4, v))
        np.testing.assert_allclose(attend(q, k, v), large, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(130, 100), (128, 256)])
def test_splash_interpreted(monkeypatch, queries, keys):
    monkeypatch.setattr(
        "fluxjax.models.splash_attention.splash_attention",
        partial(splash_attention, interpret=True),
    )
    lengths = (0, keys - 30)
    q, k, v = qkv(2, queries, keys, 1, 64)
    attend = partial(
        dot_product_attention, key_lengths=jnp.asarray(lengths), implementation="splash"
    )
    assert_equal(value_and_gradients(attend, q, k, v), lengths, q, k, v)


@pytest.mark.slow
def test_a_block_of_keys_by_splash(monkeypatch):
    """Beside the loop: what is seen and how much it weighs."""
    monkeypatch.setattr(
        "fluxjax.models.splash_attention.splash_with_logsum",
        partial(splash_with_logsum, interpret=True),
    )
    q, k, v = qkv(2, 130, 100, 1, 64)
    attend = partial(attend_block, q, k, v, jnp.asarray([0, 70]))
    ours, wanted = (jax.jit(partial(attend, kind))() for kind in ("splash", "xla"))
    np.testing.assert_allclose(ours.out, wanted.out, atol=1e-5)
    np.testing.assert_allclose(ours.logsum, wanted.logsum, atol=1e-5)


def test_cudnn_gets_lengths_that_it_can_take(monkeypatch):
    """Here the same function with plain matmuls stands in for the kernel."""
    given = []

    def stand_in(*args, implementation, **options):
        given.append(implementation)
        assert options["key_value_seq_lengths"].dtype == jnp.int32
        return original(*args, implementation="xla", **options)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = qkv(5, 37, 41, 3, 16)
    lengths = jnp.asarray(LENGTHS, jnp.int16)
    attend = partial(dot_product_attention, key_lengths=lengths, implementation="cudnn")
    assert_equal(value_and_gradients(attend, q, k, v), LENGTHS, q, k, v)
    assert given == ["cudnn"]


def test_auto_takes_the_loop_on_cpus_and_the_stand_in():
    q, k, v = qkv(1, 300, 300, 1, 8)
    attend = partial(dot_product_attention, key_lengths=jnp.asarray([17]))
    assert "custom_vjp" in str(jax.make_jaxpr(attend)(q, k, v))
    with auto_attention(lambda q, k, v, key_lengths: q * key_lengths[:, None, None, None]):
        np.testing.assert_array_equal(attend(q, k, v), 17 * q)
    with pytest.raises(ValueError, match="a function takes no bias, causal mask or scale"):
        attend(q, k, v, causal=True, implementation=lambda *arrays: arrays[0])


LAYOUT = Layout(text=13, image=37, devices=4, text_last=True)


def spread_out(x, layout: Layout):
    """Tokens in joint order -> as they lie on the devices; padding holds large numbers."""
    positions = layout.positions().reshape(-1)
    return jnp.where((positions >= 0)[None, :, None, None], x[:, positions], 1e3)


def over_devices(mesh, layout: Layout, kind: str, lengths, implementation="auto"):
    """`attend(q, k, v)` of arrays in joint order, tokens split over the mesh's `sequence`."""
    axes = ("data", "fsdp"), "tensor"
    attention = attention_over(layout, 8, kind, implementation)  # pyright: ignore
    each = partial(attend_in_parts, mesh, *axes, attention)
    tokens = P(None, AXIS)
    split = jax.shard_map(
        each,
        mesh=mesh,
        axis_names={AXIS},
        in_specs=(tokens, tokens, tokens, P()),
        out_specs=tokens,
        check_vma=False,
    )
    place = NamedSharding(mesh, P(axes[0], AXIS))

    def attend(q, k, v):
        laid = (spread_out(x, layout) for x in (q, k, v))
        laid = (jax.lax.with_sharding_constraint(x, place) for x in laid)
        # As a network inside the shard_map calls it.
        out = dot_product_attention(*laid, key_lengths=jnp.asarray(lengths), implementation=split)
        return layout.in_order(out, layout.text + layout.image)

    return attend


@pytest.mark.parametrize(
    ("mesh", "kind", "implementation"),
    [
        ("sequence=4,data=2", "ring", "chunked"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("sequence=4,data=2", "ring", "xla"),
                ("sequence=4,data=2", "ulysses", "chunked"),
                ("fsdp=2,tensor=2,sequence=2", "ulysses", "chunked"),
                ("sequence=8", "ulysses=2", "xla"),
            )
        ],
        ("sequence=8", "ulysses=4", "chunked"),
    ],
)
def test_over_devices(monkeypatch, mesh, kind, implementation):
    monkeypatch.setattr(block_attention, "_LOGITS", 4 * 8 * 14 * 3)  # 3 queries at a time, of 14
    devices = make_mesh(mesh)
    layout = LAYOUT._replace(devices=devices.shape[AXIS])
    # The whole, no text, text on some devices alone, and an empty row; image tokens alone too.
    lengths = (50, 37, 41, 0)
    q, k, v = qkv(4, 50, 50, 8, 16)
    attend = over_devices(devices, layout, kind, lengths, implementation)
    assert_equal(value_and_gradients(attend, q, k, v), lengths, q, k, v)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_over_devices_in_bfloat16(kind):
    mesh = make_mesh("sequence=4,data=2")
    q, k, v = qkv(4, 50, 50, 8, 16, jnp.bfloat16)
    found = value_and_gradients(over_devices(mesh, LAYOUT, kind, (50, 37, 41, 0)), q, k, v)
    assert_equal(found, (50, 37, 41, 0), q, k, v, 2e-2)


def test_groups_of_ulysses_and_their_ring():
    """24 heads over 64 devices: groups of eight; where heads are split too, those of a part."""
    assert group_size(64, 24, "auto") == 8
    assert group_size(8, 24, "auto") == 8 and group_size(8, 24, "auto", tensor=2) == 4
    assert group_size(8, 6, "auto") == 2 and group_size(5, 6, "auto", tensor=4) == 1
    assert group_size(64, 24, "ulysses=4") == 4 and group_size(64, 24, "ring") == 1
    with pytest.raises(ConfigError, match=r"ulysses=4 .* sequence=6: 4 does not divide 6"):
        group_size(6, 24, "ulysses=4")
    with pytest.raises(ConfigError, match="ulysses cannot split 24 heads over sequence=64"):
        group_size(64, 24, "ulysses")
    with pytest.raises(ValueError, match="does not tell how much its keys weigh"):
        attend_block(*qkv(1, 4, 4, 1, 8), implementation=lambda *given: given[0])


def test_text_that_comes_first_is_refused():
    mesh, layout = make_mesh("sequence=4,data=2"), LAYOUT._replace(text_last=False)
    for kind in ("ring", "ulysses"):
        attend = over_devices(mesh, layout, kind, (50, 37))
        with pytest.raises(ConfigError, match="need the text last"):
            jax.eval_shape(attend, *qkv(2, 50, 50, 8, 16))


def test_kernels_are_told_how_lengths_are_split():
    """TPUs refuse a program whose kernel is not told."""
    mesh = make_mesh("fsdp=4,tensor=2")
    place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))

    def program(q, k, v, lengths):
        with attention_on(mesh):
            return dot_product_attention(q, k, v, key_lengths=lengths, implementation="splash")

    arguments = [jax.ShapeDtypeStruct((8, 64, 4, 64), jnp.float32, sharding=place)] * 3
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    traced = jax.jit(program).trace(*arguments, lengths)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 1


def largest_array(attend, q, k, v) -> int:
    """Elements, in the compiled program of the gradients."""
    gradients = jax.jit(jax.grad(lambda *x: loss(attend, *x)[0], (0, 1, 2)))
    text = gradients.lower(q, k, v).compile().as_text()
    shapes = re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.slow
def test_no_logits_are_written_forward_or_backward(monkeypatch):
    length, heads, lengths = 1024, 8, (700, 1024)
    q, k, v = qkv(2, length, length, heads, 8)
    options = {"key_lengths": jnp.asarray(lengths)}
    plain = partial(dot_product_attention, implementation="xla", **options)
    assert largest_array(plain, q, k, v) == 2 * heads * length**2
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", 64 * length)
    # The loop keeps 64 queries of one head, flash_like 128 of all.
    for kernel, bound in (("chunked", q.size), (plan_attention.flash_like, heads * length**2)):
        attend = partial(dot_product_attention, implementation=kernel, **options)
        assert largest_array(attend, q, k, v) <= bound
    mesh = make_mesh("sequence=4,data=2")
    layout = Layout(text=224, image=800, devices=4, text_last=True)
    block = heads * (length // 4) ** 2  # one picture's logits on one device
    ring, ulysses = (
        over_devices(mesh, layout, kind, lengths, "chunked") for kind in ("ring", "ulysses")
    )
    assert largest_array(ulysses, q, k, v) < block
    assert largest_array(ring, q, k, v) < block
