"""What compiled programs hold, compute and send: known small ones, and FLUX.1-dev at its real size.

Nothing of the real size is computed: shapes are lowered and compiled for eight simulated devices.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parameter_trees import parameter_count

from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, HUNYUAN_VIDEO_720, OPEN_SORA_768
from fluxjax.families import family_of
from fluxjax.models.attention import auto_attention
from fluxjax.models.compilation import IN_LOOPS
from fluxjax.models.flux import FluxTransformer
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.compiled_program import measure
from fluxjax.parallel.mesh import batch_parts, batch_sharding, make_mesh, replicated
from fluxjax.parallel.rules import param_shardings, state_shardings
from fluxjax.plan.attention import flash_like
from fluxjax.sample.executables import Executables
from fluxjax.sample.programs import defaults, programs

TEXT, FLOAT = 512, 4


def spec(shape: tuple[int, ...], sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def placed(tree, shardings):
    return jax.tree.map(lambda leaf, place: spec(leaf.shape, place), tree, shardings)


def test_loops_products_and_collectives_are_counted():
    mesh = make_mesh("fsdp=8")
    rows, whole = NamedSharding(mesh, P("fsdp")), replicated(mesh)

    def program(x, kernels, image, filters):
        def layer(x, kernel):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), rows), None

        x, _ = jax.lax.scan(layer, x, kernels)
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            image, filters, (2, 2), "VALID", dimension_numbers=dimensions
        )
        return x, y, jnp.sum(x)

    arguments = (
        spec((64, 32), rows),
        spec((5, 32, 32), NamedSharding(mesh, P(None, "fsdp"))),
        spec((8, 9, 9, 4), rows),
        spec((3, 3, 4, 6), whole),
    )
    found = measure(jax.jit(program, out_shardings=(rows, rows, whole)).lower(*arguments).compile())
    convolution = 2 * (1 * 4 * 4 * 6) * (3 * 3 * 4)
    assert found.matmul_flops == 5 * 2 * 8 * 32 * 32 + convolution
    assert found.argument_bytes == FLOAT * (64 * 32 + 5 * 32 * 32 + 8 * 81 * 4) // 8 + FLOAT * 216
    kinds = found.collective_bytes
    assert kinds["all-gather"] == 5 * 7 * FLOAT * 4 * 32
    assert kinds["all-reduce"] == pytest.approx(2 * FLOAT * 7 / 8)
    gathers = [one for one in found.collectives if one.kind == "all-gather"]
    assert [(one.calls, one.devices) for one in gathers] == [(5, 8)]


def flux(text: str, batch: int, image: int, *, remat: str = "none"):
    """(apply, abstract parameters, their shardings, inputs) on a mesh, in float32."""
    mesh = make_mesh(text)
    model = FluxTransformer(DEV.transformer, scan_layers=True, attention="xla", remat=remat)
    params = abstract_params(DEV.transformer, stacked=True)
    rows = batch_sharding(mesh) if batch % batch_parts(mesh) == 0 else replicated(mesh)
    whole = replicated(mesh)
    inputs = (
        spec((batch, image, 64), rows),
        spec((batch, TEXT, 4096), rows),
        spec((batch, 768), rows),
        spec((batch,), rows),
        spec((image, 3), whole),
        spec((TEXT, 3), whole),
        spec((batch,), rows),
    )
    return (
        partial(apply_on, mesh, model),
        params,
        param_shardings(DEV.transformer, params, mesh),
        inputs,
    )


def compiled_forward(text: str, batch: int, image: int = 4096):
    apply, params, places, inputs = flux(text, batch, image)
    tokens = P(("data", "fsdp"), "sequence") if batch > 1 else P(None, "sequence")
    forward = jax.jit(
        lambda params, *inputs: apply({"params": params}, *inputs),
        out_shardings=NamedSharding(make_mesh(text), tokens),
    )
    found = measure(forward.lower(placed(params, places), *inputs).compile())
    print(text, {kind: f"{size / 1e9:.3f} GB" for kind, size in found.collective_bytes.items()})
    return found


WEIGHTS = FLOAT * 11_901_408_320
FORWARD = 74.385e12  # one forward at 1024 x 1024, batch 1


@pytest.mark.slow
def test_fsdp_holds_an_eighth_and_gathers_weights_alone():
    found = compiled_forward("fsdp=8", 8)
    assert found.argument_bytes <= 1.02 * WEIGHTS / 8
    assert found.matmul_flops == pytest.approx(FORWARD, rel=0.01)
    assert set(found.collective_bytes) == {"all-gather"}
    # Every device receives what the seven others hold, once.
    assert found.collective_bytes["all-gather"] == pytest.approx(WEIGHTS * 7 / 8, rel=0.01)


@pytest.mark.slow
def test_ulysses_moves_heads_and_gathers_no_activation():
    found = compiled_forward("sequence=8", 1)
    assert found.matmul_flops == pytest.approx(FORWARD / 8, rel=0.01)
    assert "all-gather" not in found.collective_bytes
    # q, k, v and the output, in each of 57 blocks.
    expected = 57 * 4 * (4096 + TEXT) / 8 * 3072 * FLOAT * 7 / 8
    assert found.collective_bytes["all-to-all"] == pytest.approx(expected, rel=0.01)
    assert sum(found.collective_bytes.values()) <= 1.1 * expected


@pytest.mark.slow
def test_tensor_parallelism_gathers_its_weights_and_sums_once_after_each_pair():
    found = compiled_forward("tensor=4,fsdp=2", 8, 1024)
    assert found.argument_bytes <= 1.02 * WEIGHTS / 8
    assert found.matmul_flops == pytest.approx(21.503e12, rel=0.01)
    # A device receives what the other of its pair holds: weights, and no activation.
    assert found.collective_bytes["all-gather"] == pytest.approx(WEIGHTS / 8, rel=0.01)
    tokens = 4 * (1024 + TEXT) * 3072 * FLOAT
    sums = 2 * 3 / 4 * tokens * (2 * 19 + 38)
    assert found.collective_bytes["all-reduce"] == pytest.approx(sums, rel=0.01)
    # The single block joins attention and MLP, whose parts lie across the rows of its projection:
    # all five widths go from features to tokens and, joined, back.
    joins = 2 * 38 * 5 * tokens / 4 * 3 / 4
    assert found.collective_bytes["all-to-all"] == pytest.approx(joins, rel=0.01)
    assert sum(found.collective_bytes.values()) <= 1.01 * (WEIGHTS / 8 + sums + joins)


@pytest.mark.slow
def test_a_training_step_splits_the_optimiser_and_sums_gradients_once():
    apply, params, places, inputs = flux("fsdp=8", 8, 1024, remat="full")
    optimizer = optax.adamw(1e-5)
    state = jax.eval_shape(optimizer.init, params)
    state_places = state_shardings(DEV.transformer, state, make_mesh("fsdp=8"))

    def step(params, state, *inputs):
        def loss(params):
            out = apply({"params": params}, *inputs)
            return jnp.mean(jnp.square(out - inputs[0]))

        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(places, state_places))
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        state_places,
    )
    found = measure(jitted.lower(placed(params, places), state, *inputs).compile())
    assert found.argument_bytes <= 1.02 * 3 * WEIGHTS / 8
    assert found.donated_bytes >= 0.99 * 3 * WEIGHTS / 8
    # Forward, forward again, and twice that backward.
    assert found.matmul_flops == pytest.approx(4 * 21.503e12, rel=0.01)
    # Weights are gathered forward and backward; gradients are summed (CPUs send a sum to all,
    # GPUs and TPUs only each part to its owner, which is half).
    gathers, sums = 2 * WEIGHTS * 7 / 8, 2 * WEIGHTS * 7 / 8
    assert sum(found.collective_bytes.values()) <= 1.1 * (gathers + sums)


CLIPS = {  # preset; PFLOP of one forward
    "Open-Sora, 576 x 1024": (replace(OPEN_SORA_768, guidance=1.0), 5.092),
    "HunyuanVideo, 720 x 1280": (HUNYUAN_VIDEO_720, 12.069),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip", "kind", "group"),
    [("Open-Sora, 576 x 1024", "auto", 8), ("HunyuanVideo, 720 x 1280", "ulysses=2", 2)],
)
def test_clips_of_129_frames_on_eight_devices(clip, kind, group):
    """In bfloat16, the program that samples: 76,032 and 118,800 tokens of video; by Ulysses, and by
    a ring of four pairs."""
    pipeline, forward = replace(CLIPS[clip][0], steps=1), CLIPS[clip][1]
    family, mesh = family_of(pipeline.class_name), make_mesh("sequence=8")
    config, text = pipeline.networks["transformer"], pipeline.max_sequence_length
    params = abstract_params(config, stacked=True)
    denoise, *_ = programs(family, pipeline, defaults(pipeline), dtype=jnp.bfloat16, padded=False)
    executables = Executables(family, pipeline, jnp.bfloat16, True, mesh=mesh, sequence=kind)
    with auto_attention(flash_like):
        found = measure(executables.compile(denoise, IN_LOOPS))
    latents = family.shape_of(pipeline, pipeline.width, pipeline.height, pipeline.frames)[1:]
    assert found.matmul_flops == pytest.approx(forward * 1e15 / 8, rel=0.01)
    assert found.argument_bytes == pytest.approx(2 * parameter_count(params), rel=0.01)
    blocks, tokens = config.num_layers + config.num_single_layers, math.prod(latents) // 4 + text
    each = tokens / 8 * 3072 * 2
    exchanged = blocks * 4 * each * (group - 1) / group
    passed_on = blocks * 2 * each * (8 // group - 1)
    sent = found.collective_bytes
    assert sent["all-to-all"] == pytest.approx(exchanged, rel=0.01)
    assert sum(sent.values()) <= 1.1 * (exchanged + passed_on)
    # Nothing is as large as the logits of one step of a ring of eight.
    logits = 24 * (tokens / 8) ** 2 * 4
    print(clip, f"{found.temporary_bytes / 1e9:.2f} GB, logits {logits / 1e9:.1f} GB", sent)
    assert found.temporary_bytes < 0.4 * logits
