"""All that is known of one kind of weights, as one frozen description.

`checkpoint`, `parallel`, `plan`, `diff` and the families read these and never ask for types. A new
kind is one file beside this one and a line in `networks/__init__.py`. Nothing here imports JAX:
names and tables are needed long before a network is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from fluxjax.networks.tables import Rule, Table

Shapes = Mapping[str, tuple[int, ...]]
Arrays = dict[str, np.ndarray]
Role = Literal["columns", "modulation", "rows", "whole", "convolution", "convolution_3d", "copied"]
"""How a layer shares out its parameters: by outputs (columns) or inputs (rows) over `tensor`, and
the inputs over `fsdp`; over `fsdp` alone (whole, and convolutions); the same on every device. A
modulation is split by columns, and what it returns, a vector for all tokens, is not."""


@dataclass(frozen=True)
class Dialect:
    """One way in which published files name the tensors."""

    name: str
    """ "published" is that of diffusers and transformers, "bfl" the original code's."""
    signature: tuple[str, ...]
    """Regular expressions; names are of this dialect if each fits one of them."""
    table: Callable[[Any], Table]
    """configuration -> the table of its names."""
    infer: Callable[[Shapes, str], Any]
    """(shapes, family) -> configuration. The family is the name of one ("FLUX.1") where the file is
    known to belong to it and "" elsewhere. Raises ConfigError for what shapes cannot tell, KeyError
    for a tensor that is needed and missing."""
    original_key: str = ""
    """A key that only the original code's own configuration of this network has."""
    from_original: Callable[[Mapping[str, Any]], Any] | None = None
    """That configuration -> ours. Raises KeyError for a missing key."""
    unless: tuple[str, ...] = ()
    """Regular expressions of names that only another network has, which shares this signature."""
    files: int = 1
    """In how many files of a folder the tensors lie, without an index."""

    def fits(self, names: Collection[str]) -> bool:
        """Whether these are a network's names in this dialect."""
        return all(_found(pattern, names) for pattern in self.signature) and not any(
            _found(pattern, names) for pattern in self.unless
        )


