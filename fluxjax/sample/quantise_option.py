"""In what form weights lie on the device, as a text says it: for all networks, or for each."""

from __future__ import annotations

from fluxjax.config import ConfigError
from fluxjax.quantised_kinds import KEEP, LOADED, NONE

NETWORKS: tuple[str, ...] = (
    "transformer",
    "unet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)


def parse_quantise(text: str) -> dict[str, str]:
    """Kinds by network, of "int8" or "transformer=nf4,text_encoder_2=int8"; others keep theirs.

    Raises ConfigError for what is no kind or no network.
    """
    if "=" not in text:
        return dict.fromkeys(NETWORKS, _kind(text))
    kinds = dict.fromkeys(NETWORKS, KEEP)
    for part in text.split(","):
        name, _, kind = part.partition("=")
        if name not in NETWORKS:
            raise ConfigError(f"quantise is for {', '.join(NETWORKS)}, got {name[:40]!r}")
        kinds[name] = _kind(kind)
    return kinds


def _kind(text: str) -> str:
    if text not in (*LOADED, KEEP, NONE):
        known = ", ".join((*LOADED, KEEP, NONE))
        raise ConfigError(f"quantise must be one of {known}, got {text[:40]!r}")
    return text
