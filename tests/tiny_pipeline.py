"""A whole FLUX pipeline of random weights in a diffusers folder, written by diffusers itself."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)


def save_tiny_pipeline(folder: Path, tokenizers: Path, *, guidance_embeds: bool = True) -> Path:
    """`tokenizers` holds the published clip and t5 tokenizers, as the recorded references do."""
    torch.manual_seed(0)
    clip, t5 = _tokenizer(tokenizers, "clip"), _tokenizer(tokenizers, "t5")
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                eos_token_id=2,
            )
        ),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=48,
                d_kv=16,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    for network in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in network.parameters():
            if parameter.ndim == 1:  # biases of zero and scales of one would hide faults
                parameter.data += 0.1 * torch.randn_like(parameter)
    pipeline.save_pretrained(folder)
    defaults = {
        "max_sequence_length": 32, "steps": 4, "guidance": 3.5, "width": 64, "height": 48,
    }  # fmt: skip
    (folder / "fluxjax.json").write_text(json.dumps(defaults))
    return folder


def _tokenizer(folder: Path, kind: str):
    found = next(path for path in sorted(folder.iterdir()) if kind in path.name.lower())
    return CLIPTokenizer.from_pretrained(found) if kind == "clip" else AutoTokenizer.from_pretrained(found)
