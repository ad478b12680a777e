"""The T5 encoder against transformers on tiny random configurations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_reference import from_torch, relative_l2

from fluxjax.config import T5_SMALL, T5_XXL, T5Config
from fluxjax.models.stacking import stack_layers
from fluxjax.models.t5 import T5Encoder, relative_position_buckets

V1_1 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=3)
V1_0 = T5Config(
    vocab_size=99,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=3,
    is_gated_act=False,
    dense_act_fn="relu",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
)


def reference(config: T5Config) -> transformers.T5EncoderModel:
    torch.manual_seed(0)
    fields = {k: v for k, v in vars(config).items() if k not in ("is_gated_act", "dense_act_fn")}
    model = transformers.T5EncoderModel(
        transformers.T5Config(
            **fields,
            feed_forward_proj="gated-gelu" if config.is_gated_act else "relu",
        )
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layer_norm" in name or "relative_attention_bias" in name:
                tensor.add_(0.5 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])
def test_equals_transformers(config):
    model = reference(config)
    params = from_torch(model, config)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 99, (2, 45))
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    for attention_mask in (None, mask):
        torch_mask = None if attention_mask is None else torch.tensor(attention_mask)
        with torch.no_grad():
            expected = model(torch.tensor(ids), torch_mask).last_hidden_state.numpy()
        for scan in (False, True):
            ours = jax.jit(T5Encoder(config, scan_layers=scan).apply)(
                {"params": stack_layers(params) if scan else params}, ids, attention_mask
            )
            assert relative_l2(ours, expected) <= 1e-5


def test_bfloat16_is_as_good_as_torch():
    model = reference(V1_1)
    params = from_torch(model, V1_1)
    ids = np.random.default_rng(0).integers(3, 99, (4, 32))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).last_hidden_state.numpy()
        theirs = model.bfloat16()(torch.tensor(ids)).last_hidden_state.float().numpy()
    apply = jax.jit(T5Encoder(V1_1, dtype=jnp.bfloat16).apply)
    error = relative_l2(apply({"params": params}, ids).astype(jnp.float32), expected)
    assert error <= min(2e-2, 1.5 * relative_l2(theirs, expected))


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 40), (8, 20)])
def test_buckets_equal_torch(buckets, distance):
    position = torch.arange(600)
    relative = position[None] - position[:, None]
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(relative, True, buckets, distance).numpy()
    np.testing.assert_array_equal(relative_position_buckets(600, buckets, distance), expected)


@pytest.mark.parametrize(
    ("config", "count"), [(T5_XXL, 4_762_310_656), (T5_SMALL, 35_330_816)], ids=["xxl", "small"]
)
def test_presets_have_the_published_size(config, count):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    module = T5Encoder(config, scan_layers=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert shapes["encoder"]["block"]["layer_0"]["SelfAttention"]["q"]["kernel"].shape == (
        config.num_layers,
        config.d_model,
        config.num_heads * config.d_kv,
    )


@pytest.mark.slow
def test_intermediates_carry_torch_module_names():
    params = from_torch(reference(V1_1), V1_1)
    _, state = T5Encoder(V1_1).apply(
        {"params": params},
        jnp.ones((1, 4), int),
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    block = state["intermediates"]["encoder"]["block_1"]
    assert set(block) == {"__call__", "layer_0", "layer_1"}
    assert {"q", "k", "v", "o", "__call__"} == set(block["layer_0"]["SelfAttention"])
    assert {"wi_0", "wi_1", "wo", "__call__"} == set(block["layer_1"]["DenseReluDense"])
