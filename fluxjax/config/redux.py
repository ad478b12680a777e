"""The projector of FLUX.1 Redux."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, positive


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """Turns SigLIP's states into tokens beside T5's. Defaults are FLUX.1-Redux-dev."""

    redux_dim: int = 1152
    """Width of SigLIP's states."""
    txt_in_features: int = 4096
    """Width of T5's states; inside it is three times that."""

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "redux_dim", "txt_in_features")


REDUX = ReduxConfig()
