"""A FluxPipeline of diffusers with small random weights, saved as a folder."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def save_random_pipeline(
    folder: Path, tokenizers: Path, *, guidance_embeds: bool = True, in_channels: int = 64
) -> Path:
    """Weights are drawn wide enough that prompt, guidance and seed all change the picture."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if weight.ndim == 2 and "norm" not in name:
                weight.mul_(2.0)
        vae.decoder.conv_out.weight.mul_(1.5)
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=20,
            intermediate_size=40,
            projection_dim=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            d_model=24,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )
    with torch.no_grad():
        for weight in (*clip.parameters(), *t5.parameters()):
            if weight.ndim == 2:
                weight.copy_(torch.randn_like(weight) * 0.3)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "clip-vit-large-patch14"),
        text_encoder_2=t5,
        tokenizer_2=T5TokenizerFast.from_pretrained(tokenizers / "t5-v1_1-xxl"),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_pipeline(shared: Path, tmp_path_factory) -> Path:
    """The folder; one for all modules that import this fixture."""
    folder = tmp_path_factory.getbasetemp() / "random_pipeline"
    return folder if folder.is_dir() else save_random_pipeline(folder, shared / "tokenizers")
