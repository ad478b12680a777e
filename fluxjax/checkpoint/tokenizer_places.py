"""Where the tokenizers of a model's text encoders lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fluxjax.checkpoint.pipeline_folder import tokenizer_folder, tokenizer_of
from fluxjax.config import PipelineConfig
from fluxjax.hub import find
from fluxjax.networks import network_of

if TYPE_CHECKING:
    from fluxjax.text.tokenizers import PromptTokenizer


class TokenizerPlace(NamedTuple):
    """`pad`: what this network's prompts are padded with, where the folder does not say it."""

    folder: Path
    pad: str = ""
    published: bool = False


def tokenizer_places(
    model: Path, folder: Path | None, config: PipelineConfig
) -> dict[str, TokenizerPlace]:
    """By text encoder: in `folder`, which may lack some, else as it was published, on the hub.

    `model` is what a sentence names. Raises FileNotFoundError for one that is nowhere.
    """
    places = {}
    for name in config.text_encoders:
        own = None if folder is None else tokenizer_folder(folder, name)
        places[name] = (
            TokenizerPlace(own) if own and own.is_dir() else _published(model, name, config)
        )
    return places


def _published(model: Path, name: str, config: PipelineConfig) -> TokenizerPlace:
    part = config.networks[name]
    published = network_of(part).published_tokenizer(part)
    if published is None:
        raise FileNotFoundError(f"{model} is not a whole model: {tokenizer_of(name)} is missing")
    try:
        return TokenizerPlace(find(published.repo, "tokenizer"), published.pad, True)
    except OSError as error:
        raise FileNotFoundError(
            f"{model} has no {tokenizer_of(name)}, and the published one is not to be had: {error} "
            "(a folder of text encoders with tokenizers will do as well)"
        ) from None


def open_tokenizers(
    places: Mapping[str, TokenizerPlace], config: PipelineConfig
) -> tuple[PromptTokenizer, ...]:
    """In the order of the text encoders. Raises ValueError for a damaged one."""
    from fluxjax.text.tokenizers import load_tokenizer

    parts = {name: config.networks[name] for name in places}
    return tuple(
        load_tokenizer(network_of(parts[n]).tokenizer, place.folder, parts[n].vocab_size, place.pad)
        for n, place in places.items()
    )
