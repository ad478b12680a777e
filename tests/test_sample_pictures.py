"""What is drawn from pictures: each task is that of diffusers' pipeline, seed for seed."""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import pipelines
from diffusers.pipelines.flux import pipeline_flux_kontext_inpaint
from einops import rearrange
from PIL import Image, ImageChops, ImageDraw
from test_sample import compilations, same_picture
from torch_pipeline import save_random_pipeline
from torch_reference import relative_l2

import fluxjax
from fluxjax.checkpoint.component_json import original_config
from fluxjax.checkpoint.pipeline_folder import model_index, read_config
from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.safetensors_file import read_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import DEV, ConfigError
from fluxjax.families import FLUX, Conditioning, Steps
from fluxjax.models.autoencoder import normalize_latents
from fluxjax.models.flux import FluxTransformer
from fluxjax.networks import network_of
from fluxjax.sample import edges
from fluxjax.sample.denoise_pictures import Drawn, denoise_pictures
from fluxjax.sample.masks import crop_box, pasted
from fluxjax.sample.noise import draw
from fluxjax.sample.override import override
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.preview import Preview
from fluxjax.sample.reference import pixels
from fluxjax.schedules.flow_euler import flow_euler
from fluxjax.schedules.schedule import pad

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
    "inpaint": (
        "text",
        "FluxInpaintPipeline",
        ("image", "mask"),
        {"strength": 0.85, "negative_prompt": "a yellow heart", "true_cfg": 2.0},
    ),
    "crop": ("text", "FluxInpaintPipeline", ("image", "mask"), {"strength": 1.0, "mask_crop": 9}),
    "fill": ("fill", "FluxFillPipeline", ("image", "mask"), {"strength": 1.0}),
    "fill a little": ("fill", "FluxFillPipeline", ("image", "mask"), {"strength": 0.7}),
    "control": ("control", "FluxControlPipeline", ("control",), {}),
    "control img2img": (
        "control",
        "FluxControlImg2ImgPipeline",
        ("control", "image"),
        {"strength": 0.6},
    ),
    "control inpaint": (
        "control",
        "FluxControlInpaintPipeline",
        ("control", "image", "mask"),
        {"strength": 0.8},
    ),
    "kontext inpaint": ("text", "FluxKontextInpaintPipeline", ("reference", "mask"), {}),
    "kontext inpaint by another": (
        "text",
        "FluxKontextInpaintPipeline",
        ("image", "mask", "reference"),
        {"strength": 0.9},
    ),
}
THEIRS = {"mask": "mask_image", "control": "control_image", "reference": "image_reference"}


QUICK = ("img2img", "crop")


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=() if t in QUICK else pytest.mark.slow) for t in TASKS]
)
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
    renamed = {"true_cfg": "true_cfg_scale"}
    options = {renamed.get(k, k): v for k, v in chosen.items() if k != "mask_crop"}
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
        **size,
        **options,
        **theirs_only,
    ).images
    got = ours("a red circle", seed=7, steps=5, guidance=3.5, number=2, **given, **size, **chosen)
    for one, other in zip(got, expected, strict=True):
        same_picture(one, other)
    assert np.abs(np.asarray(got[0], int) - np.asarray(got[1], int)).mean() > 1


@pytest.mark.slow
def test_only_the_kind_of_task_compiles(both):
    """Strengths of one number of steps, masks, their softness and pictures are data."""
    ours, _ = both("text", "FluxPipeline")
    chosen = {"width": 64, "height": 64, "max_sequence_length": 24, "steps": 8}
    given = {"image": photo(), "mask": hole()}
    with compilations() as seen:
        first = ours("a star", **given, strength=0.5, **chosen)[0]
    assert seen, "the count itself must work"
    inverted = Image.eval(hole(), lambda value: 255 - value)
    with compilations() as seen:
        for change in (
            {"strength": 0.9},
            {"mask": inverted},
            {"image": photo(3)},
            {"soft_mask": True, "mask": Image.linear_gradient("L").resize((203, 121))},
            {"mask_crop": 8},
            {"steps": 6},
        ):
            other = ours("a star", **{**given, "strength": 0.5, **chosen, **change})[0]
            assert np.asarray(other).tobytes() != np.asarray(first).tobytes(), change
    assert not seen
    with compilations() as seen:
        for strength in (0.3, 1.0):
            ours("a star", image=photo(), strength=strength, **chosen)
        ours("a star", **chosen)
    assert len(seen) == 1, "image to image is the program of text to image"


