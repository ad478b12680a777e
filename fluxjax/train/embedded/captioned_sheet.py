"""A picture of pictures, or of clips, with the captions that they were drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fluxjax.picture_sheet import picture_sheet
from fluxjax.side_output import marker, side_output

SHEET_COLUMNS = 6
SHEET_SIDE = 192  # pixels; smaller pictures are doubled where that fits, larger ones shrunk


def write_sheet(
    path: Path,
    pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]] | Sequence[UInt8[np.ndarray, "t _ _ 3"]],
    captions: Sequence[str],
    *,
    fps: int = 0,
) -> None:
    """The pictures with their captions; of clips of one length, `fps` frames a second, a sheet that
    moves (APNG). Raises what `side_output.check_side_output` raises."""
    from PIL import Image, PngImagePlugin

    def sheet(pictures: Sequence[np.ndarray]) -> Image.Image:
        enlarged = []
        for picture in pictures:
            zoom = min(2.0, SHEET_SIDE / max(picture.shape[:2]))
            size = (round(zoom * picture.shape[1]), round(zoom * picture.shape[0]))
            large = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
            enlarged.append(np.array(large))
        columns = SHEET_COLUMNS
        return Image.fromarray(picture_sheet(enlarged, columns=columns, captions=captions, gap=10))

    text = PngImagePlugin.PngInfo()
    for key, value in marker("sheet").items():
        text.add_text(key, value)
    first, *others = map(sheet, zip(*pictures, strict=True)) if fps else [sheet(pictures)]
    moving = {"save_all": True, "append_images": others, "duration": 1000 / fps} if fps else {}
    with side_output(path, "sheet") as part:
        first.save(part, format="PNG", pnginfo=text, **moving)
