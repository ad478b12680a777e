"""A folder of which a part would be lost is refused, naming the part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fluxjax.checkpoint.pipeline_folder import model_index, weights_stem
from fluxjax.checkpoint.safetensors_file import write_safetensors
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import DEV
from fluxjax.convert.completeness import check_complete
from fluxjax.convert.convert import plan

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {"a": of_array(np.zeros(2, np.float32))})


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, config in DEV.networks.items():
        weights(folder / name / f"{weights_stem(config)}.safetensors")
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        (folder / name).mkdir()
        (folder / name / f"{name}_config.json").write_text("{}")
    relist(folder)
    return folder


def relist(folder: Path, **changes) -> None:
    (folder / "model_index.json").write_text(json.dumps({**model_index(DEV), **changes}))


def test_a_whole_pipeline(pipeline: Path) -> None:
    backend = ["transformers", "TokenizersBackend"]
    nothing = [None, None]
    relist(pipeline, image_encoder=nothing, feature_extractor=nothing, note="", tokenizer=backend)
    assert check_complete(pipeline) == []


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ({"_class_name": "Flux2Pipeline"}, "Flux2Pipeline"),
        ({"_class_name": ["FluxPipeline"]}, "FluxPipeline"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "with unet, which"),
        ({"controlnet": ["diffusers", "FluxControlNetModel"]}, "with controlnet, which"),
        ({"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}, "image_encoder"),
        ({"safety_checker": ["a", 7]}, "safety_checker"),
        ({"..": ["a", "Tokenizer"]}, r"\.\."),
    ],
)
def test_what_is_not_carried_over_is_named(pipeline: Path, tmp_path: Path, index, named) -> None:
    relist(pipeline, **index)
    with pytest.raises(ValueError, match=named):
        plan(pipeline, tmp_path / "out", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", [*NETWORKS, "scheduler"])
def test_what_is_listed_and_missing_is_named(pipeline: Path, name) -> None:
    for path in (pipeline / name).iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}, which its model_index.json lists"):
        check_complete(pipeline)


@pytest.mark.parametrize(
    "extra",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "lora.ckpt",
        "lora.safetensors",
        "prior/params/_METADATA",
        "transformer/lora.safetensors.gguf",
        "deep/er/x.pt",
    ],
)
def test_weights_that_nobody_lists_are_named(pipeline: Path, extra) -> None:
    (pipeline / extra).parent.mkdir(parents=True, exist_ok=True)
    (pipeline / extra).touch()
    with pytest.raises(ValueError, match=f"holds {extra}, which would be left out"):
        check_complete(pipeline)


def test_other_forms_of_the_same_networks_are_said(pipeline: Path) -> None:
    """As published folders have them; what git and the hub keep beside is no part."""
    beside = [
        "flux1-dev.safetensors",
        "ae.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
    ]
    for name in (*beside, ".git/x.safetensors", ".cache/x.bin"):
        weights(pipeline / name)
    assert sorted(check_complete(pipeline)) == sorted(beside)


def test_folders_of_single_files_and_of_one_network(tmp_path: Path) -> None:
    flat, one = tmp_path / "flat", tmp_path / "one"
    for name in ("flux1-dev", "ae", "clip_l"):
        weights(flat / f"{name}.safetensors")
    weights(one / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (one / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_complete(flat) == check_complete(one) == []
    for folder in (flat, one):
        weights(folder / "unet.safetensors")
        with pytest.raises(ValueError, match=r"holds unet\.safetensors"):
            check_complete(folder)