def test_soft_masks_change_more_where_they_are_whiter(both):
    ours, _ = both("text", "FluxPipeline")
    chosen = {"max_sequence_length": 24, "steps": 8, "strength": 1.0, "width": 64, "height": 64}
    image = photo(size=(64, 64))

    def drawn(mask: Image.Image | None, **more) -> np.ndarray:
        given = {} if mask is None else {"mask": mask, "soft_mask": True}
        return np.asarray(ours("a star", image=image, **given, **{**chosen, **more})[0], int)

    grey = [drawn(Image.new("L", (64, 64), value)) for value in (0, 60, 140, 255)]
    assert np.abs(grey[3] - drawn(None)).max() <= 1  # which is another program
    changed = [np.abs(one - grey[0]).mean() for one in grey]
    assert changed == sorted(changed) and changed[1] > 0.5
    half = hole((64, 64))
    plain = ours("a star", image=image, mask=half, **chosen)[0]
    np.testing.assert_array_equal(drawn(half), np.asarray(plain, int))


def test_a_crop_leaves_the_rest_as_it_was_to_the_pixel(both):
    ours, _ = both("text", "FluxPipeline")
    image = photo()
    (drawn,) = ours("a star", image=image, mask=hole(), mask_crop=5, steps=4, **SMALL)
    assert drawn.size == image.size
    apart = np.abs(np.asarray(drawn, int) - np.asarray(image, int)).max(-1)
    white = np.asarray(hole()) > 0
    assert not apart[~white].any() and apart[white].mean() > 5


SLOPE = Image.linear_gradient("L").resize((96, 64))
NOISE_MASKS = [
    {},
    {"strength": 0.7},
    {"expand": (16, 0, 0, 0)},
    {"mask": ImageChops.multiply(SLOPE, hole((96, 64))), "soft_mask": True},
    {"mask": SLOPE, "rounding": "bfl"},
    {"number": 2, "seed": [5, 6], "negative_prompt": "", "true_cfg": 2.0},
]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", NOISE_MASKS, ids=lambda one: " ".join(one) or "plain")
def test_a_noise_mask_keeps_the_autoencoders_latents_outside_of_the_mask(both, chosen):
    """Those of the posterior's mean, to the bit, wherever all eight by eight pixels are black."""
    ours, _ = both("fill", "FluxFillPipeline")
    shown = {"image": photo(size=(96, 64)), "mask": hole((96, 64)), **chosen}
    steps = {"steps": 4, "max_sequence_length": 24}
    states: dict[int, np.ndarray] = {}

    def drawn(prompt: str, **more) -> tuple[list[np.ndarray], np.ndarray]:
        pictures = ours(prompt, **shown, **steps, **more, on_step=states.__setitem__)
        return [np.asarray(one, int) for one in pictures], states[max(states)]

    kept, latents = drawn("a red circle", noise_mask=True)
    border = [(0, 0), (16 if "expand" in chosen else 0, 0)]
    values = np.pad(np.asarray(shown["mask"], np.float32) / 255, border, constant_values=1)
    painted = values > 0 if "soft_mask" in chosen else values >= 0.5
    cells = rearrange(painted, "(h y) (w x) -> h w (y x)", y=8, x=8).any(-1)
    assert 10 < cells.sum() < cells.size - 10
    # Next to a black border the autoencoder would see a shadow, which the picture would keep.
    seen = np.pad(pixels(shown["image"], 96, 64), [(0, 0), *border, (0, 0)], "edge")
    mean = normalize_latents(ours.encode_posterior(seen)[0], ours.config.vae)
    if "rounding" in chosen:
        mean = ours.encode_pictures(seen)
    for one in latents:
        np.testing.assert_array_equal(one[:, ~cells], np.asarray(mean)[0][:, ~cells])
        drawn_anew = np.abs(one - mean[0])[:, cells].mean(0)
        assert drawn_anew.mean() > 0.1 and ("soft_mask" in chosen or drawn_anew.min() > 0.01)
    other, _ = drawn("a yellow heart", noise_mask=True)
    plain, free = drawn("a red circle")
    assert np.abs(free - np.asarray(mean))[:, :, ~cells].mean() > 0.1
    for one, by_prompt, without in zip(kept, other, plain, strict=True):
        assert np.abs(one - by_prompt)[painted].mean() > 1
        assert np.abs(one - without).mean() > 1


