"""DoRA and LoKr as they are trained: beside PEFT's layers, and as their files are read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import TINY, ConfigError, LoraConfig
from fluxjax.models.dense import Dense
from fluxjax.models.lora import dense_sites, factors, init_lora, with_magnitudes
from fluxjax.models.names import flatten, unflatten
from fluxjax.train.recipe import FinetuneRecipe

TEMPLATE = abstract_params(TINY.transformer)
TARGETS = (
    "transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.2.proj_mlp",
    "transformer_blocks.1.norm1.linear",
)
KINDS = {
    "dora": LoraConfig(kind="dora", rank=3, alpha=6.0, targets=TARGETS),
    "lokr": LoraConfig(kind="lokr", rank=2, alpha=6.0, targets=TARGETS),
    "lokr, whole": LoraConfig(kind="lokr", rank=99, factor=12, targets=TARGETS),
}


WRITTEN = {
    "dora": {"weight", "lora_magnitude_vector"},
    "lokr": {"alpha", "lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "lokr, whole": {"alpha", "lokr_w1", "lokr_w2"},
}


def random_like(shapes: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    drawn = {
        path: rng.standard_normal(leaf.shape, np.float32) * 0.1
        for path, leaf in flatten(shapes).items()
    }
    return unflatten(drawn)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_like(TEMPLATE, 0)


def drawn(config: LoraConfig, params: Any) -> dict[str, Any]:
    """A LoRA of which nothing is zero but the scales of layers that it does not adapt."""
    tree = with_magnitudes(init_lora(jax.random.key(0), TEMPLATE, config), params)
    kept, moved = flatten(tree), flatten(random_like(tree, 1))
    return unflatten({p: v if p[-1] == "scale" else v + moved[p] for p, v in kept.items()})


@pytest.mark.slow
def test_dora_and_its_gradients_are_pefts() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_dora=True, target_modules=["0"], init_lora_weights=False
    )
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 7)), config)
    layer: Any = model.get_submodule("base_model.model.0")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data += torch.randn(7) * 0.1
    x, weights = torch.randn(2, 5, 12), torch.randn(2, 5, 7)
    expected = model(x)
    (expected * weights).sum().backward()
    base, inputs = layer.base_layer, jnp.asarray(x.numpy())
    kernel = {"kernel": base.weight.detach().numpy().T, "bias": base.bias.detach().numpy()}
    leaves = {
        "a": down.detach().numpy().T,
        "b": up.detach().numpy().T,
        "magnitude": magnitude.detach().numpy(),
    }

    def total(leaves: Any) -> Any:
        y: Any = Dense(7).apply(
            {"params": kernel, "lora": {**leaves, "scale": jnp.float32(2)}}, inputs
        )
        return (y * weights.numpy()).sum(), y

    got, y = jax.grad(total, has_aux=True)(jax.tree.map(jnp.asarray, leaves))
    np.testing.assert_allclose(y, expected.detach(), atol=1e-5)
    for name, parameter in (("a", down), ("b", up), ("magnitude", magnitude)):
        theirs = parameter.grad.numpy()
        np.testing.assert_allclose(
            got[name], theirs.T if theirs.ndim == 2 else theirs, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_begins_with_nothing_and_is_read_as_it_is_written(
    kind, params, tmp_path: Path
) -> None:
    config = KINDS[kind]
    flat, path = flatten(params), tmp_path / "a.safetensors"
    tree = drawn(config, params)
    write_lora(path, {"transformer": tree}, config)
    adapted, fresh = flatten(tree), init_lora(jax.random.key(0), TEMPLATE, config)
    fresh = flatten(with_magnitudes(fresh, params))
    changes = read_adapters(path, {"transformer": TEMPLATE}).changes["transformer"]
    names = set()
    for site in dense_sites(TEMPLATE):
        if (*site.module, "scale") not in adapted:
            continue
        assert not site.stacked
        (name,), kernel = site.names, jnp.asarray(flat[*site.module, "kernel"])
        names.add(f"{name}.weight")
        form = changes[f"{name}.weight"].delta
        assert form is not None
        delta = form(partial(_weight, kernel)).T
        x = jax.random.normal(jax.random.key(1), (4, site.shape[0]))
        layer = Dense(site.shape[1], use_bias=False)
        for leaves, change in ((adapted, delta), (fresh, 0.0)):
            mine = {p[-1]: leaves[p] for p in leaves if p[:-1] == site.module}
            got: Any = layer.apply({"params": {"kernel": kernel}, "lora": mine}, x)
            np.testing.assert_allclose(got, x @ (kernel + change), atol=2e-4)
    assert changes.keys() == names
    tensors = read_safetensors(path)[0]
    ends = {name.rpartition(".")[2] for name in tensors}
    assert ends == WRITTEN[kind]


def _weight(kernel: jax.Array, name: str) -> np.ndarray:
    return np.asarray(kernel).T


def test_factors_are_lycoris() -> None:
    """The table in LyCORIS' `factorization`."""
    for size, factor, expected in (
        (128, -1, (8, 16)),
        (250, -1, (10, 25)),
        (360, 8, (8, 45)),
        (250, 4, (2, 125)),
        (360, 16, (15, 24)),
        (512, 16, (16, 32)),
        (1024, 2, (2, 512)),
        (127, 4, (1, 127)),
    ):
        assert factors(size, factor) == expected


def test_other_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="a lokr is written in LyCORIS' names"):
        FinetuneRecipe(lora=KINDS["lokr"], lora_naming="kohya")
    with pytest.raises(ConfigError, match="factor must be at least 1, or -1"):
        LoraConfig(kind="lokr", factor=0)
