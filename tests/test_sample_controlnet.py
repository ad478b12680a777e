"""Pictures by ControlNets: those of diffusers' FluxControlNet pipelines, seed for seed."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxMultiControlNetModel, FluxPipeline, pipelines
from test_sample import compilations, same_picture
from test_sample_pictures import hole, photo
from torch_pipeline import random_pipeline  # noqa: F401

import fluxjax
from fluxjax.config import ConfigError
from fluxjax.sample.command import draw
from fluxjax.sample.given_options import check
from fluxjax.sample.options import Options
from fluxjax.sample.picture_formats import read_record

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")  # diffusers' own

SIZES = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 0,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
KINDS = {
    "union": {"num_mode": 10, "num_single_layers": 1},
    "plain": {},
    "deep": {"num_layers": 2},
    "pixels": {"conditioning_embedding_channels": 16, "patch_size": 2},
    "wide": {"attention_head_dim": 8, "num_attention_heads": 8, "axes_dims_rope": (2, 2, 4)},
}
DRAW = {"width": 96, "height": 64, "max_sequence_length": 24, "steps": 5, "guidance": 3.5}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """kind -> (folder, diffusers' ControlNet with random weights)."""

    @cache
    def saved(kind: str):
        torch.manual_seed(3)
        net = FluxControlNetModel(**{**SIZES, **KINDS[kind]}).eval()
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if not weight.any():
                    weight.copy_(0.4 * torch.randn_like(weight))
                if "hint_block" in name and weight.ndim > 1:  # lest eight convolutions fade it
                    weight.mul_(3)
        folder = tmp_path_factory.mktemp("nets") / kind
        net.save_pretrained(folder)
        return folder, net

    return saved


@pytest.fixture(scope="module")
def ours(nets, random_pipeline):  # noqa: F811
    @cache
    def loaded(*kinds: str):
        folders = [nets(kind)[0] for kind in kinds]
        return fluxjax.load_pipeline(random_pipeline, controlnet=folders, scan_layers=False)

    return loaded


@pytest.fixture(scope="module")
def parts(random_pipeline):  # noqa: F811
    found = FluxPipeline.from_pretrained(random_pipeline).components
    return {k: v for k, v in found.items() if k not in ("image_encoder", "feature_extractor")}


MODES = {"controlnet_conditioning_scale": 0.7, "control_mode": 2}
DEPTH = {"control_scale": 0.7, "control_mode": "depth"}
RANGE = {"control_guidance_start": 0.2, "control_guidance_end": 0.8}
CASES = {
    "union": (["union"], "", {**MODES, **RANGE}, {**DEPTH, "control_range": (0.2, 0.8)}),
    "plain": (
        ["plain"],
        "",
        {"true_cfg_scale": 2.0, "negative_prompt": "a heart"},
        {"true_cfg": 2.0, "negative_prompt": "a heart"},
    ),
    "pixels": (["pixels"], "", {}, {}),
    "two": (
        ["union", "union"],
        "",
        {"control_mode": [0, 4], "controlnet_conditioning_scale": [0.5, 0.9]},
        {"control_mode": ["canny", 4], "control_scale": [0.5, 0.9]},
    ),
    # The deeper one's second sample is left out, and the union's of single blocks where it comes
    # second.
    "deep first": (
        ["deep", "union"],
        "",
        {"control_mode": [None, 2], "controlnet_conditioning_scale": [0.6, 0.9]},
        {"control_mode": [None, 2], "control_scale": [0.6, 0.9]},
    ),
    "deep second": (
        ["union", "deep"],
        "",
        {"control_mode": [2, None], "controlnet_conditioning_scale": [0.6, 0.9]},
        {"control_mode": [2, None], "control_scale": [0.6, 0.9]},
    ),
    # Of a union's mode their pipelines have one row, whatever the number of pictures.
    "image": (
        ["plain"],
        "Img2Img",
        {"controlnet_conditioning_scale": 0.7, "strength": 0.7},
        {"control_scale": 0.7, "strength": 0.7},
    ),
    "mask": (
        ["plain"],
        "Inpaint",
        {**RANGE, "strength": 0.8},
        {"control_range": (0.2, 0.8), "strength": 0.8},
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "union" else pytest.mark.slow) for c in CASES]
)
def test_same_pictures_as_diffusers(nets, ours, parts, case):
    """Two at once, from control pictures of odd sizes."""
    kinds, task, theirs_only, ours_only = CASES[case]
    control = [photo(i, (203, 121 + i)) for i in range(len(kinds))]
    control = control if len(control) > 1 else control[0]
    given, theirs_given = {"control": control}, {"control_image": control}
    if task:
        given["image"] = theirs_given["image"] = photo(5)
    if task == "Inpaint":
        given["mask"] = theirs_given["mask_image"] = hole()
    found = [nets(kind)[1] for kind in kinds]
    net = found[0] if len(found) == 1 else FluxMultiControlNetModel(found)
    pipe = getattr(pipelines, f"FluxControlNet{task}Pipeline")(controlnet=net, **parts)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt="a red circle",
        num_images_per_prompt=2,
        guidance_scale=3.5,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(7),
        width=96,
        height=64,
        max_sequence_length=24,
        **theirs_given,
        **theirs_only,
    ).images
    got = ours(*kinds)("a red circle", seed=7, number=2, **DRAW, **given, **ours_only)
    for one, other in zip(got, expected, strict=True):
        same_picture(one, other)
    change = {"control": photo(9)}
    (other,) = ours(*kinds)("a red circle", seed=7, **DRAW, **{**given, **change}, **ours_only)
    assert np.abs(np.asarray(got[0], int) - np.asarray(other, int)).mean() > 1