@pytest.mark.slow
def test_a_reference_is_cropped_as_its_mask_is(both, monkeypatch):
    """What is edited is seen where and as large as it is drawn; diffusers leaves the crop at that,
    and here it is put back."""
    ours, theirs = both("text", "FluxKontextInpaintPipeline")
    picture, mask = photo(size=(128, 80)), hole((128, 80))
    monkeypatch.setattr(pipeline_flux_kontext_inpaint, "PREFERRED_KONTEXT_RESOLUTIONS", [(128, 80)])
    monkeypatch.setattr(ours, "reference_size", lambda picture: (128, 80))
    size = {"width": 128, "height": 80, "max_sequence_length": 24}
    (drawn,) = theirs(
        prompt="a red circle",
        image=picture,
        mask_image=mask,
        padding_mask_crop=3,
        strength=1.0,
        num_inference_steps=5,
        guidance_scale=3.5,
        generator=torch.Generator().manual_seed(7),
        max_area=128 * 80,
        **size,
    ).images
    box = crop_box(mask, 128, 80, 3)
    (got,) = ours(
        "a red circle",
        seed=7,
        steps=5,
        guidance=3.5,
        reference=picture,
        mask=mask,
        mask_crop=3,
        **size,
    )
    same_picture(got, pasted(drawn, picture, mask, box))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fill", "text"])
def test_a_border_is_painted_and_the_picture_kept(both, kind):
    ours, _ = both(kind, "FluxPipeline")
    seen = {}
    whole = ours.encode_posterior
    ours.encode_posterior = lambda pixels: (
        seen.setdefault("last", []).append(pixels) or whole(pixels)
    )
    try:
        (drawn,) = ours(
            "a star",
            image=photo(size=(96, 64)),
            expand=(32, 0, 0, 16),
            steps=4,
            strength=1.0,
            max_sequence_length=24,
        )
    finally:
        del ours.encode_posterior
    assert drawn.size == (128, 80), "the picture's and its border's"
    image = next(one[0] for one in seen["last"] if one.min() == -1 and (one[0, 64:] == -1).all())
    assert (image[:64, :32] == -1).all()
    np.testing.assert_array_equal(image[:64, 32:], pixels(photo(size=(96, 64)), 96, 64)[0])
    if kind == "fill":  # what is cut out is grey
        (masked,) = (one[0] for one in seen["last"] if (one[0] != image).any())
        assert not masked[64:].any() and not masked[:, :32].any()
        np.testing.assert_array_equal(masked[:60, 40:], image[:60, 40:])


