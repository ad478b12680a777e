"""What is drawn from pictures: each task is that of diffusers' pipeline, seed for seed."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import pipelines
from diffusers.pipelines.flux import pipeline_flux_kontext_inpaint
from PIL import Image, ImageDraw
from test_sample import same_picture
from torch_pipeline import save_random_pipeline

import fluxjax

CHANNELS = {"text": 64, "control": 128, "fill": 384}
SMALL = {"width": 96, "height": 64, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """kind -> the folder of a random pipeline."""

    @cache
    def saved(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        return save_random_pipeline(path, shared / "tokenizers", in_channels=CHANNELS[kind])

    return saved


@pytest.fixture(scope="module")
def both(folder):
    """(kind, class) -> (ours, diffusers')."""

    @cache
    def ours(kind: str):
        return fluxjax.load_pipeline(folder(kind))

    @cache
    def parts(kind: str):
        return pipelines.FluxPipeline.from_pretrained(folder(kind)).components

    def made(kind: str, name: str):
        own = {
            k: v for k, v in parts(kind).items() if k not in ("image_encoder", "feature_extractor")
        }
        theirs = getattr(pipelines, name)(**own)
        theirs.set_progress_bar_config(disable=True)
        return ours(kind), theirs

    return made


def photo(seed: int = 0, size: tuple[int, int] = (203, 121)) -> Image.Image:
    """Of a size that no autoencoder takes, with shapes in it."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize(size)
    ImageDraw.Draw(picture).ellipse((30, 20, 120, 90), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def hole(size: tuple[int, int] = (203, 121)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((60, 30, 150, 100), fill=255)
    return mask


TASKS = {
    "img2img": ("text", "FluxImg2ImgPipeline", ("image",), {"strength": 0.6}),
    "inpaint": ("text", "FluxInpaintPipeline", ("image", "mask"), {"strength": 0.85}),
    "crop": ("text", "FluxInpaintPipeline", ("image", "mask"), {"strength": 1.0, "mask_crop": 9}),
    "fill": ("fill", "FluxFillPipeline", ("image", "mask"), {"strength": 1.0}),
    "fill a little": ("fill", "FluxFillPipeline", ("image", "mask"), {"strength": 0.7}),
    "control": ("control", "FluxControlPipeline", ("control",), {}),
    "control img2img": (
        "control", "FluxControlImg2ImgPipeline", ("control", "image"), {"strength": 0.6},
    ),
    "control inpaint": (
        "control", "FluxControlInpaintPipeline", ("control", "image", "mask"), {"strength": 0.8},
    ),
    "kontext inpaint": ("text", "FluxKontextInpaintPipeline", ("reference", "mask"), {}),
    "kontext inpaint by another": (
        "text", "FluxKontextInpaintPipeline", ("image", "mask", "reference"), {"strength": 0.9},
    ),
}  # fmt: skip
THEIRS = {"mask": "mask_image", "control": "control_image", "reference": "image_reference"}


@pytest.mark.parametrize("task", TASKS)
def test_same_pictures_as_diffusers(both, task, monkeypatch):
    """Two at once, from pictures of odd sizes, with noise of our own for the same seed."""
    kind, name, pictures, chosen = TASKS[task]
    ours, theirs = both(kind, name)
    given = {"image": photo(), "mask": hole(), "control": photo(1), "reference": photo(2)}
    given = {name: given[name] for name in pictures}
    names = {key: THEIRS.get(key, key) for key in given}
    if task == "kontext inpaint":
        names["reference"] = "image"
    crop = chosen.get("mask_crop")
    options = {k: v for k, v in chosen.items() if k != "mask_crop"}
    theirs_only = {} if crop is None else {"padding_mask_crop": crop}
    size = dict(SMALL)
    if "reference" in given:  # of the shape nearest to the picture's
        size = {"max_sequence_length": 24, "width": 128, "height": 80}
        one = [(128, 80)]
        monkeypatch.setattr(pipeline_flux_kontext_inpaint, "PREFERRED_KONTEXT_RESOLUTIONS", one)
        monkeypatch.setattr(ours, "reference_size", lambda picture: one[0])
        theirs_only["max_area"] = 128 * 80
    expected = theirs(
        prompt="a red circle",
        num_inference_steps=5,
        guidance_scale=3.5,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(7),
        **{names[key]: value for key, value in given.items()},
        **size, **options, **theirs_only,
    ).images  # fmt: skip
    got = ours("a red circle", seed=7, steps=5, guidance=3.5, number=2, **given, **size, **chosen)
    for one, other in zip(got, expected, strict=True):
        same_picture(one, other)
    assert np.abs(np.asarray(got[0], int) - np.asarray(got[1], int)).mean() > 1
