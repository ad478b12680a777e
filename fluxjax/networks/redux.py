"""The projector of FLUX.1 Redux; BFL and diffusers name its two layers alike."""

from __future__ import annotations

import numpy as np

from fluxjax.config import ConfigError, ReduxConfig
from fluxjax.networks.network import Arrays, Dialect, JsonForm, Network, Shapes
from fluxjax.networks.tables import Table

PUBLISHED = Table("Redux projector", identity=True)


def _infer(shapes: Shapes, family: str) -> ReduxConfig:
    width = shapes["redux_down.weight"][0]
    if shapes["redux_up.weight"][0] != 3 * width:
        raise ConfigError(
            f"a Redux projector is three times its output wide inside, {3 * width}, and this one "
            f"{shapes['redux_up.weight'][0]}"
        )
    return ReduxConfig(redux_dim=shapes["redux_up.weight"][1], txt_in_features=width)


def _inputs(config: ReduxConfig) -> Arrays:
    states = np.random.default_rng(0).standard_normal((2, 9, config.redux_dim))
    return {"states": states.astype(np.float32)}


def _module() -> type:
    from fluxjax.models.redux import ReduxImageEncoder

    return ReduxImageEncoder


REDUX = Network(
    config=ReduxConfig,
    component="image_embedder",
    words="Redux projector",
    describe=lambda config: (
        f"FLUX.1 Redux projector, width {config.redux_dim} to {config.txt_in_features}"
    ),
    module=_module,
    inputs=_inputs,
    outputs=lambda tokens: {"image_embeds": tokens},
    json=JsonForm("diffusers", ("ReduxImageEncoder",)),
    dialects=(
        Dialect(
            "published",
            (r"redux_up\.weight", r"redux_down\.weight"),
            lambda config: PUBLISHED,
            _infer,
        ),
    ),
    roles={"redux_up": "columns", "redux_down": "rows"},
    files="flux1-redux*.safetensors",
    file_name=lambda config: "flux1-redux-dev.safetensors",
)