@pytest.mark.slow
def test_pictures_of_every_kind_are_seen_upright_and_in_colour(both, tmp_path):
    ours, _ = both("text", "FluxPipeline")
    picture = photo(size=(64, 48))
    files = {"plain.png": picture, "alpha.png": picture.convert("RGBA")}
    for name, one in files.items():
        one.save(tmp_path / name)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    chosen = {"steps": 2, "strength": 0.5, "max_sequence_length": 24}
    drawn = [
        np.asarray(ours("a star", image=given, **chosen)[0])
        for given in (picture, *(tmp_path / name for name in (*files, "turned.png")))
    ]
    assert drawn[0].shape == (48, 64, 3)
    for one in drawn[1:]:
        np.testing.assert_array_equal(one, drawn[0])
    holes = picture.convert("RGBA")
    holes.putalpha(Image.eval(hole((64, 48)), lambda value: 255 - value))
    over_white = Image.alpha_composite(Image.new("RGBA", holes.size, "white"), holes)
    expected = ours("a star", image=over_white, mask=hole((64, 48)), **chosen)[0]
    got = ours("a star", image=holes, mask="alpha", **chosen)[0]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


WRONG = [
    ("text", {"mask": hole()}, "from text alone, .* or from an image and a mask.* given a mask"),
    ("text", {"control": photo()}, "was given a control"),
    ("text", {"image": photo(), "reference": photo()}, "was given a reference and an image"),
    ("text", {"image": photo(), "mask": hole((50, 60))}, "has 50 x 60 pixels, the image 203 x 121"),
    ("text", {"image": photo(), "strength": 0.0}, "strength must be above 0"),
    ("text", {"strength": 0.5}, "give an image"),
    ("text", {"image": photo(), "mask": Image.new("L", (203, 121)), "mask_crop": 3}, "all black"),
    (
        "text",
        {
            "image": photo(0, (2000, 16)),
            "mask": Image.new("L", (2000, 16), 255),
            "mask_crop": 3,
            **SMALL,
        },
        "cuts out 2000 x 16 pixels, less than a line of a picture of 96 x 64",
    ),
    ("text", {"image": photo(size=(15, 90))}, "at least 16 pixels on each side, got 15 x 90"),
    ("text", {"image": np.zeros((9, 9, 3))}, "image must be a picture of Pillow or a file's path"),
    ("text", {"image": photo(), "mask": "alpha"}, "no transparency"),
    ("text", {"canny": (50, 200)}, "give a control"),
    ("text", {"image": photo(), "mask_crop": 0}, "give a mask"),
    ("text", {"expand": (1, 2, 3, 4)}, "give an image"),
    ("text", {"noise_mask": True}, "noise_mask is for models that read a mask"),
    ("text", {"noise_mask": False}, "noise_mask is for models that read a mask"),
    (
        "text",
        {"image": photo(), "mask": hole(), "noise_mask": True},
        "such as FLUX.1 Fill and tiny-fill; others keep what lies outside of a mask without it",
    ),
    ("text", {"control": [None, photo()]}, "control_2 is given without control: give that too"),
    ("text", {"ip_image": [photo(), None, photo()]}, "ip_image_3 is given without ip_image_2"),
    ("fill", {"noise_mask": True}, "draws from an image and a mask; it was given text alone"),
    ("fill", {}, "draws from an image and a mask; it was given text alone"),
    ("fill", {"image": photo()}, "draws from an image and a mask; it was given an image"),
    ("control", {}, "from a control, or from a control and an image, or from a control, an image "),
    ("control", {"image": photo(), "mask": hole()}, "it was given an image and a mask"),
]


@pytest.mark.parametrize(("kind", "given", "words"), WRONG)
def test_what_a_model_does_not_take_is_said(both, kind, given, words):
    ours, _ = both(kind, "FluxPipeline")
    with pytest.raises(ConfigError, match=words):
        ours("a star", steps=2, **given)


def test_each_model_has_its_published_defaults(folder, both, tmp_path):
    defaults = {kind: both(kind, "FluxPipeline")[0].defaults for kind in CHANNELS}
    assert (defaults["fill"].steps, defaults["fill"].guidance) == (50, 30.0)
    assert (defaults["control"].steps, defaults["control"].guidance) == (28, 30.0)
    assert (defaults["text"].steps, defaults["text"].guidance) == (28, 3.5)
    depth = tmp_path / "FLUX.1-Depth-dev"
    depth.symlink_to(folder("control"))
    assert read_config(depth).guidance == 10.0
    cached = tmp_path / "models--black-forest-labs--FLUX.1-Depth-dev" / "snapshots" / "0a1b"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(folder("control"))
    assert read_config(cached).guidance == 10.0
    named = {kind: model_index(both(kind, "FluxPipeline")[0].config) for kind in CHANNELS}
    assert [one["_class_name"] for one in named.values()] == [
        "FluxPipeline",
        "FluxControlPipeline",
        "FluxFillPipeline",
    ]


