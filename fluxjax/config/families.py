"""The pipeline configurations of all families."""

from fluxjax.config.flux_pipeline import FluxPipelineConfig
from fluxjax.config.pipeline import PipelineConfig

PIPELINES: tuple[type[PipelineConfig], ...] = (FluxPipelineConfig,)
"""The most particular first."""