def test_what_a_control_is_compiles_nothing(ours):
    pipe = ours("union")
    given = {**DRAW, **DEPTH, "control": photo()}
    first = pipe("a star", **given)[0]
    with compilations() as seen:
        for change in (
            {"control_scale": 0.2},
            {"control_range": (0.0, 0.5)},
            {"control_mode": "canny"},
            {"control": photo(3)},
            {"image": photo(4), "strength": 0.5},
            {"canny": (50, 200)},
        ):
            other = pipe("a star", **{**given, **change})[0]
            assert other.tobytes() != first.tobytes(), change
    assert not seen


@pytest.mark.slow
def test_zero_and_no_range_draw_without(ours, random_pipeline):  # noqa: F811
    # Otherwise the noise of the control would be drawn first.
    given = {**DRAW, **DEPTH, "control": photo(), "rounding": "bfl"}
    without = ours("union")("a star", **{**given, "control_scale": 0.0})[0]
    (plain,) = fluxjax.load_pipeline(random_pipeline, scan_layers=False)(
        "a star", **DRAW, rounding="bfl"
    )
    same_picture(without, plain)
    never = ours("union")("a star", **{**given, "control_range": (0.01, 0.1)})[0]
    assert never.tobytes() == without.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "data=2,sequence=4"])
def test_a_mesh_draws_what_one_device_draws(nets, ours, random_pipeline, mesh):  # noqa: F811
    given = {**DRAW, "control": photo(0, (96, 64)), "control_mode": "canny", "number": 2}
    pipe = fluxjax.load_pipeline(
        random_pipeline,
        controlnet=nets("union")[0],
        scan_layers=False,
        mesh=mesh,
    )
    for one, other in zip(ours("union")("a heart", **given), pipe("a heart", **given), strict=True):
        same_picture(other, one)


@pytest.mark.slow
def test_the_command_records_and_repeats(nets, random_pipeline, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        photo(i).save(f"{i}.png")
    folder = str(nets("union")[0])
    options = Options(
        prompt=("a star",),
        model=str(random_pipeline),
        quiet=True,
        seed=3,
        steps=2,
        width=64,
        height=48,
        max_sequence_length=24,
        controlnet=(f"{folder}:0.6", folder),
        control=("0.png", "1.png"),
        control_mode=("canny", "depth"),
        control_range=("0,0.5",),
        out=tmp_path / "first.png",
        dtype="bfloat16",
    )
    draw(options)
    record = read_record(tmp_path / "first.png")
    assert record["controlnet"] == ["union:0.6", "union:1"]
    assert record["settings"]["control_2"] == "1.png"
    assert "controlnet 1 files" in record["sha256"]
    like = Options(like=tmp_path / "first.png", quiet=True, out=tmp_path / "again.png")
    draw(like)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    photo(5).save("1.png")
    with pytest.raises(ConfigError, match=r"1.png has changed since it was the control_2"):
        draw(replace(like, out=tmp_path / "third.png"))
    photo(1).save("1.png")
    lines = [{"prompt": "a star", "control_2": "0.png"}, {"prompt": "a star", "control_scale": [1]}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    many = replace(options, prompt=(), prompts=tmp_path / "lines.jsonl", out=tmp_path / "many")
    draw(replace(many, grid=True))
    assert len(list((tmp_path / "many").iterdir())) == 3


def test_what_cannot_be_is_one_sentence(ours, nets, random_pipeline, tmp_path):  # noqa: F811
    plain = fluxjax.load_pipeline(random_pipeline, scan_layers=False)
    union, pair = ours("union"), ours("union", "plain")
    for pipe, given, message in (
        (union, {}, "draws from a control, or from a control and an image.*was given text alone"),
        (union, {"control": photo()}, "needs a control_mode.*canny, tile"),
        (union, {"control": photo(), "control_mode": "edges"}, "control_mode must be one of canny"),
        (union, {"control": photo(), "control_mode": 10}, "has the modes 0 to 9"),
        (union, {"control": [photo()] * 2, **DEPTH}, "control is given 2 times for 1 Control"),
        (union, {"control": [photo()] * 4, **DEPTH}, "at most 3 controls"),
        (union, {"control": photo(), "control_range": (0.5, 0.2)}, "start and a later end"),
        (
            union,
            {"control": photo(), "control_scale": [1.0, 2.0, 3.0], "control_mode": 1},
            "control_scale is given 3 times for 1",
        ),
        (
            pair,
            {"control": photo(), "control_mode": ["canny", "depth"]},
            "control_mode is given 2 times",
        ),
        (ours("plain"), {"control": photo(), "control_mode": "canny"}, "knows one kind"),
        (ours("plain"), {"control": photo(), "reference": photo()}, "given a reference and a con"),
        (plain, {"control_scale": 0.5}, "model has none: give a folder of one as controlnet"),
        (plain, {"control": photo()}, "this model draws from text alone, .* was given a control"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe("a star", **{**DRAW, **given})
    with pytest.raises(ConfigError, match="blocks of width 64, and the model 32: it belongs"):
        fluxjax.load_pipeline(random_pipeline, controlnet=nets("wide")[0])
    with pytest.raises(FileNotFoundError, match="no ControlNet folder"):
        fluxjax.load_pipeline(random_pipeline, controlnet=tmp_path / "nowhere")
    for options, message in (
        (Options(prompt=("a",), controlnet=("nowhere",)), "no ControlNet folder .*nowhere"),
        (Options(prompt=("a",), control_range=("0.8",)), "--control-range must be START,END"),
        (Options(prompt=("a",), control=("a.png",) * 4), "--control is given 4 times"),
    ):
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            check(options)
