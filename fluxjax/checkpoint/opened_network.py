"""One network of a checkpoint, opened: lazy tensors under published names, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fluxjax.checkpoint import engine, tensors
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.placement import load_tree
from fluxjax.checkpoint.quantised.reader import refuse_packed, unquantised
from fluxjax.checkpoint.source_record import RECORD_FILE, Record, dequantise, is_fp8_extra
from fluxjax.checkpoint.templates import abstract_params, kept_template, quantised_template
from fluxjax.checkpoint.tensors import Tensor
from fluxjax.config import ConfigError
from fluxjax.config.choices import FAMILY_NAMES
from fluxjax.models.names import flatten
from fluxjax.models.quantised import Quantised
from fluxjax.networks import by_component, network_of
from fluxjax.networks.network import Network
from fluxjax.networks.tables import Table
from fluxjax.quantised_kinds import KEEP, LOADED, NONE

_FLUX = FAMILY_NAMES["flux"]


@dataclass(frozen=True)
class OpenNetwork:
    """One network of a checkpoint. `tensors` have published names and layout.

    `where`: the file or folder they are in. `dialect`: whose names they have there.
    `dropped`: names of tensors that belong to no network of ours and are not carried on.
    `scheduler`: a SamplerConfig, where the file of a whole pipeline tells how that is sampled.
    """

    component: str
    config: Any
    tensors: dict[str, Tensor]
    record: Record
    dialect: str
    where: Path
    dropped: tuple[str, ...] = ()
    scheduler: Any = None

    def template(self, *, stacked: bool, quantise: str = NONE) -> tuple[dict[str, Any], list[str]]:
        """Shapes of `params`, the values in float32; and what `templates.kept_template` decodes."""
        tree = abstract_params(self.config, stacked=stacked)
        if quantise == KEEP:
            return kept_template(tree, self.config, self.tensors)
        if quantise == NONE:
            return tree, []
        return quantised_template(tree, self.config, quantise), []

    def require_codes(self, template: Mapping[str, Any], kind: str) -> None:
        """Raises ConfigError for a template in which nothing has the codes that are asked for."""
        if kind in LOADED and not has_codes(template):
            raise ConfigError(
                f"{self.where}: no layer of the {self.component} has rows that are whole blocks of "
                f"{kind}: try another --quantise"
            )

    def params(
        self,
        *,
        stacked: bool,
        dtype: Any = None,
        shardings: Any = None,
        quantise: str = NONE,
    ) -> dict[str, Any]:
        """Our parameters as JAX arrays; see `pipeline_folder.load_params`.

        `quantise`: "keep" leaves dense kernels in the codes that the file has; one of
        `fluxjax.quantised_kinds.LOADED` keeps the blocks' products in that; "none" keeps values.

        Raises ConfigError naming a tensor with NaN or infinite values, and the file or folder.
        """
        template, _ = self.template(stacked=stacked, quantise=quantise)
        return self.fill(template, dtype=dtype, shardings=shardings)

    def fill(
        self, template: Mapping[str, Any], *, dtype: Any = None, shardings: Any = None
    ) -> dict[str, Any]:
        """`params` of the form of a `template`."""
        table = network_of(self.config).dialect("published").table(self.config)
        try:
            return load_tree(self.tensors, table, template, dtype=dtype, shardings=shardings)
        except ConfigError as error:
            raise ConfigError(f"{self.where}: {self.component}: {error}") from None


def has_codes(template: Mapping[str, Any]) -> bool:
    return any(isinstance(leaf, Quantised) for leaf in flatten(template).values())


def scheduler_of(networks: Mapping[str, OpenNetwork]) -> Any:
    """What their file tells of how they are sampled together; None where it does not."""
    told = (network.scheduler for network in networks.values())
    return next((one for one in told if one is not None), None)


def make_network(
    raw: Mapping[str, Tensor],
    where: Path,
    *,
    component: str = "",
    config: Any = None,
    record: Record | None = None,
    family: str = "",
) -> OpenNetwork:
    """Detect, dequantise, name and check one network's tensors.

    `family`: "FLUX.1" where these are known to be a part of it.
    Raises ConfigError or engine.MappingError, naming `where`.
    """
    try:
        refuse_packed(raw)
        raw = unquantised(raw)
        known = None if config is None else type(config)
        network, dialect = detect_network({n: tensor.shape for n, tensor in raw.items()}, known)
        # Where a configuration tells what it is, the second text encoder may be a whole CLIP, too.
        part = component if config is None else re.sub(r"_\d$", "", component)
        if part in network.parts:
            if type(config) is network.config:
                config = getattr(config, network.parts[part])
            network = by_component(part)
            dialect = network.dialects[0]
        if component and not _may_hold(component, network, config, family):
            wanted = by_component(component).words
            raise ConfigError(
                f"expected the {wanted}, but these are tensors of the {network.words}"
            )
        plain, scaled = dequantise(raw)
        shapes = {name: tensor.shape for name, tensor in plain.items()}
        if config is None:
            config = infer_config(network, dialect, shapes, family)
        elif type(config) is not network.config:
            raise ConfigError(
                f"these are tensors of the {network.words}, but the configuration is of the "
                f"{network_of(config).words}"
            )
        else:
            config = network.fit(config, shapes)
        table = dialect.table(config)
        leaves = engine.published_leaves(abstract_params(config))
        expected = {name: leaf.shape for name, leaf in leaves.items()}
        published = engine.to_published(plain, table, expected)
        _refuse_whole_numbers(published)
    except ValueError as error:
        raise type(error)(f"{where}: {error}") from None
    if record is not None:
        _check_record(record, config, published, where)
    ignored = [n for n in plain if any(re.fullmatch(p, n) for p in table.ignored)]
    kept = [n for n in ignored if re.fullmatch(r".*position_ids|logit_scale", n)]
    renamed, doubled = _other_names(plain, table, expected)
    extras = {name: raw[name] for name in raw if is_fp8_extra(name)}
    extras |= {name: plain[name] for name in kept}
    if record is None:
        record = Record(dialect.name, renamed, doubled, extras, scaled)
    dropped = tuple(sorted(set(ignored) - set(kept)))
    component = component or network.component
    return OpenNetwork(component, config, published, record, dialect.name, where, dropped)


def _may_hold(component: str, network: Network, config: Any, family: str) -> bool:
    """Whether a pipeline keeps such a network in this folder: text encoders, whose kind its
    configuration tells, in any of those for text encoders; where the family is another than FLUX.1
    what belongs there is seen when all are put together."""
    if network.component == component:
        return True
    told = type(config) is network.config or family not in ("", _FLUX)
    numbered = (re.sub(r"_\d$", "", name) for name in (network.component, component))
    return told and len(set(numbered)) == 1


def _check_record(
    record: Record, config: Any, published: Mapping[str, Tensor], where: Path
) -> None:
    """Raises ValueError unless what the record makes of the network can be read again."""
    table = network_of(config).dialect(record.dialect).table(config)
    theirs = engine.from_published(published, table)
    shapes = {name: tensor.shape for name, tensor in published.items()}
    try:
        for fp8 in (True, False):
            plain, _ = dequantise(record.restore(theirs, record.dialect, fp8=fp8))
            engine.to_published(plain, table, shapes)
    except ValueError as error:
        raise ValueError(
            f"{where}: {RECORD_FILE}, or the record in the metadata, does not fit the network: "
            f"{error}"
        ) from None


def _other_names(
    plain: Mapping[str, Tensor], table: Table, shapes: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    renamed: dict[str, str] = {}
    doubled: dict[str, str] = {}
    for name in plain if table.identity else ():
        matched = engine.match_rule(table, name)
        if matched and name not in shapes:
            (published,) = matched[1]
            if published in plain:
                doubled[name] = published
            else:
                renamed[published] = name
    return renamed, doubled


def _refuse_whole_numbers(published: Mapping[str, Tensor]) -> None:
    """Codes without what scales them would be taken for values."""
    codes = [
        f"{name} {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in published.items()
        if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]
    if codes:
        raise ConfigError(engine.listed("hold whole numbers, and nothing that scales them", codes))


def with_dtype(network: OpenNetwork, dtype: Any) -> OpenNetwork:
    """Values cast; what the record says of fp8 is then forgotten."""
    cast = {name: tensors.astype(t, np.dtype(dtype)) for name, t in network.tensors.items()}
    return without_fp8(replace(network, tensors=cast))


def without_fp8(network: OpenNetwork) -> OpenNetwork:
    """As if it had never been fp8: for values that are others now."""
    extras = {k: v for k, v in network.record.extras.items() if not is_fp8_extra(k)}
    return replace(network, record=replace(network.record, extras=extras, scaled={}))
