"""Weights in few bits of Stable Diffusion, 3 and PixArt: written, read, kept in codes and drawn."""

from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGUFReader
from random_checkpoints import hf_arrays
from stable_diffusion_folders import save_stable_diffusion
from test_pixart import TINY as PIXART
from test_sd3 import TINIES as SD3
from test_unet import TINIES as UNETS

import fluxjax
from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import ConfigError
from fluxjax.convert.__main__ import main as convert
from fluxjax.models.names import flatten
from fluxjax.models.quantised import Quantised
from fluxjax.networks import network_of

pytestmark = pytest.mark.slow
NETWORKS = {"1.5": UNETS["1.5"], "XL": UNETS["XL"], "3.5": SD3["3.5"], "PixArt": PIXART}


def codes(params) -> list[str]:
    return [path[-2] for path, leaf in flatten(params).items() if isinstance(leaf, Quantised)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_forward_of_codes_is_that_of_their_values(name, tmp_path):
    """All products of attention and MLPs, in the file's codes: GGUF where others write it."""
    config = NETWORKS[name]
    known, source, out = network_of(config), tmp_path / "source", tmp_path / "out"
    source.mkdir()
    arrays = hf_arrays(config)
    file = "diffusion_pytorch_model.safetensors"
    write_safetensors(source / file, {k: of_array(v) for k, v in arrays.items()})
    write_json(source / "config.json", config_json(config))
    kind = "q8_0" if network_of(config).component == "unet" else "int8"
    assert convert([str(source), str(out), "--quantise", kind]) == 0
    if kind == "q8_0":
        architecture = GGUFReader(out / "unet.gguf").fields["general.architecture"]
        assert architecture.contents() == {"1.5": "sd1", "XL": "sdxl"}[name]
    (network,) = open_source(out).values()
    kept, values = (
        network.params(stacked=False, dtype=np.float32, quantise=how) for how in ("keep", "none")
    )
    assert {"to_q", "to_k", "to_v", "net_2"} <= set(codes(kept)) and not codes(values)
    forward = jax.jit(
        lambda params, inputs: known.build(config).apply({"params": params}, **inputs)
    )
    got, expected = (np.asarray(forward(p, known.inputs(config))) for p in (kept, values))
    assert np.linalg.norm(got - expected) < 2e-6 * np.linalg.norm(expected)


def test_a_pipeline_in_codes_draws_with_them(shared, tmp_path):
    """Of CLIP the values: only loading puts it into codes."""
    folder = save_stable_diffusion(tmp_path / "sd", shared / "tokenizers")
    assert convert([str(folder), str(tmp_path / "int8"), "--quantise", "int8"]) == 0
    choices: dict[str, Any] = {"steps": 2, "seed": 3, "width": 32, "height": 32}
    pipelines = {
        how: fluxjax.load_pipeline(tmp_path / "int8", quantise=how) for how in ("keep", "none")
    }
    assert pipelines["keep"].executables.quantised.keys() == {"unet"}
    kept, values = (
        np.asarray(each("a red circle", **choices)[0], int) for each in pipelines.values()
    )
    assert np.abs(kept - values).max() <= 1
    loaded = fluxjax.load_pipeline(folder, quantise="int8")
    assert loaded.executables.quantised.keys() == {"unet", "text_encoder"}
    with pytest.raises(ConfigError, match="no layer of the unet has rows that are whole blocks"):
        fluxjax.load_pipeline(folder, quantise="q4_k")
    with pytest.raises(ConfigError, match="convert it by itself"):
        convert([str(folder), str(tmp_path / "q8_0"), "--quantise", "q8_0"])