@pytest.mark.slow
def test_edges_are_opencvs_at_the_size_that_is_drawn(both):
    cv2 = pytest.importorskip("cv2")
    ours, _ = both("control", "FluxControlPipeline")
    chosen = {"steps": 2, **SMALL}
    small = photo().resize((96, 64), Image.Resampling.LANCZOS)
    edges = Image.fromarray(cv2.Canny(np.asarray(small), 50, 200))
    assert 0 < np.asarray(edges).mean() < 250
    expected = ours("a star", control=edges, **chosen)[0]
    got = ours("a star", control=photo(), canny=(50, 200), **chosen)[0]
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_without_opencv_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(edges, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"canny needs OpenCV: pip install 'fluxjax\[control\]'"):
        edges.canny_edges(photo(), 64, 64, (50, 200))


@pytest.mark.slow
def test_bfl_encodes_the_mean_keeps_masks_soft_and_reads_128_tokens(both, monkeypatch):
    """BFL's Fill draws noise alone; its mask is what the picture says, in pixels and channels."""
    ours, _ = both("fill", "FluxFillPipeline")
    seen = {}
    denoise = ours.denoise
    monkeypatch.setattr(
        ours,
        "denoise",
        lambda heard, noise, **all: (
            seen.update(all, noise=noise, heard=heard) or denoise(heard, noise, **all)
        ),
    )
    given = {"image": photo(size=(64, 64)), "mask": Image.new("L", (64, 64), 51)}
    ours("a star", **given, steps=2, rounding="bfl", seed=3)
    noise = draw(3, (1, 16, 8, 8))
    np.testing.assert_array_equal(seen["noise"], noise)
    assert seen["heard"].sequence.shape[1] == 128
    channels = seen["inputs"].channels
    np.testing.assert_allclose(channels[:, 16:], 0.2, atol=1e-6)
    whole = ours.encode_pictures(0.8 * pixels(given["image"], 64, 64))
    np.testing.assert_allclose(channels[:, :16], whole, atol=1e-5)
    ours("a star", **given, steps=2, seed=3, max_sequence_length=24)
    assert not seen["inputs"].channels[:, 16:].any() and not np.array_equal(seen["noise"], noise)


