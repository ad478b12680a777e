"""The embedded PixArt and Stable Diffusion: what they share with tiny, and their pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxjax import hub
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.config import ConfigError
from fluxjax.sample.__main__ import main as sample
from fluxjax.sample.given_options import check
from fluxjax.sample.known_words import outside
from fluxjax.sample.options import Options

SHARED = {
    "tiny-pixart": ["text_encoder_2", "tokenizer_2", "vae"],
    "tiny-sd": ["text_encoder", "tokenizer", "vae"],
}
MODELS = sorted(SHARED)


def _folder(model: str) -> Path:
    folder = hub.embedded_folder(model)
    assert folder is not None
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_only_the_network_that_draws_is_its_own(model):
    folder = _folder(model)
    links = [path for path in folder.iterdir() if path.is_symlink()]
    shared = [hub.tiny_folder() / name for name in SHARED[model]]
    assert sorted(path.resolve() for path in links) == sorted(path.resolve() for path in shared)
    config = read_config(folder)
    own = folder / config.denoiser / "diffusion_pytorch_model.safetensors"
    assert own.stat().st_size < 6e6 and config.networks["vae"].shift_factor == 0.0
    assert not outside("a red circle above a blue square", folder) and outside("a dog", folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "tiny-pixrat"}, "did you mean tiny-pixart"),
        ({"model": "tiny-pixart", "width": 104}, "multiple of 16, got 104"),
        ({"model": "tiny-sd", "width": 100}, "multiple of 8, got 100"),
    ],
)
def test_a_wrong_name_or_size_is_told_at_once(options, words):
    with pytest.raises((FileNotFoundError, ConfigError), match=words):
        check(Options(prompt=("a",), **options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("model", MODELS)
def test_the_sample_command_draws_what_diffusers_draws(model, tmp_path):
    import diffusers

    folder, out = _folder(model), tmp_path / "drawn.png"
    prompt = "a red circle above a blue square"
    steps, guidance = 4, 3.0
    options = ["--model", model, "--steps", str(steps), "--guidance", str(guidance), "--seed", "5"]
    sample([prompt, *options, "--out", str(out)])
    config = read_config(folder)
    more: dict[str, Any] = {"safety_checker": None} if model == "tiny-sd" else {}
    theirs = getattr(diffusers, config.class_name).from_pretrained(
        folder, dtype=torch.float32, **more
    )
    theirs.set_progress_bar_config(disable=True)
    more = {"use_resolution_binning": False, "max_sequence_length": config.max_sequence_length}
    wanted: Any = theirs(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=config.width,
        height=config.height,
        generator=torch.Generator().manual_seed(5),
        **(more if model == "tiny-pixart" else {}),
    )
    apart = np.abs(np.asarray(Image.open(out), int) - np.asarray(wanted.images[0], int))
    assert (apart <= 1).mean() > 0.999 and apart.size == 96 * 96 * 3
