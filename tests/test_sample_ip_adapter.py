"""Pictures by an IP-Adapter: those of diffusers' FLUX pipelines that have one, seed for seed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    pipelines,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from safetensors.numpy import save_file
from test_image_encoders import randomised, xlabs_file
from test_sample import compilations, same_picture
from test_sample_controlnet import nets  # noqa: F401
from test_sample_pictures import folder, hole, photo  # noqa: F401
from torch_pipeline import random_pipeline  # noqa: F401
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import fluxjax
from fluxjax.config import ConfigError, IPAdapterConfig
from fluxjax.families.clip_pixels import clip_pixels
from fluxjax.sample.command import draw
from fluxjax.sample.given_options import check
from fluxjax.sample.memory_estimate import weight_bytes
from fluxjax.sample.options import Options
from fluxjax.sample.picture_formats import read_record

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")  # diffusers' own

ADAPTER = IPAdapterConfig(
    num_layers=1, inner_dim=32, cross_attention_dim=24, image_embed_dim=18, num_tokens=4
)
SIZE = 28
DRAW = {"width": 96, "height": 64, "max_sequence_length": 24, "steps": 5, "guidance": 3.5}


def saved_adapter(room, name, **sizes):
    save_file(xlabs_file(replace(ADAPTER, **sizes)), room / f"{name}.safetensors")
    return room / f"{name}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(XLabs' file, CLIP's folder, a LoRA) with small random weights."""
    room = tmp_path_factory.mktemp("ip")
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=24,
        projection_dim=18,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=14,
    )
    randomised(CLIPVisionModelWithProjection(config)).save_pretrained(room / "clip")
    random, layer = np.random.default_rng(1), "transformer.transformer_blocks.0.attn.to_q"
    shapes = {f"{layer}.lora_A.weight": (2, 32), f"{layer}.lora_B.weight": (32, 2)}
    lora = {name: random.normal(size=size).astype(np.float32) for name, size in shapes.items()}
    save_file(lora, room / "lora.safetensors")
    return saved_adapter(room, "xlabs"), room / "clip", room / "lora.safetensors"


@pytest.fixture(scope="module")
def ours(random_pipeline, files):  # noqa: F811
    file, clip, lora = files
    return fluxjax.load_pipeline(
        random_pipeline, ip_adapter=(file, 0.7), image_encoder=clip, loras=[lora], scan_layers=False
    )


@pytest.fixture(scope="module")
def theirs(random_pipeline, files):  # noqa: F811
    file, clip, lora = files
    pipe = FluxPipeline.from_pretrained(random_pipeline)
    pipe.load_ip_adapter(
        file.parent, file.name, image_encoder_pretrained_model_name_or_path=str(clip)
    )
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def controlled(random_pipeline, files, nets):  # noqa: F811
    """Both with a ControlNet; ours with one network at a time, its blocks on the host."""

    def loaded():
        file, clip, lora = files
        pipe = fluxjax.load_pipeline(
            random_pipeline,
            ip_adapter=file,
            image_encoder=clip,
            loras=[lora],
            controlnet=nets("plain")[0],
            offload=True,
            stream=True,
        )
        return pipe, nets("plain")[1]

    return loaded


CFG = {"true_cfg": 2.0, "negative_prompt": "a heart"}
THEIR_CFG = {"true_cfg_scale": 2.0, "negative_prompt": "a heart"}
CASES = {
    "one": (0.7, 1, {}, {}),
    "guided": (1.0, 2, THEIR_CFG, CFG),
    "negative": (
        0.4,
        2,
        {**THEIR_CFG, "negative_ip_adapter_image": photo(7)},
        {**CFG, "negative_ip_image": photo(7)},
    ),
    "image": (0.7, 1, {"image": photo(5), "strength": 0.7}, {"image": photo(5), "strength": 0.7}),
    "reference": (0.7, 1, {"image": photo(5), "max_area": 96 * 64}, {"reference": photo(5)}),
    "control": (0.7, 1, {"control_image": photo(5)}, {"control": photo(5)}),
    "FluxFillPipeline": (
        0.7,
        2,
        {"image": photo(5), "mask_image": hole()},
        {"image": photo(5), "mask": hole()},
    ),
    "FluxControlPipeline": (0.7, 1, {"control_image": photo(5)}, {"control": photo(5)}),
}
CHANNELS = {"FluxFillPipeline": "fill", "FluxControlPipeline": "control"}


