"""The projector of FLUX.1 Redux."""

from __future__ import annotations

from dataclasses import dataclass

from fluxjax.config.base import check_types, positive, require


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

    def require_same_model(self, where: object, states: int, text: int) -> None:
        """Raises ConfigError, which names `where` it is from, unless SigLIP's states and the
        model's text have these widths."""
        require(
            states == self.redux_dim,
            f"{where}: the Redux projector reads states of width {self.redux_dim}, its SigLIP "
            f"gives {states}",
        )
        require(
            text == self.txt_in_features,
            f"{where} makes tokens of width {self.txt_in_features}, and this model reads text of "
            f"width {text}: it belongs to another model",
        )


REDUX = ReduxConfig()
