"""The model that a run of the command draws with, LoRAs and hashes included."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fluxjax.quantised_kinds import KEEP
from fluxjax.sample.options import Options
from fluxjax.sample.sources import Sources

if TYPE_CHECKING:
    from fluxjax.sample.pipeline import Pipeline


@dataclass
class OpenedModel:
    """Pipelines of one model with one set of LoRAs after another; one at a time in memory."""

    options: Options
    sources: Sources
    dtype: str | None
    _lora: tuple[str, ...] | None = None
    _pipe: Any = None
    _hashes: dict[tuple[str, ...], Future] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def with_lora(self, lora: tuple[str, ...]) -> Sources:
        return dataclasses.replace(self.sources, lora=lora)

    def pipeline(self, lora: tuple[str, ...]) -> Pipeline:
        """Its weights are hashed at the same time, in a thread, for the records."""
        import jax

        from fluxjax.sample.loading import load_pipeline

        if lora == self._lora:
            return self._pipe
        start, self._pipe, sources = time.perf_counter(), None, self.with_lora(lora)
        self._pipe = load_pipeline(
            sources.model,
            dtype=self.dtype,  # pyright: ignore[reportArgumentType]
            text_encoders=sources.text_encoders,
            vae=sources.vae,
            loras=sources.lora,
            redux=sources.redux,
            refiner=sources.refiner,
            offload=self.options.offload,
            stream=self.options.stream,
            quantise=sources.quantise or KEEP,
            family=sources.family,  # pyright: ignore[reportArgumentType]
            controlnet=sources.controlnet or None,
            ip_adapter=sources.ip_adapter or None,
            image_encoder=sources.image_encoder,
            mesh=self.options.mesh,
            sequence=self.options.sequence or "auto",
        )
        self._pipe.seconds["loading"] += time.perf_counter() - start
        if self.options.record and jax.process_index() == 0 and lora not in self._hashes:
            self._hashes[lora] = self._pool.submit(sources.hashes)
        self._lora = lora
        return self._pipe

    def hashes(self, lora: tuple[str, ...]) -> dict[str, str]:
        return self._hashes[lora].result()