@pytest.fixture(scope="module")
def with_channels(folder, files):  # noqa: F811
    """Both of a model that reads more channels."""

    def loaded(name: str):
        (file, clip, _), model = files, folder(CHANNELS[name])
        ours = fluxjax.load_pipeline(model, ip_adapter=file, image_encoder=clip, scan_layers=False)
        pipe = FluxPipeline.from_pretrained(model)
        pipe.load_ip_adapter(
            file.parent, file.name, image_encoder_pretrained_model_name_or_path=str(clip)
        )
        others = ("image_encoder", "feature_extractor")
        parts = {k: v for k, v in pipe.components.items() if k not in others}
        theirs = getattr(pipelines, name)(**parts)
        theirs.set_ip_adapter_scale = pipe.set_ip_adapter_scale
        return ours, theirs

    return loaded


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c == "one" else pytest.mark.slow) for c in CASES]
)
def test_same_pictures_as_diffusers(ours, theirs, controlled, with_channels, case, monkeypatch):
    """Two at once, from one or two pictures of odd sizes, with a LoRA."""
    scale, count, theirs_only, ours_only = CASES[case]
    seen = [photo(i, (203, 121 + i)) for i in range(count)]
    other = {"image": FluxImg2ImgPipeline, "reference": FluxKontextPipeline}.get(case)
    pipe = other(**theirs.components) if other else theirs
    if case == "reference":
        monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(96, 64)])
        monkeypatch.setattr(ours, "defaults", replace(ours.defaults, width=96, height=64))
    if case in CHANNELS:
        ours, pipe = with_channels(case)
    if case == "control":
        ours, net = controlled()
        pipe = FluxControlNetPipeline(**theirs.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    pipe.set_ip_adapter_scale(scale)
    if case in CHANNELS:  # whose pipelines have no argument for it, but hand this on
        embeds = theirs.encode_image(seen, "cpu", 1)[None].repeat(2, 1, 1)
        attended = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [embeds]}}
    else:
        attended = {"ip_adapter_image": [seen]}
    expected = pipe(
        prompt="a red circle",
        num_images_per_prompt=2,
        guidance_scale=3.5,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(7),
        width=96,
        height=64,
        max_sequence_length=24,
        **attended,
        **theirs_only,
    ).images
    given = {"ip_image": seen, "ip_scale": scale}
    got = ours("a red circle", seed=7, number=2, **DRAW, **given, **ours_only)
    for one, other in zip(got, expected, strict=True):
        same_picture(one, other)
    given["ip_image"] = [photo(9)] * count
    other = ours("a red circle", seed=7, number=2, **DRAW, **given, **ours_only)[0]
    assert np.abs(np.asarray(got[0], int) - np.asarray(other, int)).mean() > 1


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_several_adapters_each_see_their_own_picture(files, random_pipeline, tmp_path, guided):  # noqa: F811
    """Or all the only one."""
    (one, clip, _), other = files, tmp_path / "other.safetensors"
    save_file({name: x[::-1].copy() for name, x in xlabs_file(ADAPTER).items()}, other)
    pipe = FluxPipeline.from_pretrained(random_pipeline)
    pipe.load_ip_adapter(
        [one.parent, other.parent],
        weight_name=[one.name, other.name],
        image_encoder_pretrained_model_name_or_path=str(clip),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.set_ip_adapter_scale([0.7, 0.4])
    ours = fluxjax.load_pipeline(
        random_pipeline,
        ip_adapter=[(one, 0.7), f"{other}:0.4"],
        image_encoder=clip,
        scan_layers=False,
    )
    alone = fluxjax.load_pipeline(random_pipeline, ip_adapter=one, image_encoder=clip)
    weights = sum(x.nbytes for x in xlabs_file(ADAPTER).values())
    assert weight_bytes(ours) - weight_bytes(alone) == weights
    seen = [photo(0), photo(1, (121, 203))]

    def expected(pictures):
        return pipe(
            prompt="a red circle",
            guidance_scale=3.5,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(7),
            width=96,
            height=64,
            max_sequence_length=24,
            ip_adapter_image=[[picture] for picture in pictures],
            **(THEIR_CFG if guided else {}),
        ).images[0]

    options = {"seed": 7, **DRAW, **(CFG if guided else {})}
    (got,) = ours("a red circle", ip_image=seen, **options)
    same_picture(got, expected(seen))
    if guided:
        return
    (alike,) = ours("a red circle", ip_image=seen[0], **options)
    with compilations() as counted:
        (swapped,) = ours("a red circle", ip_image=seen[::-1], ip_scale=[0.4, 0.7], **options)
    same_picture(alike, expected([seen[0]] * 2))
    pipe.set_ip_adapter_scale([0.4, 0.7])
    same_picture(swapped, expected(seen[::-1]))
    assert not counted and got.tobytes() != swapped.tobytes()
    for wrong, message in (
        ({"ip_image": [photo()] * 3}, "of 2 IP-Adapters each sees its ip_image, .*got 3"),
        ({"ip_image": photo(), "ip_scale": [1.0] * 3}, "one for each of 2 IP-Adapters, got 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours("a star", **{**DRAW, **wrong})


def test_pictures_are_seen_as_by_clips_processor():
    processor = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    for size in ((203, 121), (30, 97), (20, 20)):
        expected = processor(photo(1, size), return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(
            clip_pixels(photo(1, size), SIZE), np.moveaxis(expected, 0, -1), atol=1e-6
        )


def test_another_picture_or_scale_compiles_nothing(ours):
    given = {**DRAW, "number": 2, "ip_image": photo()}
    first = ours("a star", **given)[0]
    with compilations() as seen:
        for change in ({"ip_scale": 0.2}, {"ip_scale": [1.0]}, {"ip_image": photo(3)}):
            other = ours("a star", **{**given, **change})[0]
            assert other.tobytes() != first.tobytes(), change
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "data=2,sequence=4"])
def test_a_mesh_draws_what_one_device_draws(ours, files, random_pipeline, mesh):  # noqa: F811
    given = {**DRAW, "ip_image": [photo(0), photo(1)], **CFG, "number": 2}
    file, clip, lora = files
    pipe = fluxjax.load_pipeline(
        random_pipeline,
        ip_adapter=(file, 0.7),
        image_encoder=clip,
        loras=[lora],
        scan_layers=False,
        mesh=mesh,
    )
    for one, other in zip(ours("a heart", **given), pipe("a heart", **given), strict=True):
        same_picture(other, one)


@pytest.mark.slow
def test_the_command_records_and_repeats(random_pipeline, files, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        photo(i).save(f"{i}.png")
    options = Options(
        prompt=("a star",),
        model=str(random_pipeline),
        quiet=True,
        seed=3,
        steps=2,
        width=64,
        height=48,
        max_sequence_length=24,
        ip_adapter=(f"{saved_adapter(tmp_path, 'xlabs', num_tokens=5)}:0.6",),
        image_encoder=files[1],
        ip_image=("0.png", "1.png"),
        out=tmp_path / "first.png",
        dtype="bfloat16",
    )
    check(options)
    draw(options)
    record = read_record(tmp_path / "first.png")
    assert record["ip_adapter"] == ["xlabs.safetensors:0.6"] and record["image_encoder"] == "clip"
    assert record["settings"]["ip_image_2"] == "1.png"
    assert {"ip_adapter 1", "image_encoder files"} <= record["sha256"].keys()
    like = Options(like=tmp_path / "first.png", quiet=True, out=tmp_path / "again.png")
    draw(like)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    photo(5).save("1.png")
    with pytest.raises(ConfigError, match=r"1.png has changed since it was the ip_image_2"):
        draw(replace(like, out=tmp_path / "third.png"))
    photo(1).save("1.png")
    lines = [{"prompt": "a star", "ip_image": "1.png"}, {"prompt": "a star", "ip_scale": [1]}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    many = replace(options, prompt=(), prompts=tmp_path / "lines.jsonl", out=tmp_path / "many")
    draw(replace(many, grid=True, record=False))
    assert len(list((tmp_path / "many").iterdir())) == 3
    saved_adapter(tmp_path, "xlabs", num_tokens=6)
    with pytest.raises(ConfigError, match=r"not what .*first.png was made with.*ip_adapter 1"):
        draw(replace(like, out=tmp_path / "third.png"))


def test_what_cannot_be_is_one_sentence(ours, files, random_pipeline, tmp_path):  # noqa: F811
    plain = fluxjax.load_pipeline(random_pipeline, scan_layers=False)
    for pipe, given, message in (
        (ours, {}, "IP-Adapter needs a picture that it sees: give an ip_image"),
        (ours, {"ip_image": [photo()] * 4}, "at most 3 ip_images"),
        (ours, {"ip_image": photo(), "ip_scale": [1.0, 2.0]}, "one for each of 1 blocks, got 2"),
        (ours, {"ip_image": photo(), "negative_ip_image": photo()}, "give a negative_prompt"),
        (plain, {"ip_image": photo()}, "ip_image is for an IP-Adapter, and this model has none"),
        (plain, {"ip_scale": 0.5}, "ip_scale is for an IP-Adapter, and this model has none"),
        (plain, {"ip_adapter_image": photo()}, "ip_adapter_image is called ip_image here"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe("a star", **{**DRAW, **given})
    adapter, clip = files[:2]
    for ours_only, message in (
        ({"ip_adapter": adapter}, "needs an image_encoder"),
        ({"image_encoder": clip}, "give a file of one too"),
        ({"ip_adapter": [adapter] * 4}, "at most 3 IP-Adapters go together, got 4"),
        ({"ip_adapter": tmp_path / "none", "image_encoder": clip}, "there is no IP-Adapter file"),
        ({"ip_adapter": adapter, "image_encoder": "nowhere"}, "no image encoder folder nowhere"),
        *(
            (
                {"ip_adapter": saved_adapter(tmp_path, f"{i}", **sizes), "image_encoder": clip},
                message,
            )
            for i, (sizes, message) in enumerate(
                (
                    ({"inner_dim": 48}, "blocks of width 48, and the model has 32: it belongs"),
                    ({"num_layers": 2}, "for 2 double blocks, and the model has 1"),
                    ({"image_embed_dim": 20}, "embedded in 20 numbers, and .*clip makes 18"),
                )
            )
        ),
    ):
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            fluxjax.load_pipeline(random_pipeline, **ours_only)
    for options, message in (
        (Options(prompt=("a",), ip_adapter=(str(adapter),)), "give --ip-image FILE"),
        (Options(prompt=("a",), ip_image=("a.png",)), "give --ip-adapter FILE"),
        (Options(prompt=("a",), ip_adapter=("nowhere",)), "no IP-Adapter file .*nowhere"),
    ):
        with pytest.raises((ConfigError, FileNotFoundError), match=message):
            check(options)
