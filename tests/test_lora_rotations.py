"""Adapters that turn weights, and PEFT's LoHa and LoKr, beside PEFT, LyCORIS and kohya's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file

from fluxjax.checkpoint.engine import MappingError, published_leaves
from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import TINY, ConfigError

TEMPLATES = {"transformer": abstract_params(TINY.transformer)}
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
NAMES = (f"{BLOCK}.attn.to_q", f"{BLOCK}.ff.net.2", f"{SINGLE}.proj_mlp")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    leaves = published_leaves(TEMPLATES["transformer"])
    return {n: torch.randn(leaves[f"{n}.weight"].shape) * 0.1 for n in (*NAMES, *QKV)}


QKV = (*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp")


def deltas(path: Path, base: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for name, change in read_adapters(path, TEMPLATES).changes["transformer"].items():
        assert change.delta is not None
        found[name.removesuffix(".weight")] = change.delta(
            lambda other: base[other.removesuffix(".weight")].numpy()
        )
    return found


def agree(got, expected: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """To the rounding of the weights, which are turned as a whole."""
    assert got.keys() == expected.keys()
    for name, delta in expected.items():
        assert delta.abs().max() > 1e-3
        bound = 1e-6 * float(base[name].abs().max())
        np.testing.assert_allclose(got[name], delta, atol=bound, err_msg=name)
        print(f"{name}: {1e-6 * np.abs(got[name] - delta.numpy()).max() / bound:.1e}")


OFT = {"r": 0, "oft_block_size": 8, "init_weights": False}
PEFT_CASES = {
    "series": peft.OFTConfig(**OFT),
    "cubic": peft.OFTConfig(**OFT, num_cayley_neumann_terms=3),
    "inverse": peft.OFTConfig(**OFT, use_cayley_neumann=False),
    "shared": peft.OFTConfig(**OFT, block_share=True, use_cayley_neumann=False),
    "constrained": peft.OFTConfig(**OFT, coft=True, eps=0.5, use_cayley_neumann=False),
    "butterfly": peft.BOFTConfig(boft_block_size=8, init_weights=False),
    "LoHa": peft.LoHaConfig(r=2, alpha=5, init_weights=False, rank_pattern={NAMES[0]: 3}),
    "LoKr": peft.LoKrConfig(
        r=2, alpha=5, init_weights=False, decompose_both=True, alpha_pattern={NAMES[0]: 3}
    ),
    # No rank can be seen in its tensors, and alpha counts all the same.
    "whole LoKr": peft.LoKrConfig(r=99, alpha=5, init_weights=False, rank_pattern={NAMES[0]: 88}),
}


class Layers(torch.nn.Module):
    """Linear layers under the model's names."""

    def __init__(self, base: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in base.items():
            module: torch.nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module.get_submodule(part)
            layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
            layer.weight.data = weight.clone()
            module.add_module(last, layer)


@pytest.fixture(autouse=True)
def no_extension(monkeypatch) -> None:
    """PEFT would try to build one for CUDA."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_saves_changes_what_peft_merges(case, tmp_path) -> None:
    config, base = PEFT_CASES[case], weights()
    config.target_modules = list(NAMES)
    model = peft.get_peft_model(Layers(base), config)
    model.save_pretrained(tmp_path)
    merged = dict(model.merge_and_unload().named_modules())
    expected = {name: merged[name].weight.data - base[name] for name in NAMES}
    agree(deltas(tmp_path, base), expected, base)


def test_pefts_butterfly_of_several_stages(tmp_path) -> None:
    """PEFT multiplies several stages on CUDA only: here by its own blocks and permutations."""
    base, name = weights(), NAMES[1]
    config = peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=3, init_weights=False)
    config.target_modules = [name]
    model = peft.get_peft_model(Layers(base), config)
    model.save_pretrained(tmp_path)
    layer: Any = model.get_submodule(f"base_model.model.{name}")
    turned = torch.eye(base[name].shape[1])
    for blocks, pairing in zip(layer.boft_R["default"].data, layer.boft_P, strict=True):
        turned = pairing @ torch.block_diag(*layer.cayley_batch(blocks)) @ pairing.T @ turned
    expected = (turned @ base[name].T).T * layer.boft_s["default"].data - base[name]
    agree(deltas(tmp_path, base), {name: expected}, base)


def cayley(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    skew = blocks - blocks.transpose(-1, -2)
    skew = skew * min(1.0, limit / float(skew.norm())) if limit else skew
    eye = torch.eye(blocks.shape[-1])
    return (eye + skew) @ (eye - skew).inverse()


@pytest.mark.parametrize("alpha", [0.0, 0.002])
def test_lycoris_boft(alpha, tmp_path) -> None:
    base, name = weights(), NAMES[0]
    blocks, rescale = torch.randn(3, 12, 16, 16) * 0.05, 1 + 0.1 * torch.randn(192, 1)
    rows = base[name]
    for stage, turn in enumerate(cayley(blocks, alpha * 192)):
        order = torch.arange(192).view(-1, 2, 8 * 2**stage).transpose(1, 2).reshape(-1)
        turned = torch.block_diag(*turn) @ rows[order]
        rows = torch.empty_like(rows)
        rows[order] = turned
    key = f"lycoris_{name.replace('.', '_')}"
    file = {f"{key}.oft_blocks": blocks, f"{key}.rescale": rescale}
    save_file({**file, f"{key}.alpha": torch.tensor(alpha)}, tmp_path / "a.safetensors")
    expected = {name: rows * rescale - base[name]}
    agree(deltas(tmp_path / "a.safetensors", base), expected, base)


def test_kohyas_blocks_of_each_part(tmp_path) -> None:
    """Of linear1 four sets of blocks, of other modules one; the limit is of each set's rows."""
    base, key = weights(), "oft_unet_single_blocks_1_linear1.oft_blocks"
    file, expected = {}, {}
    for i, name in enumerate(QKV):
        rows = len(base[name])
        file[f"{key}.{i}"] = blocks = torch.randn(4, rows // 4, rows // 4) * 0.02
        turn = torch.block_diag(*cayley(blocks, 1e-3 * rows).transpose(1, 2))
        expected[name] = turn @ base[name] - base[name]
    file["oft_unet_single_blocks_1_linear1.alpha"] = torch.tensor(1e-3)
    path = tmp_path / "a.safetensors"
    save_file(file, path)
    agree(deltas(path, base), expected, base)
    for wrong, says in (
        ({k: v for k, v in file.items() if not k.endswith(".2")}, r"missing: oft_blocks\.2"),
        ({**file, f"{key}.1": torch.zeros(4, 7, 7)}, r"has \[4, 7, 7\], expected"),
        (
            {
                "oft_unet_double_blocks_0_img_mlp_2.oft_blocks.0": file[f"{key}.0"],
                "oft_unet_double_blocks_0_img_mlp_2.oft_blocks.1": file[f"{key}.1"],
            },
            r"a part that .*img_mlp_2 has not",
        ),
    ):
        save_file(wrong, path)
        with pytest.raises(MappingError, match=says):
            read_adapters(path, TEMPLATES)


def test_what_does_not_turn_as_it_says_is_refused(tmp_path) -> None:
    key, path = f"base_model.model.{NAMES[0]}", tmp_path / "adapter_model.safetensors"
    save_file({f"{key}.oft_R.weight": torch.zeros(24, 28)}, path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(MappingError, match=r"tensors of PEFT's OFT, of which .* says nothing"):
        read_adapters(path, TEMPLATES)
    for text, says in (
        ('{"peft_type": "OFT", "bias": "all"}', "asks for bias"),
        ('{"peft_type": "OFT", "use_cayley_neumann": 3}', "does not say how its adapters turn"),
        ('{"peft_type": "VERA"}', "only LORA, LOHA, LOKR, OFT and BOFT are read"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_adapters(path, TEMPLATES)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "OFT"}')
    save_file({f"{key}.oft_R.weight": torch.zeros(24, 27)}, path)
    with pytest.raises(MappingError, match=r"has \[24, 27\], expected"):
        read_adapters(path, TEMPLATES)
