"""Several pictures on one sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

GAP = 4  # pixels of white around every picture
_OUTLINE, _INK = (210, 210, 210), (40, 40, 40)


def picture_sheet(
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]] | UInt8[np.ndarray, "n height width 3"],
    *,
    columns: int | None = None,
    captions: Sequence[str] = (),
    gap: int = GAP,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Row by row in cells of the largest picture, `gap` apart and with a thin grey outline.

    Without `columns` the sheet has as many as rows, or one more. `captions`, one for each picture
    or none at all, are written below and wrapped.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = (max(picture.shape[axis] for picture in pictures) for axis in (1, 0))
    font = ImageFont.load_default(13) if captions else None
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_wrap(text, lambda line: pen.textlength(line, font), width) for text in captions]
    below = [pen.multiline_textbbox((0, 0), text, font, spacing=3)[3] + gap for text in texts]
    step_x, step_y = width + gap, height + gap + math.ceil(max(below, default=0))
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left, top = gap + i % columns * step_x, gap + i // columns * step_y
        image = Image.fromarray(picture)
        # White backgrounds end somewhere too.
        pen.rectangle((left - 1, top - 1, left + image.width, top + image.height), outline=_OUTLINE)
        sheet.paste(image, (left, top))
        if captions:
            place = (left, top + height + gap / 2)
            pen.multiline_text(place, texts[i], fill=_INK, font=font, spacing=3)
    return np.array(sheet)


def _wrap(text: str, length: Callable[[str], float], width: int) -> str:
    """Break a text into lines that are not longer than `width`, words that are longer excepted."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and length(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
