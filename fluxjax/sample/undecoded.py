"""What a run has drawn before it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fluxjax.config import PipelineConfig
from fluxjax.families.family import AnyArray, Conditioning
from fluxjax.sample.given_pictures import Given
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.refusals import require_finite
from fluxjax.sample.settings import Settings
from fluxjax.sample.stages import Stages


class Undecoded(NamedTuple):
    """What a run has drawn, of which `size` (width, height) is to come, and what it saw."""

    latents: AnyArray
    settings: Settings
    size: tuple[int, int]
    given: Given
    inputs: Inputs
    heard: Sequence[Conditioning | None]
    stages: Stages
    """Whose autoencoder decodes it: the pipeline's, or its refiner's."""

    def require_finite(self, config: PipelineConfig, pictures: AnyArray) -> None:
        """Raises ConfigError, see `refusals.require_finite`."""
        require_finite(config, pictures, self.heard, self.inputs, self.latents)
