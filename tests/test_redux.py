"""FLUX.1 Redux: pictures heard beside the prompt, as FluxPriorReduxPipeline and FluxPipeline do."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    FluxControlNetPipeline,
    FluxPipeline,
    FluxPriorReduxPipeline,
    ReduxImageEncoder,
)
from test_image_encoders import randomised
from test_sample_controlnet import nets  # noqa: F401
from test_sample_pictures import photo
from torch_pipeline import random_pipeline  # noqa: F401

import fluxjax
from fluxjax.config import ConfigError
from fluxjax.sample.command import draw
from fluxjax.sample.given_options import check
from fluxjax.sample.options import Options
from fluxjax.sample.picture_formats import read_record

WIDTH = 24  # of the random pipeline's text
SIGLIP = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 60,
    "patch_size": 14,
}
DRAW = {"width": 64, "height": 48, "seed": 7}


@pytest.fixture(scope="module")
def redux(tmp_path_factory):
    """A Redux folder with small random weights, as diffusers writes it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("redux") / "redux"
    encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    pipeline = FluxPriorReduxPipeline(
        image_encoder=randomised(encoder),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 60, "width": 60}),
        image_embedder=randomised(ReduxImageEncoder(redux_dim=36, txt_in_features=WIDTH)),
    )
    with torch.no_grad():  # so that 16 tokens count beside 512
        pipeline.image_embedder.redux_down.weight.mul_(20)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(random_pipeline, redux):  # noqa: F811
    return fluxjax.load_pipeline(random_pipeline, redux=redux, scan_layers=False)


@pytest.fixture(scope="module")
def theirs(random_pipeline, redux):  # noqa: F811
    pipe = FluxPipeline.from_pretrained(random_pipeline)
    parts = {
        k: getattr(pipe, k) for k in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    }
    return FluxPriorReduxPipeline.from_pretrained(redux, **parts), pipe


GUIDED = {"true_cfg": 2.5, "negative_prompt": "a blue star"}


