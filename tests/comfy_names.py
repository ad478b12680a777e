"""Names of HunyuanVideo's files as ComfyUI has them: replaced one after the other, as it does."""

_TRANSFORMER = {
    "txt_in.t_embedder.mlp.0.": "txt_in.t_embedder.in_layer.",
    "txt_in.t_embedder.mlp.2.": "txt_in.t_embedder.out_layer.",
    "txt_in.c_embedder.linear_1.": "txt_in.c_embedder.in_layer.",
    "txt_in.c_embedder.linear_2.": "txt_in.c_embedder.out_layer.",
    "_mod.linear.": "_mod.lin.",
    "_attn_qkv.": "_attn.qkv.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "_attn_q_norm.weight": "_attn.norm.query_norm.scale",
    "_attn_k_norm.weight": "_attn.norm.key_norm.scale",
    ".q_norm.weight": ".norm.query_norm.scale",
    ".k_norm.weight": ".norm.key_norm.scale",
    "_attn_proj.": "_attn.proj.",
    ".modulation.linear.": ".modulation.lin.",
    "_in.mlp.2.": "_in.out_layer.",
    "_in.mlp.0.": "_in.in_layer.",
}
_AUTOENCODER = {
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    ".resnets.": ".block.",
    "group_norm.": "norm.",
    ".to_out.0.": ".proj_out.",
    ".to_": ".",
    "down_blocks.": "down.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
}


def comfy_transformer(name: str) -> str:
    """Of one in Tencent's names."""
    return _replaced(name, _TRANSFORMER)


def comfy_autoencoder(name: str) -> str:
    """Of one of diffusers' names of four resolutions, which are counted from the other end."""
    for level in range(4):
        name = name.replace(f"up_blocks.{level}.", f"up.{3 - level}.")
    return _replaced(name, _AUTOENCODER)


def _replaced(name: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name
