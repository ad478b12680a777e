"""The flow-matching Euler schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxjax.config.base import positive, require


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Flow-matching Euler schedule. Defaults are FLUX.1-dev's."""

    num_train_timesteps: int = 1000
    shift: float = 3.0
    use_dynamic_shifting: bool = True
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        positive(self, "num_train_timesteps", "shift", "base_image_seq_len", "max_image_seq_len")
        require(
            self.max_image_seq_len > self.base_image_seq_len,
            f"SchedulerConfig.max_image_seq_len={self.max_image_seq_len} must exceed "
            f"base_image_seq_len={self.base_image_seq_len}",
        )

    def mu(self, image_tokens: int) -> float:
        """Log of the shift of a picture of `image_tokens`, for times and sigmas alike.

        With dynamic shifting it lies on the line through the two published lengths.
        """
        if not self.use_dynamic_shifting:
            return math.log(self.shift)
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)
