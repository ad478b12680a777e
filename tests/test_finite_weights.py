"""Weights with one NaN or infinite value are refused by name, in every form and every use."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import fluxjax
from fluxjax.checkpoint import pipeline_folder
from fluxjax.checkpoint.engine import MappingError, flatten
from fluxjax.checkpoint.finite import is_finite, not_finite
from fluxjax.checkpoint.lora.reader import read_lora
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.source import open_component
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError, LoraConfig
from fluxjax.convert import convert
from fluxjax.models.lora import init_lora
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings

EMBEDDED = Path(fluxjax.__file__).parent / "assets" / "tiny"
DAMAGED = {
    "transformer": "single_transformer_blocks.1.attn.to_q.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "text_model.final_layer_norm.bias",
    "text_encoder_2": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
}
VALUES = {"1 NaN": np.nan, "1 infinite": -np.inf}


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(EMBEDDED, tmp_path / "model"))


def damage(path: Path, name: str, value: float) -> None:
    """The last number of one tensor."""
    lazy, metadata = read_safetensors(path)
    arrays = {key: tensor.read() for key, tensor in lazy.items()}
    arrays[name].reshape(-1)[-1] = value
    write_safetensors(path, {key: of_array(array) for key, array in arrays.items()}, metadata)


def damaged_part(model: Path, component: str, value: float = np.nan) -> str:
    """Damages a network; the tensor's name."""
    (file,) = (model / component).glob("*.safetensors")
    damage(file, DAMAGED[component], value)
    return DAMAGED[component]


@pytest.mark.parametrize("component", DAMAGED)
def test_one_value_is_enough(model, component):
    for words, value in VALUES.items():
        name = damaged_part(model, component, value)
        network = open_component(model, component)  # that opens: nothing is read yet
        for stacked in {False, component == "transformer"}:
            with pytest.raises(ConfigError) as error:
                network.params(stacked=stacked, dtype=jnp.bfloat16)
            assert str(error.value) == (
                f"{model / component}: {component}: {name} has values that are not finite "
                f"({words}): the file is damaged or was saved wrongly"
            )


def test_a_pipeline_says_it_when_it_draws(model):
    name = damaged_part(model, "text_encoder_2")
    pipe = fluxjax.load_pipeline(model)
    with pytest.raises(ConfigError, match=f"text_encoder_2: {name} has values .*1 NaN"):
        pipe("a red circle", width=32, height=32, steps=1)


@pytest.mark.slow
def test_sharded_and_orbax_loading_and_training_see_it(model, tmp_path):
    """Filled layer by layer onto a mesh; and what is converted is converted bit by bit."""
    name = damaged_part(model, "transformer", np.inf)
    convert.run(convert.plan(model, tmp_path / "orbax", "orbax"))
    for folder in (model, tmp_path / "orbax"):
        config = pipeline_folder.read_config(folder).transformer
        mesh = make_mesh("fsdp=4,tensor=2")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fluxjax.checkpoint.placement._AT_ONCE", 0)
            with pytest.raises(ConfigError, match=f"{name} has .*1 infinite"):
                pipeline_folder.load_params(
                    folder,
                    "transformer",
                    config,
                    stacked=True,
                    dtype=jnp.float32,
                    shardings=param_shardings(config, abstract_params(config, stacked=True), mesh),
                )


def test_what_only_the_chosen_dtype_cannot_hold_is_refused(model):
    (file,) = (model / "vae").glob("*.safetensors")
    lazy, metadata = read_safetensors(file)
    wide = {key: of_array(tensor.read().astype(np.float64)) for key, tensor in lazy.items()}
    write_safetensors(file, wide, metadata)
    damage(file, DAMAGED["vae"], 1e300)
    with pytest.raises(ConfigError, match=f"{DAMAGED['vae']} has .*1 infinite"):
        open_component(model, "vae").params(stacked=False, dtype=jnp.float32)


@pytest.mark.parametrize("leaf", ["lora_A", pytest.param("lora_B", marks=pytest.mark.slow)])
def test_a_lora(tmp_path, leaf):
    template = abstract_params(pipeline_folder.read_config(EMBEDDED).transformer)
    lora = init_lora(jax.random.key(0), template, LoraConfig(rank=2, alpha=2.0))
    path = tmp_path / "lora.safetensors"
    write_lora(path, {"transformer": jax.tree.map(jnp.ones_like, lora)})
    assert flatten(read_lora(path, template).tree)
    module = DAMAGED["transformer"].removesuffix(".weight")
    for words, value in VALUES.items():
        damage(path, f"transformer.{module}.{leaf}.weight", value)
        with pytest.raises(MappingError) as error:
            read_lora(path, template)
        assert str(path) in str(error.value)
        part = {"lora_A": "A (down)", "lora_B": "B (up)"}[leaf]
        assert f"not finite: transformer.{module}: {part} ({words})" in str(error.value)


@pytest.mark.parametrize(
    "dtype",
    [
        np.float16,
        np.float32,
        np.float64,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e4m3fn,
    ],
)
def test_the_bits_of_every_dtype(dtype):
    largest = ml_dtypes.finfo(dtype).max
    good = np.array([[largest, -largest, 0], [1, -0.0, -1]], dtype)
    for array in (good, good.T, good[:, ::2], good[0, 0, ...], good[:0]):
        assert is_finite(array)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for sign in (good, -np.abs(good), np.abs(good)):
            bad = sign.copy()
            bad[1, 0] = value
            assert not is_finite(bad) and not is_finite(bad.T) and not is_finite(bad[:, ::2])
    bad = np.array([np.nan, np.nan, 1], dtype)
    assert not_finite(bad) == "2 NaN"


def test_a_value_beyond_the_first_chunk():
    array = np.zeros(2**20, np.float32)
    array[-1] = -np.inf
    assert not is_finite(array) and not_finite(array) == "1 infinite"
