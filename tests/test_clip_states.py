"""What CLIP's tokens say of a caption is learnt; what FLUX hears of it stays."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fluxjax.checkpoint.pipeline_folder import load_params, read_flux
from fluxjax.hub import tiny_folder
from fluxjax.models.clip import CLIPTextModel
from fluxjax.text.tokenizers import load_clip_tokenizer
from fluxjax.train.embedded.clip_states import ClipStatesStage, train_clip_states


@pytest.mark.slow
def test_the_tokens_learn_and_the_pooled_state_stays(tmp_path):
    pipeline = tmp_path / "pipeline"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_folder() / part, pipeline / part)
    config = read_flux(tiny_folder())
    stage = ClipStatesStage(steps=6, batch=8, held_out_captions=16, learning_rate=1e-3)
    report = train_clip_states(pipeline, config, stage, tmp_path / "runs")
    assert report["pooled"] < 0.05 and report["pooled held out"] < 0.05
    assert {"shape 0", "orientation", "split held out", "all at once held out"} <= set(report)

    def heard(folder):
        of = config.text_encoder
        params = load_params(folder, "text_encoder", of, stacked=True, dtype=jnp.float32)
        ids = load_clip_tokenizer(folder / "tokenizer")(["a red ring above a blue star"], 77)
        clip = CLIPTextModel(of, scan_layers=True)
        return jax.jit(clip.apply)({"params": params}, ids.input_ids)

    before, after = heard(tiny_folder()), heard(pipeline)
    moved = [
        float(np.square(a - b).mean() / np.square(b).mean())
        for a, b in (
            (after.last_hidden_state, before.last_hidden_state),
            (after.pooler_output, before.pooler_output),
        )
    ]
    assert moved[0] > 2 * moved[1] > 0