def _found(pattern: str, names: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


@dataclass(frozen=True)
class JsonForm:
    """How the libraries of PyTorch write a configuration into a JSON file."""

    library: Literal["diffusers", "transformers"]
    class_names: tuple[str, ...]
    """Classes that have these weights; the first is written unless `write` names another."""
    model_types: tuple[str, ...] = ()
    """transformers' names of the architecture; the first is written."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key that is left out means in PyTorch, where it is not our default."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Keys with the one value that our network has: another would give other results."""
    unread: Mapping[str, type] = field(default_factory=dict)
    """Keys that decide nothing here, with the type that PyTorch's class wants of them."""
    read: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Values of a file, defaults filled in -> values whose keys are our fields."""
    write: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda config, values: values
    """(configuration, its fields) -> the values of the file, without the names of classes."""
    written_class: Callable[[Any], str] | None = None
    """The class that PyTorch opens such weights with, where it depends on the configuration."""

    def class_name(self, config: Any) -> str:
        return self.written_class(config) if self.written_class else self.class_names[0]


@dataclass(frozen=True)
class TokenSplit:
    """How a network's tokens are shared out over the mesh's `sequence` axis."""

    method: str
    """The method whose arguments are tokens; what else the network does is done whole."""
    arguments: tuple[tuple[str, int] | Mapping[str, int] | None, ...]
    """For each argument of `method`, "image", "text" or "joint" and the axis of its tokens in every
    leaf; None where there are none. Of a struct, by field, the axis of the image's tokens, where
    there are some. The last arguments may be left out. The result has the image's tokens."""
    whole: Callable[..., tuple]
    """(run, *arguments of the network) -> arguments of `method`; `run(name, *inputs)` is another
    method of the network."""
    heads: Callable[[Any], int]
    """configuration -> heads of attention."""
    result: Callable[..., Any] = lambda run, returned, *arguments, **options: returned
    """(run, what `method` returns, *arguments of the network) -> what the network returns."""
    text_last: bool = False
    """Whether the text follows the image in what is joint."""
    image_attention: bool = False
    """Whether the module has an `image_attention` of its own, of the image's tokens alone."""


class PublishedTokenizer(NamedTuple):
    """A tokenizer that many models share, as it lies on the Hugging Face hub."""

    repo: str
    pad: str = ""
    """The token that fills up what this network reads; "": as the tokenizer says."""


TRANSFORMER_PREFIXES = (
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
    "",
)
"""`Network.adapter_prefixes` that all transformers have."""


@dataclass(frozen=True)
class Network:
    """One kind of weights: `NETWORKS[type(config)]`."""

    config: type
    component: str
    """The folder that a pipeline of FLUX keeps it in; a file of its own is listed under it."""
    words: str
    """What a sentence calls it."""
    describe: Callable[[Any], str]
    """configuration -> which variant of what size, in words."""
    module: Callable[[], type]
    """The linen class, imported when asked for."""
    inputs: Callable[[Any], Arrays]
    """configuration -> small random inputs by the names of the arguments."""
    outputs: Callable[[Any], dict[str, Any]]
    """What the network returns -> arrays by the names that PyTorch gives them."""
    json: JsonForm
    dialects: tuple[Dialect, ...]
    """Tried in order; the first has the published names."""
    roles: Mapping[str, Role]
    """The end of a layer's path (or of a bare parameter's) -> its role. The longest end decides."""
    family: str = ""
    """To which what lies in one file with it belongs."""
    prefixes: tuple[str, ...] = ()
    """Under which files that hold several networks keep it."""
    files: str = ""
    """What its single file is called where it lies beside others, as a glob pattern."""
    file_name: Callable[[Any], str] = lambda config: "model.safetensors"
    """configuration -> the name of such a file."""
    method: Callable[..., Any] | None = None
    """What takes `inputs` and touches every parameter, where that is not the module's call."""
    quantised: str = ""
    """Names of the matrices that are kept in few bits where that is asked for, as a regular
    expression: the blocks' products. Embedders, norms, modulations and last layers are not."""
    quantised_files: bool = True
    """Whether `convert` quantises it: others expect CLIP, which is small, in 16 bits, and Llama in
    its own GGUF names."""
    gguf_architecture: Callable[[Any], str] = lambda config: ""
    """configuration -> what GGUF files of it say that they are, "" where there are none."""
    before_steps: str = ""
    """Names of the parameters that a run needs only before its first step, as a regular expression:
    what modulates all of its steps."""
    unlearnt: str = ""
    """Names of the parameters that no training changes, as a regular expression: what PyTorch
    keeps as a buffer."""
    scanned: tuple[str, ...] = ()
    """Groups of equal blocks that may be scanned, their parameters then stacked."""
    blocks: Callable[[Any], int] = lambda config: 0
    """configuration -> how many those are."""
    token_split: TokenSplit | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    """Networks that are read out of this one's files: component -> field of the configuration."""
    fit: Callable[[Any, Shapes], Any] = lambda config, names: config
    """(configuration, tensors) -> the configuration with what only the tensors tell."""
    adapter_prefixes: tuple[str, ...] = ()
    """What stands before the names of its modules in adapters (LoRA and others), longest first;
    none where there are no adapters."""
    further_prefixes: tuple[str, ...] = ()
    """The same where a pipeline has it in another folder than FLUX.1, besides the folder's name."""
    adapter_rules: Callable[[Shapes], tuple[Rule, ...]] = lambda shapes: ()
    """Names that adapters have for its modules besides the published ones, for parameters of
    these."""
    adapter_dialect: Callable[[Any, str], str] = lambda config, naming: "bfl"
    """(configuration, "kohya" or "comfy") -> the dialect whose names these give adapters."""
    widened: tuple[str, str] = ("", "")
    """A first layer that adapters may give more inputs: the module and the configuration's field.
    """
    last: str = ""
    """The last layer of a network with such a first one: it has as many outputs as that has inputs
    where nothing is joined to them."""
    tokenizer: str = ""
    """The class of transformers that makes its input of a text, where it is a text encoder."""
    published_tokenizer: Callable[[Any], PublishedTokenizer | None] = lambda config: None
    """configuration -> that of the published networks of as many tokens."""
    held: Callable[[Any, int, int], int] = lambda config, latents, text: 0
    """(configuration, latents, text tokens) -> numbers that one forward of a picture holds at the
    same time, at least."""
    flops: Callable[[Any, int, int], float] | None = None
    """(configuration, image tokens, text tokens) -> FLOPs of one forward of one picture."""

    def build(self, config: Any, *, scan_layers: bool = False, **fields: Any) -> Any:
        """The linen module; `scan_layers` where it has something to scan."""
        scan = {"scan_layers": scan_layers} if self.scanned else {}
        return self.module()(config, **scan, **fields)

    def has_dialect(self, name: str) -> bool:
        return any(dialect.name == name for dialect in self.dialects)

    def dialect(self, name: str) -> Dialect:
        """The dialect of that name, or the published one where the original code has none."""
        return next((d for d in self.dialects if d.name == name), self.dialects[0])


def held_by_blocks(config: Any, latents: int, text_tokens: int) -> int:
    """`Network.held` of a transformer whose image tokens have an MLP of their own: in a block both
    kinds of tokens, and the four widths of that MLP."""
    return (5 * latents // config.patch_size**2 + text_tokens) * config.inner_dim


def count(shapes: Shapes, pattern: str) -> int:
    """How many blocks there are: the largest number that `pattern` captures, and one."""
    numbers = [int(m[1]) for m in map(re.compile(pattern).match, shapes) if m]
    return max(numbers) + 1 if numbers else 0
