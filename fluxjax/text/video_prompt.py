"""What Open-Sora 2.0 reads beside a prompt: frames per second and how much moves.

Source: hpcaitech/Open-Sora `opensora/utils/inference.py`.
"""

from __future__ import annotations

import re

_FPS = re.compile(r".*\d+ FPS\.", re.DOTALL)


def video_prompt(prompt: str, fps: int = 24, motion_score: str | None = "4") -> str:
    """The prompt as a sentence, with one for the frames per second, unless it ends in such a one,
    and one for the motion score, "1" (still) to "7", unless that is None."""
    text = prompt.strip()
    text += "" if text.endswith(".") else "."
    if not _FPS.fullmatch(text):
        text += f" {fps} FPS."
    return text if motion_score is None else f"{text} {motion_score} motion score."
