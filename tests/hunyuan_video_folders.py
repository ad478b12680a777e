"""HunyuanVideo's pipelines of diffusers with small random weights, saved as folders."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from fluxjax.text.prompt_template import FROM_PICTURE, VIDEO

SPECIAL = ["begin_of_text", "start_header_id", "end_header_id", "eot_id", "pad", "unk"]
CLIP_SIZES = {
    "hidden_size": 20,
    "intermediate_size": 40,
    "projection_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LLAMA_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 336,
    "patch_size": 14,
}


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Each of the templates' words is a token, so that they are about as long as for Llama."""
    backend = Tokenizer(models.BPE(unk_token="<|unk|>"))
    words = Regex(r"\n+|\w+|[^\w\s]+")
    backend.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    special = [AddedToken(f"<|{name}|>", special=True) for name in SPECIAL]
    special.append(AddedToken("<image>", special=True))
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    letters = " ".join(map(chr, range(33, 127)))
    backend.train_from_iterator([VIDEO.text, FROM_PICTURE.text, letters] * 2, trainer)
    first = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=[first, "$A"], special_tokens=[(first, backend.token_to_id(first))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, pad_token="<|pad|>", unk_token="<|unk|>"
    )


def llava(tokenizer: Any) -> transformers.LlavaForConditionalGeneration:
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), **LLAMA_SIZES)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION_SIZES),
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_hunyuan_video(folder: Path, tokenizers: Path, kind: str | None = None) -> Path:
    """Weights are wide enough that prompt, guidance, seed and picture change the clip. `kind`: how
    it is given a first frame."""
    torch.manual_seed(0)
    tokenizer, concat = word_tokenizer(), kind == "latent_concat"
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=9 if concat else 4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=32,
        pooled_projection_dim=20,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=not concat,
        image_condition_type=kind,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )
    text: Any = llava(tokenizer)
    if kind is None:
        sizes = {"vocab_size": len(tokenizer), **LLAMA_SIZES}
        text = transformers.LlamaModel(transformers.LlamaConfig(**sizes))
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_SIZES))
    with torch.no_grad():
        for network, wide in ((transformer, 0.25), (text, 0.3), (clip, 0.3), (vae, 0.2)):
            for weight in network.parameters():
                if weight.ndim > 1:
                    weight.copy_(torch.randn_like(weight) * wide)
    parts: dict[str, Any] = {
        "text_encoder": text,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "vae": vae,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": clip,
        "tokenizer_2": transformers.CLIPTokenizer.from_pretrained(
            tokenizers / "clip-vit-large-patch14"
        ),
    }
    if kind is None:
        diffusers.HunyuanVideoPipeline(**parts).save_pretrained(folder)
        return folder
    side = VISION_SIZES["image_size"]
    seen = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    whole = diffusers.HunyuanVideoImageToVideoPipeline(**parts, image_processor=seen)
    whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hunyuan_video(shared: Path, tmp_path_factory) -> Path:
    """The folder; one for all modules that import this fixture."""
    folder = tmp_path_factory.getbasetemp() / "hunyuan_video"
    return folder if folder.is_dir() else save_hunyuan_video(folder, shared / "tokenizers")
