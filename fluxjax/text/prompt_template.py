"""What HunyuanVideo's language model reads around a prompt, and what of its states is kept.

Source: Tencent HunyuanVideo and HunyuanVideo-I2V `hyvideo/constants.py`, diffusers
`pipelines/hunyuan_video`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fluxjax.text.tokenizers import PromptTokenizer


class PromptTemplate(NamedTuple):
    """`text` has {} in the prompt's place; the first `crop` tokens are left out of the states."""

    text: str
    crop: int

    def fill(self, prompt: str) -> str:
        before, after = self.text.split("{}")
        return before + prompt + after


class TemplatedIds(NamedTuple):
    """Ids of whole templates, padded at their end, and where the states that are kept begin."""

    input_ids: Int[np.ndarray, "b l"]
    attention_mask: Int[np.ndarray, "b l"]
    removed: tuple[str, ...]
    """The end of each prompt that was cut off, "" where all was read."""
    crop: int


_SYSTEM, _USER = (f"<|start_header_id|>{who}<|end_header_id|>\n\n" for who in ("system", "user"))
_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the "
    "objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
VIDEO = PromptTemplate(
    f"{_SYSTEM}Describe the video by detailing the following aspects: {_ASPECTS}"
    f"{_USER}{{}}<|eot_id|>",
    95,
)
_ANSWERED = f"{_USER}{{}}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
FROM_PICTURE = PromptTemplate(
    f"{_SYSTEM}<image>\nDescribe the video by detailing the following aspects according to the "
    f"reference image: {_ASPECTS}\n\n{_ANSWERED}",
    103,
)
"""Of a picture that the language model sees in <image>'s place."""


def templated(
    tokenizer: PromptTokenizer,
    prompts: Sequence[str],
    template: PromptTemplate = VIDEO,
    *,
    max_sequence_length: int = 256,
) -> TemplatedIds:
    """Ids of the prompts in their template, `max_sequence_length` of them beside the crop.

    A prompt that is too long loses its end, and the template's.
    """
    filled = [template.fill(prompt) for prompt in prompts]
    read = tokenizer(filled, max_sequence_length + template.crop)
    end = template.text.split("{}")[1]
    removed = tuple(rest.removesuffix(end).strip() for rest in read.removed)
    return TemplatedIds(read.input_ids, read.attention_mask, removed, template.crop)
