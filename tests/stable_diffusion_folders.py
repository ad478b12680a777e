"""Pipelines of Stable Diffusion in diffusers with small random weights, saved as folders."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]
)

NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}

_UNCHECKED: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}

_GELU = {"hidden_act": "gelu"}


def _without_clip() -> dict[str, Any]:
    return {name: value for name, value in NOISE.items() if name != "clip_sample"}


def random_vae(scaling_factor: float = 0.18215, **choices: Any) -> AutoencoderKL:
    levels = 3
    own: dict[str, Any] = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4}
    values = {"latent_channels": 4, **own, **choices}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        scaling_factor=scaling_factor,
        **values,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(1.5)
    return vae


def random_unet(**choices: Any) -> UNet2DConditionModel:
    """Weights are drawn wide enough that prompt and time change the picture."""
    values: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 20,
    }
    unet = UNet2DConditionModel(**values | choices)
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if weight.ndim == 2 and "norm" not in name:
                weight.mul_(2.0)
    return unet


def random_clip(cls: Any = CLIPTextModel, **choices: Any) -> Any:
    values: dict[str, Any] = {
        "hidden_size": 20,
        "intermediate_size": 40,
        "projection_dim": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    clip = cls(CLIPTextConfig(**values | choices))
    with torch.no_grad():
        for weight in clip.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return clip


def save_stable_diffusion(folder: Path, tokenizers: Path) -> Path:
    """As 1.5."""
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=random_vae(),
        text_encoder=random_clip(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "clip-vit-large-patch14"),
        unet=random_unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **_without_clip()),
        **_UNCHECKED,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_latent_consistency(folder: Path, tokenizers: Path) -> Path:
    """As 1.5, distilled: the UNet is told its guidance."""
    torch.manual_seed(6)
    unet = random_unet(time_cond_proj_dim=32)
    with torch.no_grad():
        unet.get_parameter("time_embedding.cond_proj.weight").mul_(3.0)
    diffusers.LatentConsistencyModelPipeline(
        vae=random_vae(),
        text_encoder=random_clip(),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "clip-vit-large-patch14"),
        unet=unet,
        scheduler=diffusers.LCMScheduler(),
        **_UNCHECKED,
    ).save_pretrained(folder)
    return folder


def save_xl(
    folder: Path, tokenizers: Path, *, refiner: bool = False, inpainting: bool = False
) -> Path:
    """As XL's base, or its refiner, which has the second text encoder alone, or with a UNet that
    reads masked pictures."""
    torch.manual_seed(2)
    place = tokenizers / "clip-vit-large-patch14"
    clip = random_clip(CLIPTextModelWithProjection, hidden_size=12, projection_dim=14, **_GELU)
    texts: dict[str, Any] = {
        "text_encoder": None if refiner else random_clip(),
        "tokenizer": None if refiner else CLIPTokenizer.from_pretrained(place),
        "text_encoder_2": clip,
        "tokenizer_2": CLIPTokenizer.from_pretrained(place, pad_token="!"),
        "force_zeros_for_empty_prompt": not refiner,
    }
    unet = random_unet(
        in_channels=9 if inpainting else 4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2),
        cross_attention_dim=12 if refiner else 32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=14 + 6 * (5 if refiner else 6),
    )
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **_without_clip())
    parts: dict[str, Any] = {"vae": random_vae(0.13025), "unet": unet, "scheduler": scheduler}
    if refiner:
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
            **parts, **texts, requires_aesthetics_score=True
        )
    elif inpainting:
        pipeline = diffusers.StableDiffusionXLInpaintPipeline(**parts, **texts)
    else:
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, **texts)
    pipeline.save_pretrained(folder)
    return folder


def save_inpainting(folder: Path, tokenizers: Path) -> Path:
    """As 2, with a UNet that reads masked pictures and predicts v."""
    torch.manual_seed(1)
    place = tokenizers / "clip-vit-large-patch14"
    unet = random_unet(in_channels=9, use_linear_projection=True, attention_head_dim=(1, 2, 4))
    scheduler = DDIMScheduler(prediction_type="v_prediction", set_alpha_to_one=False, **NOISE)
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=random_vae(),
        text_encoder=random_clip(**_GELU),
        tokenizer=CLIPTokenizer.from_pretrained(place, pad_token="!"),
        unet=unet,
        scheduler=scheduler,
        **_UNCHECKED,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_sd3(
    folder: Path,
    tokenizers: Path,
    *,
    t5: bool = True,
    dynamic: bool = False,
    widths: tuple[int, int, int] = (20, 12, 40),
) -> Path:
    """As 3.5 medium; 16 latent channels, which the inpainting pipeline wants. `widths`: of the text
    encoders."""
    torch.manual_seed(4)
    place = tokenizers / "clip-vit-large-patch14"
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=widths[2],
        caption_projection_dim=32,
        pooled_projection_dim=34,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),  # pyright: ignore[reportArgumentType]
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 2 and "norm" not in name:
                weight.mul_(2.0)
    heads = 1 if widths[0] == 64 else 2  # of 64, as in all published ones, or of any width
    texts: dict[str, Any] = {
        "text_encoder": random_clip(
            CLIPTextModelWithProjection, hidden_size=widths[0], num_attention_heads=heads
        ),
        "tokenizer": CLIPTokenizer.from_pretrained(place),
        "text_encoder_2": random_clip(
            CLIPTextModelWithProjection,
            hidden_size=widths[1],
            projection_dim=14,
            num_attention_heads=heads,
            **_GELU,
        ),
        "tokenizer_2": CLIPTokenizer.from_pretrained(place, pad_token="!"),
        "text_encoder_3": random_t5(widths[2]) if t5 else None,
        "tokenizer_3": T5TokenizerFast.from_pretrained(tokenizers / "t5-v1_1-xxl") if t5 else None,
    }
    vae = random_vae(
        1.5305,
        shift_factor=0.0609,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    parts: dict[str, Any] = {"vae": vae, "transformer": transformer, "scheduler": scheduler}
    diffusers.StableDiffusion3Pipeline(**parts, **texts).save_pretrained(folder)
    return folder


def random_t5(width: int) -> T5EncoderModel:
    t5 = T5EncoderModel(
        T5Config(
            d_model=width,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )
    with torch.no_grad():
        for weight in t5.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return t5


def save_pixart(folder: Path, tokenizers: Path, *, sigma: bool = False) -> Path:
    """As alpha of 1024 pixels, whose autoencoder is small: so many latents make few pixels; or as
    Sigma of 256 pixels."""
    torch.manual_seed(5)
    transformer = PixArtTransformer2DModel(
        sample_size=32 if sigma else 128,
        num_layers=2,
        attention_head_dim=6,
        num_attention_heads=4,
        cross_attention_dim=24,
        caption_channels=20,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=not sigma,
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 2 and "norm" not in name:
                weight.mul_(2.0)
    parts: dict[str, Any] = {
        "vae": random_vae(0.13025 if sigma else 0.18215),
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(),
        "text_encoder": random_t5(20),
        "tokenizer": T5TokenizerFast.from_pretrained(tokenizers / "t5-v1_1-xxl"),
    }
    kind = diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline
    kind(**parts).save_pretrained(folder)
    return folder
