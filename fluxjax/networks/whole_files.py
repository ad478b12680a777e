"""Single files of whole pipelines of Stable Diffusion, in the names of its original code."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fluxjax.config.choices import FAMILY_NAMES
from fluxjax.config.sampler import SamplerConfig
from fluxjax.config.sd3 import SD3Config
from fluxjax.config.stable_diffusion import EULER
from fluxjax.networks.clip import CLIP_TEXT
from fluxjax.networks.clip_files import openai_text, openclip_text
from fluxjax.networks.network import Shapes
from fluxjax.networks.t5 import T5


@dataclass(frozen=True)
class Part:
    """One network of such a file: what stands before its names, and whose those are."""

    prefix: str
    dialect: str = "bfl"
    config: Callable[[Shapes], Any] | None = None
    """Shapes -> configuration, where the network's own description does not tell it."""
    cut: bool = False
    """Whether the file has a last layer and a projection that nothing reads."""
    identity: bool = False
    """Whether the file may lack a projection, which is then the identity."""
    file: str = ""
    """What a file of it alone is called, in the same names without the prefix, as a pattern."""


@dataclass(frozen=True)
class WholeFile:
    """`signature`: regular expressions, each of which fits a name. `family`: as `infer_config`
    takes it."""

    words: str
    family: str
    signature: tuple[str, ...]
    parts: Mapping[str, Part]
    optional: frozenset[str] = frozenset()
    """Parts that a file may lack."""
    fits: Callable[[Mapping[str, Any]], bool] = lambda configs: True
    """Whether networks of these configurations, of these parts, belong into one."""
    predicting_v: SamplerConfig | None = None
    """How it is sampled where a tensor without values, V_PREDICTION, says that it predicts v."""
    sides: Mapping[str, int] = field(default_factory=dict)
    """Of `FAMILY_NAMES` the side of the latents, where files of several sizes look alike."""

    def holds(self, names: Collection[str]) -> bool:
        return all(any(re.fullmatch(one, name) for name in names) for one in self.signature)


_UNET = r"model\.diffusion_model\.input_blocks\.0\.0\.weight"
_PICTURE = {"unet": Part("model.diffusion_model."), "vae": Part("first_stage_model.")}


def _bigg(shapes: Shapes) -> Any:
    return openai_text(shapes, hidden_act="gelu")


WHOLE_FILES = (
    WholeFile(
        "Stable Diffusion XL",
        "Stable Diffusion XL",
        (_UNET, r"conditioner\.embedders\.1\.model\.ln_final\.weight"),
        {
            **_PICTURE,
            "text_encoder": Part("conditioner.embedders.0.transformer.", "published", openai_text),
            "text_encoder_2": Part("conditioner.embedders.1.model.", "openclip", openclip_text),
        },
        predicting_v=replace(EULER, prediction_type="v_prediction"),
    ),
    WholeFile(
        "Stable Diffusion XL's refiner",
        "Stable Diffusion XL",
        (_UNET, r"conditioner\.embedders\.0\.model\.ln_final\.weight"),
        {
            **_PICTURE,
            "text_encoder_2": Part("conditioner.embedders.0.model.", "openclip", openclip_text),
        },
    ),
    WholeFile(
        "Stable Diffusion 2",
        "Stable Diffusion",
        (_UNET, r"cond_stage_model\.model\.ln_final\.weight"),
        {
            **_PICTURE,
            "text_encoder": Part("cond_stage_model.model.", "openclip", openclip_text, cut=True),
        },
        fits=lambda configs: configs["text_encoder"].hidden_act == "gelu",
        sides={FAMILY_NAMES["sd2"]: 64, FAMILY_NAMES["sd2-v"]: 96},
    ),
    WholeFile(
        "Stable Diffusion 1",
        "Stable Diffusion",
        (_UNET, r"cond_stage_model\.transformer\.(text_model\.)?embeddings\..*"),
        {
            **_PICTURE,
            "text_encoder": Part("cond_stage_model.transformer.", "published", openai_text),
        },
    ),
    WholeFile(
        "Stable Diffusion 3",
        "Stable Diffusion 3",
        (r"model\.diffusion_model\.joint_blocks\.0\.x_block\.attn\.qkv\.weight",),
        {
            "transformer": Part("model.diffusion_model."),
            "vae": Part("first_stage_model."),
            "text_encoder": Part(
                "text_encoders.clip_l.transformer.",
                "published",
                openai_text,
                identity=True,
                file=CLIP_TEXT.files,
            ),
            "text_encoder_2": Part(
                "text_encoders.clip_g.transformer.",
                "published",
                _bigg,
                file="clip_g*.safetensors",
            ),
            "text_encoder_3": Part(
                "text_encoders.t5xxl.transformer.",
                "published",
                lambda shapes: T5.dialects[0].infer(shapes, ""),
                file=T5.files,
            ),
        },
        optional=frozenset({"text_encoder", "text_encoder_2", "text_encoder_3"}),
        fits=lambda configs: type(configs["transformer"]) is SD3Config,
    ),
)
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Names by which trainers of XL (kohya's sd-scripts) and ComfyUI say that a file predicts v, and
that its last timestep is noise alone."""
LOSSES = r".*\bloss\..*"
UNREAD = (
    rf"model_ema\..*|{LOSSES}|betas|alphas_cumprod(_prev)?|sqrt_.*|posterior_.*|logvar"
    r"|log_one_minus_alphas_cumprod|global_step|denoiser\.sigmas|scale_factor"
    r"|.*\.logit_scale"
)
"""What is in such files besides: a training's averages, schedules and losses."""


def whole_file(names: Collection[str]) -> WholeFile | None:
    """Which one these tensors are."""
    return next((one for one in WHOLE_FILES if one.holds(names)), None)


def whole_file_of(configs: Mapping[str, Any]) -> WholeFile | None:
    """Which one networks of these configurations, by component, belong into."""
    for one in WHOLE_FILES:
        needed = one.parts.keys() - one.optional
        if needed <= configs.keys() <= one.parts.keys() and one.fits(configs):
            return one
    return None
