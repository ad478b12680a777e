"""The networks on a mesh: the same modules, parameters and methods, applied across devices.

`ShardedTransformer(..., mesh=mesh)` stands in for `FluxTransformer` wherever one is applied inside
a compiled program, and so do the text encoders' classes for theirs. Fields are static: programs of
different meshes are compiled apart.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from fluxjax.models.clip import CLIPTextModel
from fluxjax.models.embeddings import Rope
from fluxjax.models.flux import FluxTransformer, Modulations
from fluxjax.models.t5 import T5Encoder
from fluxjax.parallel.activations import activations_on, attend_in_parts, pin
from fluxjax.parallel.mesh import BATCH
from fluxjax.parallel.sequence import AXIS, Layout, SequenceAttention, attention_over


class ShardedT5Encoder(T5Encoder):
    mesh: Any = None

    @nn.nowrap
    def apply(self, *args: Any, **options: Any) -> Any:
        with activations_on(self.mesh):
            return super().apply(*args, **options)


class ShardedCLIPTextModel(CLIPTextModel):
    mesh: Any = None

    @nn.nowrap
    def apply(self, *args: Any, **options: Any) -> Any:
        with activations_on(self.mesh):
            return super().apply(*args, **options)


class ShardedTransformer(FluxTransformer):
    """`sequence`: how attention works where the mesh splits the tokens, see `parallel.sequence`.

    Captured intermediates are whole and in the order of tokens on every mesh.
    """

    mesh: Any = None
    sequence: SequenceAttention = "auto"

    @nn.nowrap
    def apply(
        self,
        variables: Any,
        *args: Any,
        method: Any = None,
        mutable: Any = False,
        capture_intermediates: Any = False,
        **options: Any,
    ) -> Any:
        kept = {"mutable": mutable, "capture_intermediates": capture_intermediates}
        if self.mesh.shape[AXIS] == 1 or method not in (None, "__call__", "denoise"):
            with activations_on(self.mesh):
                return super().apply(variables, *args, method=method, **kept, **options)
        if method == "denoise":
            return _denoise(self, variables, *args, kept=kept, **options)
        states: dict[Any, Any] = {}

        def run(method: str, *inputs: Any) -> Any:
            returned = self.apply(variables, *inputs, method=method, **kept)
            if mutable is False:
                return returned
            states.update(flatten_dict(returned[1]))
            return returned[0]

        def whole(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids,
            guidance=None,
        ):  # fmt: skip
            return run(
                "denoise",
                hidden_states,
                run("embed_text", encoder_hidden_states),
                run("modulations", timestep, pooled_projections, guidance),
                run("rope", txt_ids, img_ids),
            )

        out = whole(*args, **options)
        return out if mutable is False else (out, unflatten_dict(states))


def shard_transformer(
    model: FluxTransformer, mesh: Mesh, sequence: SequenceAttention = "auto"
) -> ShardedTransformer:
    """`model` on `mesh`; its parameters are placed by `rules.param_shardings`."""
    return ShardedTransformer(**_fields(model), mesh=mesh, sequence=sequence)


def on_mesh(module: Any, mesh: Mesh, sequence: SequenceAttention = "auto") -> Any:
    """A FluxTransformer, T5Encoder or CLIPTextModel on `mesh`."""
    if isinstance(module, FluxTransformer):
        return shard_transformer(module, mesh, sequence)
    cls = ShardedT5Encoder if isinstance(module, T5Encoder) else ShardedCLIPTextModel
    return cls(**_fields(module), mesh=mesh)


def _fields(module: nn.Module) -> dict[str, Any]:
    fields: Any = dataclasses.fields(module)  # pyright: ignore[reportArgumentType]
    return {
        field.name: getattr(module, field.name)
        for field in fields
        if field.name not in ("name", "parent")
    }


def _denoise(
    model: ShardedTransformer,
    variables: Any,
    hidden_states: Float[Array, "b image in_channels"],
    text: Float[Array, "b text d"],
    modulations: Modulations,
    rope: Rope,
    *,
    kept: dict[str, Any],
) -> Any:
    """`FluxTransformer.denoise` with text and image tokens split over `sequence`.

    `kept`: flax's `mutable` and `capture_intermediates`; with `mutable` the result is (out, state).
    """
    mesh, heads = model.mesh, model.config.num_attention_heads
    layout = Layout(text.shape[1], hidden_states.shape[1], mesh.shape[AXIS])
    attention = attention_over(layout, heads, model.sequence, model.attention)
    # The partitioner gathers batch and heads around a collective that it did not make itself.
    split = "tensor" if heads % (mesh.shape["tensor"] * layout.devices) == 0 else None
    apply = partial(FluxTransformer.apply, method="denoise", **kept)
    inner = model.clone(attention=partial(attend_in_parts, mesh, BATCH, split, attention))

    def part(variables, image, text, modulations, text_rope, image_rope):
        joint = jax.tree.map(lambda *parts: jnp.concatenate(parts), text_rope, image_rope)
        with activations_on(mesh):
            return apply(inner, variables, image, text, modulations, joint)

    text_rope = Rope(*(_pad(table[: layout.text], layout, 0) for table in rope))
    image_rope = Rope(*(_pad(table[layout.text :], layout, 0) for table in rope))
    tokens = P(None, AXIS)
    out: Any = jax.shard_map(
        part,
        mesh=mesh,
        axis_names={AXIS},
        in_specs=(P(), tokens, tokens, P(), P(AXIS), P(AXIS)),
        out_specs=tokens,
        check_vma=False,  # as inside, where attention kernels are spread
    )(
        variables,
        pin(_pad(hidden_states, layout, 1), mesh),
        pin(_pad(text, layout, 1), mesh),
        modulations,
        text_rope,
        image_rope,
    )
    if kept["mutable"] is False:
        return layout.in_order(out, layout.image)
    whole = jax.eval_shape(partial(apply, model), variables, hidden_states, text, modulations, rope)
    return jax.tree.map(lambda x, like: layout.in_order(x, like.shape[1]), out, whole)


def _pad(x: Array, layout: Layout, axis: int) -> Array:
    missing = -x.shape[axis] % layout.devices
    pads = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads) if missing else x