@pytest.mark.slow
def test_the_recorded_fill_is_drawn_by_the_sampler(shared):
    """BFL's own run, its channels joined as the pipeline joins them."""
    path = shared / "goldens" / "bfl_flux_fill.safetensors"
    tensors, metadata = read_safetensors(path)
    recorded = json.loads(metadata["config"])
    config = original_config(recorded["params"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k[:8] == "weights."}
    inputs = {k[7:]: v.read() for k, v in tensors.items() if k.startswith("inputs.")}
    noise, count = inputs["noise"], len(inputs["noise"])
    channels = FLUX.unpack(inputs["img_cond"], *noise.shape[2:])
    levels = np.asarray(recorded["schedule"], np.float32)
    schedule = pad(flow_euler(levels))
    drawn = Drawn(
        schedule,
        FLUX.passes(len(schedule.times), None),
        (Conditioning(inputs["txt"], None, inputs["vec"]),),
        np.full(count, recorded["guidance"], np.float32),
        channels=(channels,),
    )
    module = FluxTransformer(config, timestep_rounding="bfl")
    table = network_of(config).dialect("bfl").table(config)
    params = load_tree(weights, table, abstract_params(config))
    (latents,) = denoise_pictures(FLUX, module, (), params, (), (noise,), drawn)
    expected = tensors["outputs.latents"].read()
    assert relative_l2(np.asarray(latents), expected) <= 1e-4
    # Its mask, in pixels, is packed as BFL packs it.
    mask = np.random.default_rng(0).random((1, 32, 48), np.float32)
    packed = FLUX.pack(FLUX.mask_channels(mask, DEV)).values
    theirs = rearrange(mask, "b (h y) (w x) -> b (y x) h w", y=8, x=8)
    theirs = rearrange(theirs, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    np.testing.assert_array_equal(packed, theirs)


@pytest.mark.slow
def test_bfloat16_is_no_further_from_float32_than_diffusers_is(both, folder):
    """Image to image and its mask, with the posterior sampled in bfloat16 too."""
    ours, _ = both("text", "FluxInpaintPipeline")
    half = fluxjax.load_pipeline(folder("text"), dtype="bfloat16")
    theirs = pipelines.FluxInpaintPipeline.from_pretrained(folder("text"), dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    given = {"image": photo(size=(96, 64)), "mask": hole((96, 64)).point(lambda v: v and 255)}
    exact = np.asarray(ours("a star", **given, strength=0.9, steps=4, **SMALL)[0], int)
    expected = theirs(
        "a star",
        image=given["image"],
        mask_image=given["mask"],
        strength=0.9,
        guidance_scale=3.5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        **SMALL,
    ).images[0]
    assert (
        half.start(
            np.zeros((1, 16, 2, 2), half.dtype),
            Inputs(image=np.zeros((1, 16, 2, 2), half.dtype)),
            FLUX.run(half.config, Steps(2, 1), 2, 2),
        ).dtype
        == half.dtype
    )
    bound = 1.5 * np.abs(np.asarray(expected, int) - exact).mean()
    for rounding in ("diffusers", "none"):
        got = half("a star", **given, strength=0.9, steps=4, rounding=rounding, **SMALL)[0]
        assert 0 < np.abs(np.asarray(got, int) - exact).mean() <= bound, rounding


@pytest.mark.slow
def test_pictures_on_a_mesh(folder, both):
    """Joined channels, a kept image and its mask, two passes, and pictures that devices share."""
    chosen = {"steps": 3, **SMALL, "number": 2, "seed": [3, 4]}
    for kind, given in (
        ("fill", {"image": photo(), "mask": hole()}),
        ("control", {"control": photo(1), "image": photo(), "mask": hole()}),
    ):
        one = both(kind, "FluxPipeline")[0]("a star", **given, **chosen)
        many = fluxjax.load_pipeline(folder(kind), mesh="sequence=2,fsdp=2,data=2")
        for got, expected in zip(many("a star", **given, **chosen), one, strict=True):
            same_picture(got, expected)


@pytest.mark.slow
def test_each_of_several_pictures_is_that_of_its_own_seed(both):
    ours, _ = both("control", "FluxPipeline")
    given = {"control": photo(1), "image": photo(), "mask": hole()}
    chosen = {"steps": 3, **SMALL}
    pair = ours("a star", **given, seed=[5, 6], number=2, **chosen)
    single = ours("a star", **given, seed=6, **chosen)[0]
    assert np.abs(np.asarray(pair[1], int) - np.asarray(single, int)).max() <= 1


def test_a_preview_begins_where_the_run_does(both):
    """The first preview of a short way from a picture is that picture, hardly anything else."""
    ours, _ = both("text", "FluxPipeline")
    shown = {}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "image.png"
        photo(size=(64, 64)).save(path)
        settings = override(
            ours.defaults,
            {
                "image": str(path),
                "strength": 0.3,
                "steps": 10,
                "width": 64,
                "height": 64,
                "max_sequence_length": 24,
            },
        )
        preview = Preview(ours, settings, 0, shown.__setitem__, decoder=True)
        drawn = ours.draw(settings, on_step=preview)
    assert list(shown) == [1, 2, 3], "three steps of ten"
    np.testing.assert_array_equal(shown[3], drawn)
    assert np.abs(shown[1].astype(int) - drawn).mean() < 60
