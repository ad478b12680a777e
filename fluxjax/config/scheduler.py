"""The flow-matching Euler schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxjax.config.base import check_types, in_range, require


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Flow-matching Euler schedule. Defaults are FLUX.1-dev's."""

    num_train_timesteps: int = 1000
    """Noise level 1 as a timestep."""
    shift: float = 3.0
    """How far levels are moved towards noise, where the size of the picture does not decide it."""
    use_dynamic_shifting: bool = True
    """Whether the number of the picture's tokens decides how far levels are moved."""
    base_image_seq_len: int = 256
    """Tokens at which the logarithm of the shift is base_shift."""
    max_image_seq_len: int = 4096
    """Tokens at which it is max_shift; a straight line goes through both."""
    base_shift: float = 0.5
    """Logarithm of the shift of a small picture."""
    max_shift: float = 1.15
    """That of a large one."""

    def __post_init__(self) -> None:
        check_types(self)
        in_range(self, 1, 10**6, "num_train_timesteps")
        in_range(self, 1, 2**31, "base_image_seq_len", "max_image_seq_len")
        in_range(self, 1e-6, 1e6, "shift")
        in_range(self, -100, 100, "base_shift", "max_shift")
        require(
            self.max_image_seq_len > self.base_image_seq_len,
            f"SchedulerConfig.max_image_seq_len={self.max_image_seq_len} must exceed "
            f"base_image_seq_len={self.base_image_seq_len}",
        )

    @property
    def is_flow(self) -> bool:
        return True

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
