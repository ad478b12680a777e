"""Prompts -> what FLUX's transformer hears: the T5 sequence and CLIP's pooled state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fluxjax.models.clip import CLIPTextModel, CLIPTextOutput
from fluxjax.models.t5 import T5Encoder

if TYPE_CHECKING:
    from fluxjax.text.tokenizers import PromptTokenizer


class PromptIds(NamedTuple):
    """Token ids of a batch of prompts; `t5_mask` is 1 where T5 reads a token, 0 at padding."""

    clip: Int[Array | np.ndarray, "b l"]
    t5: Int[Array | np.ndarray, "b text"]
    t5_mask: Int[Array | np.ndarray, "b text"]


class Conditioning(NamedTuple):
    """What the transformer hears of each prompt."""

    prompt_embeds: Float[Array, "b text joint"]
    pooled: Float[Array, "b pooled"]


def tokenize(
    clip: PromptTokenizer,
    t5: PromptTokenizer,
    prompts: Sequence[str],
    prompts_2: Sequence[str] | None = None,
    *,
    max_sequence_length: int,
) -> tuple[PromptIds, list[str]]:
    """Token ids, and one line for each prompt whose end T5 does not read, with that end's first and
    last words.

    T5 reads `prompts_2` where given. CLIP's 77 tokens are cut silently while T5 hears the whole:
    CLIP only sets the mood. Raises ValueError when the numbers of prompts differ.
    """
    second = prompts if prompts_2 is None else prompts_2
    if len(second) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts, but {len(second)} second prompts")
    heard, read = clip(prompts), t5(second, max_sequence_length)
    notes = [
        f"the prompt is longer than {max_sequence_length} tokens; left out: {_ends(rest)}"
        for rest in read.removed
        if rest
    ]
    return PromptIds(heard.input_ids, read.input_ids, read.attention_mask), notes


def _ends(text: str, count: int = 6) -> str:
    """Its first and last words, and how many there are; all of it where that is no longer."""
    words = text.split()
    if len(words) <= 2 * count and len(text) <= 200:
        return repr(text)
    first, last = " ".join(words[:count])[:80], " ".join(words[-count:])[-80:]
    return f"{first!r} ... {last!r} ({len(words)} words)"


@partial(jax.jit, static_argnames=("clip", "t5", "mask_padding"))
def encode_prompts(
    clip: CLIPTextModel,
    t5: T5Encoder,
    clip_params: dict[str, Any],
    t5_params: dict[str, Any],
    ids: PromptIds,
    *,
    mask_padding: bool = False,
) -> Conditioning:
    """Conditioning as a pure function of parameters and ids.

    FLUX was trained with T5 reading its padding, and so reads it here. With `mask_padding` T5 does
    not attend to padding and its states there are zero, which some fine-tunes are trained with.
    """
    output = clip.apply({"params": clip_params}, ids.clip)
    assert isinstance(output, CLIPTextOutput)
    mask = ids.t5_mask if mask_padding else None
    states = jnp.asarray(t5.apply({"params": t5_params}, ids.t5, mask))
    if mask_padding:
        states = states * ids.t5_mask[:, :, None].astype(states.dtype)
    return Conditioning(states, output.pooler_output)
