"""The FLUX transformer against diffusers, on tiny random weights through the shipped converter."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch_reference import relative_l2

from fluxjax.checkpoint.engine import to_ours
from fluxjax.config import PRESETS, FluxConfig
from fluxjax.models.embeddings import rope_table, round_to, thousandfold
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.stacking import stack_layers, unstack_layers
from fluxjax.networks.flux import PUBLISHED

CONFIG = FluxConfig(
    in_channels=16,
    out_channels=8,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=3,
    joint_attention_dim=32,
    pooled_projection_dim=24,
    axes_dims_rope=(4, 6, 6),
)
SCHNELL = replace(CONFIG, guidance_embeds=False)
ROWS, COLUMNS, TEXT, BATCH = 4, 6, 7, 2


@cache
def torch_model(config: FluxConfig) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    fields = {
        k: v for k, v in vars(config).items() if k not in ("rope_theta", "mlp_ratio", "qkv_bias")
    }
    model = FluxTransformer2DModel(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_" in name:  # all ones in a new model
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@cache
def parameters(config: FluxConfig) -> dict:
    shapes = jax.eval_shape(FluxTransformer(config).init, jax.random.key(0), **inputs(config))
    weights = {name: tensor.numpy() for name, tensor in torch_model(config).state_dict().items()}
    return to_ours(weights, PUBLISHED, shapes["params"])


def inputs(config: FluxConfig) -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    rows, columns = np.indices((ROWS, COLUMNS)).reshape(2, -1)
    return {
        "hidden_states": normal(BATCH, ROWS * COLUMNS, config.in_channels),
        "encoder_hidden_states": normal(BATCH, TEXT, config.joint_attention_dim),
        "pooled_projections": normal(BATCH, config.pooled_projection_dim),
        "timestep": jnp.asarray([0.908, 0.25]),
        "img_ids": jnp.asarray(np.stack([0 * rows, rows, columns], axis=-1)),
        "txt_ids": jnp.zeros((TEXT, 3), jnp.int32),
        "guidance": jnp.asarray([3.5, 2.5]) if config.guidance_embeds else None,
    }


def torch_forward(config: FluxConfig, dtype: torch.dtype, x: dict) -> np.ndarray:
    x = {k: None if v is None else torch.tensor(np.asarray(v)) for k, v in x.items()}
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        x[name] = x[name].to(dtype)
    # As the pipeline does it: 1000 t in the model's dtype, divided by 1000.
    x["timestep"] = (x["timestep"] * 1000).to(dtype) / 1000
    model = torch_model(config).to(dtype)
    with torch.no_grad():
        out = model(**x, return_dict=False)[0].float().numpy()
    model.to(torch.float32)
    return out


@pytest.mark.parametrize("config", [CONFIG, SCHNELL], ids=["guidance", "no guidance"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_equals_diffusers(config, scan):
    params = stack_layers(parameters(config)) if scan else parameters(config)
    apply, x = jax.jit(FluxTransformer(config, scan_layers=scan).apply), inputs(config)
    out = apply({"params": params}, **x)
    assert relative_l2(out, torch_forward(config, torch.float32, x)) <= 1e-5


def test_bfloat16_is_as_good_as_torch():
    # Timestep and guidance that bfloat16 holds exactly, times 1000 too: their rounding moves the
    # embedding far more than all arithmetic, and has its own test.
    x = {**inputs(CONFIG), "timestep": jnp.asarray([0.5, 0.25]), "guidance": jnp.asarray([4.0, 2])}
    exact = torch_forward(CONFIG, torch.float32, x)
    torch_error = relative_l2(torch_forward(CONFIG, torch.bfloat16, x), exact)
    # torch casts its weights as well, and so does a model that is loaded in bfloat16.
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters(CONFIG))
    model = FluxTransformer(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    out = jax.jit(model.apply)({"params": params}, **x)
    assert out.dtype == jnp.bfloat16
    error = relative_l2(out, exact)
    print(f"bfloat16: ours {error:.2e}, torch {torch_error:.2e}")
    assert error <= 2e-2 and error <= 1.5 * torch_error


@pytest.mark.slow
def test_gradients_do_not_depend_on_scan_and_remat():
    x = inputs(CONFIG)

    def gradient(params, scan, remat):
        model = FluxTransformer(CONFIG, scan_layers=scan, remat=remat)

        def loss(params):
            return jnp.mean(jnp.square(model.apply({"params": params}, **x)))

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(parameters(CONFIG), False, "none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    for remat in ("dots", "full"):
        scanned = unstack_layers(gradient(stack_layers(parameters(CONFIG)), True, remat))
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), scanned, expected)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_steps_in_one_scan_equal_one_call_each(scan):
    params = stack_layers(parameters(CONFIG)) if scan else parameters(CONFIG)
    model, x = FluxTransformer(CONFIG, scan_layers=scan), inputs(CONFIG)
    timesteps = jnp.asarray([1.0, 0.77, 0.4])

    @jax.jit
    def split(params):
        def method(name, *args):
            return model.apply({"params": params}, *args, method=name)

        rope = method("rope", x["txt_ids"], x["img_ids"])
        text = method("embed_text", x["encoder_hidden_states"])
        modulations = method("step_modulations", timesteps, x["pooled_projections"], x["guidance"])

        def step(carry, modulation):
            return carry, method("denoise", x["hidden_states"], text, modulation, rope)

        return jax.lax.scan(step, None, modulations)[1]

    whole = jax.jit(lambda t: model.apply({"params": params}, **{**x, "timestep": t}))
    for out, t in zip(split(params), timesteps, strict=True):
        assert relative_l2(out, whole(jnp.full(BATCH, t))) <= 1e-6


def test_every_torch_module_has_its_intermediate():
    model = FluxTransformer(CONFIG)
    _, state = jax.jit(partial(model.apply, capture_intermediates=True, mutable=["intermediates"]))(
        {"params": parameters(CONFIG)}, **inputs(CONFIG)
    )
    ours = {
        "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for path, _ in jax.tree_util.tree_leaves_with_path(state["intermediates"])
    }
    theirs = {
        name.replace("to_out.0", "to_out_0").replace("net.", "net_").replace(".", "/")
        for name, module in torch_model(CONFIG).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.RMSNorm | torch.nn.LayerNorm)
    }
    theirs = {name.replace("blocks/", "blocks_") for name in theirs}
    assert theirs <= {path.removesuffix("/__call__") for path in ours}


def test_a_distilled_model_without_guidance_says_so():
    x = {**inputs(CONFIG), "guidance": None}
    with pytest.raises(ValueError, match="needs `guidance`"):
        jax.eval_shape(FluxTransformer(CONFIG).init, jax.random.key(0), **x)


def test_timestep_rounding():
    # The default schedule of 28 steps at 1024 x 1024: mu = 1.15.
    t = np.linspace(1, 1 / 28, 28)
    sigmas = jnp.asarray(np.exp(1.15) / (np.exp(1.15) + 1 / t - 1), jnp.float32)
    ours = {r: np.asarray(thousandfold(sigmas, jnp.bfloat16, r)) for r in ("diffusers", "bfl")}
    s = torch.tensor(np.asarray(sigmas))
    theirs = {
        "diffusers": ((s * 1000).to(torch.bfloat16) / 1000).to(torch.bfloat16) * 1000,
        "bfl": s.to(torch.bfloat16) * 1000,
    }
    for rounding, expected in theirs.items():
        np.testing.assert_array_equal(ours[rounding], expected.float().numpy())
    assert np.sum(ours["diffusers"] != ours["bfl"]) == 7
    guidance = thousandfold(jnp.asarray([3.5, 2.5]), jnp.bfloat16, "bfl")
    np.testing.assert_array_equal(guidance, [3504, 2496])
    np.testing.assert_array_equal(thousandfold(sigmas, jnp.bfloat16, "none"), 1000 * sigmas)
    # Compiled, too: XLA may drop a pair of casts.
    compiled = jax.jit(lambda x: thousandfold(x, jnp.bfloat16, "bfl"))(sigmas)
    np.testing.assert_array_equal(compiled, ours["bfl"])
    np.testing.assert_array_equal(round_to(sigmas, jnp.float32), sigmas)


def test_rope_is_as_exact_as_float64():
    positions = np.array([0, 1, 63, 127, 255, 1000, 4095])
    ids = jnp.asarray(np.stack([positions] * 3, axis=-1))
    table = jax.jit(lambda ids: rope_table(ids, (16, 56, 56), 10000.0))(ids)
    angles = np.concatenate(
        [positions[:, None] / 10000.0 ** (np.arange(0, d, 2) / d) for d in (16, 56, 56)], axis=1
    )
    np.testing.assert_allclose(table.cos, np.cos(angles), atol=3e-7)
    np.testing.assert_allclose(table.sin, np.sin(angles), atol=3e-7)


def shapes(config: FluxConfig, scan: bool) -> dict:
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs(config))
    model = FluxTransformer(config, scan_layers=scan)
    return jax.eval_shape(model.init, jax.random.key(0), **x)["params"]


@pytest.mark.parametrize(
    ("preset", "count"), [("dev", 11_901_408_320), ("schnell", 11_891_178_560)]
)
def test_parameter_counts(preset, count):
    leaves = jax.tree.leaves(shapes(PRESETS[preset].transformer, scan=True))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == count


def test_scanned_and_unrolled_modules_have_stacked_and_unstacked_trees():
    unrolled, scanned = shapes(CONFIG, scan=False), shapes(CONFIG, scan=True)
    assert stack_layers(unrolled) == scanned
    assert unstack_layers(scanned) == unrolled
