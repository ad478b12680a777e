"""PyTorch's side of what is added to a pipeline: ControlNets, picture encoders, IP-Adapters."""

from __future__ import annotations

import warnings
from typing import Any

from fluxjax.checkpoint.component_json import config_json
from fluxjax.checkpoint.opened_network import OpenNetwork


def controlnet(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """A FluxControlNetModel's samples, named as `networks.controlnet` names them."""
    control = x["controlnet_cond"]
    x = {**x, "controlnet_cond": control.movedim(-1, 1) if control.ndim == 4 else control}
    if "controlnet_mode" in x:
        x["controlnet_mode"] = x["controlnet_mode"].long()[:, None]
    double, single = model(**x, return_dict=False)
    groups = {"double": double or (), "single": single or ()}
    return {f"{k} sample {i}": s for k, group in groups.items() for i, s in enumerate(group)}


def vision(model: Any, x: dict[str, Any]) -> dict[str, Any]:
    """A vision encoder of CLIP or SigLIP."""
    output = model(x["pixel_values"].movedim(-1, 1))
    if "image_embeds" not in output:
        return {k: output[k] for k in ("last_hidden_state", "pooler_output") if k in output}
    pooled = model.vision_model(x["pixel_values"].movedim(-1, 1)).pooler_output
    return {"last_hidden_state": output.last_hidden_state, "pooler_output": pooled}


def from_tensors(cls: Any, network: OpenNetwork) -> Any:
    """A module of diffusers with the tensors of a file that it cannot read by itself."""
    values = config_json(network.config)
    with warnings.catch_warnings():  # of diffusers, at its own imports
        warnings.simplefilter("ignore", FutureWarning)
        model = cls.from_config({k: v for k, v in values.items() if not k.startswith("_")})
    model.load_state_dict(_tensors(network))
    return model


def _tensors(network: OpenNetwork) -> dict[str, Any]:
    import numpy as np
    import torch

    return {
        name: torch.tensor(tensor.read().astype(np.float32))
        for name, tensor in network.tensors.items()
    }


def ip_adapter(network: OpenNetwork) -> Any:
    """What diffusers' loader makes of an IP-Adapter, taken out of the transformer's processors."""
    import diffusers
    import torch

    config = network.config
    state: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in _tensors(network).items():
        kind, rest = name.split(".", 1)
        state[kind][rest] = tensor
    transformer: Any = diffusers.FluxTransformer2DModel(
        num_layers=config.num_layers,
        num_single_layers=1,
        attention_head_dim=config.inner_dim,
        num_attention_heads=1,
        joint_attention_dim=config.cross_attention_dim,
    )
    transformer._load_ip_adapter_weights(state, low_cpu_mem_usage=False)

    class Adapter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image_proj = transformer.encoder_hid_proj.image_projection_layers[0]
            processors = [block.attn.processor for block in transformer.transformer_blocks]
            self.ip_adapter: Any = torch.nn.ModuleList(
                torch.nn.ModuleDict({"to_k_ip": one.to_k_ip[0], "to_v_ip": one.to_v_ip[0]})
                for one in processors
            )

        def forward(self, image_embeds: Any) -> dict[str, Any]:
            tokens = self.image_proj(image_embeds)
            return {
                name: torch.stack([block[layer](tokens) for block in self.ip_adapter])
                for name, layer in (("keys", "to_k_ip"), ("values", "to_v_ip"))
            }

    return Adapter()
