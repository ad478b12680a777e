"""Prompts -> conditioning, beside diffusers' FluxPipeline."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch_reference import from_torch, relative_l2

from fluxjax.config import TINY
from fluxjax.families import sd3
from fluxjax.families import stable_diffusion as sd
from fluxjax.families.flux import encode_prompts, tokenize
from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.t5 import T5Encoder
from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxjax.train.embedded.vocabulary import train_clip_tokenizer, train_t5_tokenizer

PROMPTS = ["a red circle left of a blue square", "a green star on white"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    train_clip_tokenizer(PROMPTS, folder / "tokenizer", vocab_size=600)
    train_t5_tokenizer(PROMPTS * 20, folder / "tokenizer_2", vocab_size=200, max_length=16)
    return folder


@pytest.fixture(scope="module")
def tokenizers(folder):
    return load_clip_tokenizer(folder / "tokenizer"), load_t5_tokenizer(folder / "tokenizer_2")


@pytest.mark.parametrize("second", [PROMPTS[::-1], ""])  # an empty one is as none
def test_equals_diffusers(folder, tokenizers, second):
    from diffusers import FluxPipeline

    clip_size, t5_size = (t.backend.get_vocab_size() for t in tokenizers)
    clip_config = replace(TINY.text_encoder, vocab_size=clip_size)
    t5_config = replace(TINY.text_encoder_2, vocab_size=t5_size)
    torch.manual_seed(0)
    clip_torch = transformers.CLIPTextModel(transformers.CLIPTextConfig(**vars(clip_config)))
    t5_fields = {
        k: v for k, v in vars(t5_config).items() if k not in ("is_gated_act", "dense_act_fn")
    }
    t5_torch = transformers.T5EncoderModel(
        transformers.T5Config(**t5_fields, feed_forward_proj="gated-gelu")
    )
    reference = FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=clip_torch.eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=t5_torch.eval(),
        tokenizer_2=transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )
    with torch.no_grad():
        states, pooled, _ = reference.encode_prompt(PROMPTS, second, max_sequence_length=16)
    seconds = second or [second] * len(PROMPTS)
    ids, notes = tokenize(tokenizers, PROMPTS, seconds, max_sequence_length=16)
    ours = encode_prompts(
        (CLIPTextModel(clip_config), T5Encoder(t5_config)),
        (from_torch(clip_torch, clip_config), from_torch(t5_torch, t5_config)),
        ids,
    )
    assert notes == []
    assert relative_l2(ours.sequence, states) <= 1e-5
    assert relative_l2(ours.vector, pooled) <= 1e-5


def test_empty_prompts_of_other_encoders_are_as_none(tokenizers):
    """In Stable Diffusion XL and 3 too, as in diffusers' encode_prompt."""
    (clip, t5), empty = tokenizers, [""] * len(PROMPTS)
    for tokenize_one, read in ((sd3.tokenize, (clip, clip, t5)), (sd.tokenize, (clip, clip))):
        others = dict.fromkeys(("prompts_2", "prompts_3")[: len(read) - 1], empty)
        alone, _ = tokenize_one(read, PROMPTS, max_sequence_length=16)
        got, _ = tokenize_one(read, PROMPTS, max_sequence_length=16, **others)
        for one, other in zip(alone.ids, got.ids, strict=True):
            assert (one == other).all()


def test_notes_show_what_is_left_out(tokenizers):
    ids, notes = tokenize(tokenizers, PROMPTS, max_sequence_length=6)
    assert ids.t5.shape == (2, 6) and ids.clip.shape == (2, 77)
    assert notes == ["the prompt is longer than 6 tokens; left out: 'a blue square'"]
    with pytest.raises(ValueError, match="2 prompts, but 1"):
        tokenize(tokenizers, PROMPTS, PROMPTS[:1], max_sequence_length=6)
