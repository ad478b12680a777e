"""Where a pipeline comes from: the embedded model, a diffusers or Orbax folder, BFL's files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from fluxjax.checkpoint.pipeline_folder import Component, load_params, read_config
from fluxjax.config import PipelineConfig
from fluxjax.sample.pipeline import Pipeline

Dtype = Literal["float32", "bfloat16"]


def tiny_folder() -> Path:
    """The embedded model, trained on drawn scenes."""
    return Path(__file__).resolve().parent.parent / "assets" / "tiny"


def load_pipeline(
    model: str | Path = "tiny",
    *,
    dtype: Dtype | None = None,
    text_encoders: str | Path | None = None,
    vae: str | Path | None = None,
    scan_layers: bool = True,
) -> Pipeline:
    """Open a model; its weights are read when they are first needed.

    Args:
      model: "tiny", a diffusers folder, an Orbax folder, or a BFL file (flux1-*.safetensors), which
        needs the two below.
      dtype: of weights and computation; by default float32 on a CPU and bfloat16 elsewhere.
      text_encoders: a folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2.
      vae: a diffusers autoencoder's folder, or BFL's ae.safetensors.
      scan_layers: compile one block of each kind and scan over them, or each block for itself.

    Raises FileNotFoundError, ConfigError or ValueError with one sentence naming what is wrong.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    path = tiny_folder() if str(model) == "tiny" else Path(model).expanduser()
    config = read_config(path)
    options: dict[str, Any] = {"dtype": dtype, "scan_layers": scan_layers}
    return Pipeline(
        config,
        partial(_load, path, config, dtype, scan_layers),
        partial(_tokenizers, path),
        **options,
    )


def _load(
    path: Path, config: PipelineConfig, dtype: Dtype, scan_layers: bool, component: Component
):
    stacked = scan_layers and component != "vae"
    return load_params(path, component, getattr(config, component), stacked=stacked, dtype=dtype)


def _tokenizers(path: Path):
    from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer

    return load_clip_tokenizer(path / "tokenizer"), load_t5_tokenizer(path / "tokenizer_2")