@pytest.mark.parametrize(
    ("scales", "guided"),
    [([1.0], {}), ([0.6, 0.5], {}), ([0.6, 0.5], GUIDED)],
    ids=["one picture", "two pictures with weights", "true CFG"],
)
@pytest.mark.slow
def test_same_pictures_as_diffusers(ours, theirs, scales, guided):
    pictures = [photo(i, (203, 121 + i)) for i in range(len(scales))]
    prior, pipe = theirs
    heard = prior(
        pictures,
        prompt=["a red circle"] * len(scales),
        prompt_embeds_scale=scales,
        pooled_prompt_embeds_scale=scales,
    )
    generator = torch.Generator().manual_seed(7)
    if guided:
        heard |= {"true_cfg_scale": 2.5, "negative_prompt": "a blue star"}
    expected = pipe(
        **heard,
        num_inference_steps=4,
        guidance_scale=3.5,
        width=64,
        height=48,
        generator=generator,
        output_type="np",
    ).images
    given = list(zip(pictures, scales, strict=True))
    options = {**DRAW, "steps": 4, "max_sequence_length": 512, **guided}
    (image,) = ours("a red circle", redux_image=given, **options)
    difference = np.abs(np.asarray(image) - np.round(255 * expected[0]))
    assert np.mean(difference <= 1) >= 0.999
    (without,) = ours("a red circle", **options)
    assert np.mean(np.abs(np.asarray(without, float) - np.asarray(image, float)) > 1) > 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`")
def test_beside_a_controlnet_with_true_cfg(redux, nets, theirs, random_pipeline, monkeypatch):  # noqa: F811
    """diffusers gives the negative prompt, which is shorter, the text ids of the prompt, and fails;
    with as many as it has tokens it draws what we do."""
    (prior, plain), (folder, net) = theirs, nets("plain")
    ours = fluxjax.load_pipeline(random_pipeline, redux=redux, controlnet=folder, scan_layers=False)
    parts = {
        k: v for k, v in plain.components.items() if k not in ("image_encoder", "feature_extractor")
    }
    pipe = FluxControlNetPipeline(**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    heard = prior([photo()], prompt=["a red circle"])

    def expected():
        return pipe(
            **heard,
            num_inference_steps=4,
            guidance_scale=3.5,
            width=64,
            height=48,
            control_image=photo(5),
            true_cfg_scale=2.5,
            negative_prompt="a blue star",
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        ).images

    with pytest.raises(RuntimeError, match="must match the size"):
        expected()
    forward = pipe.transformer.forward

    def cut(*args, txt_ids, encoder_hidden_states, **others):
        ids = txt_ids[: encoder_hidden_states.shape[1]]
        said = {"txt_ids": ids, "encoder_hidden_states": encoder_hidden_states}
        return forward(*args, **said, **others)

    monkeypatch.setattr(pipe.transformer, "forward", cut)
    options = {**DRAW, "steps": 4, "max_sequence_length": 512, **GUIDED}
    given = {"redux_image": photo(), "control": photo(5)}
    (image,) = ours("a red circle", **given, **options)
    difference = np.abs(np.asarray(image) - np.round(255 * expected()[0]))
    assert np.mean(difference <= 1) >= 0.999


@pytest.mark.slow
def test_the_command_records_and_repeats(random_pipeline, redux, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        photo(i).save(f"{i}.png")
    options = Options(
        prompt=("a star",),
        model=str(random_pipeline),
        redux=redux,
        quiet=True,
        redux_image=("0.png:0.6", "1.png"),
        steps=2,
        width=64,
        height=48,
        seed=3,
        max_sequence_length=24,
        out=tmp_path / "first.png",
    )
    draw(options)
    record = read_record(tmp_path / "first.png")
    assert record["redux_image"] == ["0.png:0.6", "1.png:1"] and record["redux"] == "redux"
    assert {"redux_image 1", "redux_image 2", "redux image_encoder"} <= record["sha256"].keys()
    like = Options(like=tmp_path / "first.png", quiet=True, out=tmp_path / "again.png")
    draw(like)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "first.png").read_bytes()
    photo(5).save("1.png")
    with pytest.raises(ConfigError, match=r"not what .*first.png was made with.*redux_image 2"):
        draw(replace(like, out=tmp_path / "third.png"))
    assert not (tmp_path / "third.png").exists()


def test_what_cannot_be_is_one_sentence(ours, redux, random_pipeline, tmp_path):  # noqa: F811
    plain = fluxjax.load_pipeline(random_pipeline, scan_layers=False)
    with pytest.raises(ConfigError, match="give its folder as redux"):
        plain("a star", redux_image=photo(), **DRAW)
    with pytest.raises(FileNotFoundError, match=r"no picture for Redux .*nowhere.png"):
        ours("a star", redux_image=tmp_path / "nowhere.png", **DRAW)
    with pytest.raises(ConfigError, match="must be a picture or a file's path, got int"):
        ours("a star", redux_image=[3], **DRAW)
    with pytest.raises(ConfigError, match="width 24, and this model reads text of width 128"):
        fluxjax.load_pipeline("tiny", redux=redux)
    with pytest.raises(FileNotFoundError, match="no Redux folder"):
        fluxjax.load_pipeline("tiny", redux=tmp_path / "nowhere")
    lost = tmp_path / "lost"
    shutil.copytree(redux, lost, ignore=shutil.ignore_patterns("image_embedder"))
    with pytest.raises((ValueError, FileNotFoundError), match=str(lost)):
        fluxjax.load_pipeline(random_pipeline, redux=lost)
    for options in (
        Options(prompt=("a",), redux=redux),
        Options(prompt=("a",), redux_image=("b",)),
    ):
        with pytest.raises((ConfigError, FileNotFoundError), match=r"belong together|there is no"):
            check(options)
