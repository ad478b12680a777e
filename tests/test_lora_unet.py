"""Adapters of Stable Diffusion's UNet and text encoders, beside diffusers, PEFT and LyCORIS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import peft
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from test_pixart import TINY as PIXART
from test_sd3 import TINIES as SD3
from test_unet import TINIES, torch_unet

from fluxjax.checkpoint.engine import MappingError, published_leaves
from fluxjax.checkpoint.lora.changes import Adapter
from fluxjax.checkpoint.lora.merge import merge
from fluxjax.checkpoint.lora.reader import low_rank_tree, read_adapters
from fluxjax.checkpoint.lora.writer import write_adapters
from fluxjax.checkpoint.source import OpenNetwork
from fluxjax.checkpoint.source_record import Record
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import CLIPTextConfig, UNetConfig
from fluxjax.config.choices import LoraNaming
from fluxjax.convert.__main__ import main as convert
from fluxjax.models.lora import adapter_sites
from fluxjax.networks import network_of
from fluxjax.networks.unet import ldm

Weights = dict[str, torch.Tensor]
CLIP = CLIPTextConfig(
    hidden_size=64,
    intermediate_size=96,
    projection_dim=48,
    num_hidden_layers=2,
    num_attention_heads=1,
    vocab_size=50,
    max_position_embeddings=16,
)
BIG = CLIPTextConfig(
    hidden_size=128,
    intermediate_size=96,
    projection_dim=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=50,
    max_position_embeddings=16,
    with_projection=True,
)
CONV, POINT = "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
MODULES = (
    CONV,
    POINT,
    LINEAR,
    "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.resnets.0.conv_shortcut",
    "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "time_embedding.linear_1",
    "mid_block.resnets.1.time_emb_proj",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
)


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet2DConditionModel]:
    return {name: torch_unet(config) for name, config in TINIES.items()}


@pytest.fixture(scope="module")
def templates() -> dict[Any, Any]:
    return {config: abstract_params(config) for config in (*TINIES.values(), CLIP, BIG)}


def opened(component: str, config: Any, weights: Weights) -> OpenNetwork:
    tensors = {name: of_array(tensor.detach().numpy()) for name, tensor in weights.items()}
    return OpenNetwork(component, config, tensors, Record(), "published", Path())


def merged(path: Path, templates, **networks: tuple[Any, Weights]) -> dict[str, dict]:
    """What a file makes of the weights that it changes, by component."""
    known = {name: templates[config] for name, (config, _) in networks.items()}
    changes, found = read_adapters(path, known).changes, {}
    for name, (config, weights) in networks.items():
        after = merge(opened(name, config, weights), [(changes.get(name, {}), 1.0)])
        found[name] = {key: after.tensors[key].read() for key in changes.get(name, {})}
    return found


def random(*shape: int, scale: float = 0.2) -> torch.Tensor:
    return torch.randn(*shape) * scale


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) as kohya has them: the kernel is in the down."""
    kernel = weight.shape[2:]
    return random(rank, *weight.shape[1:]), random(len(weight), rank, *(1 for _ in kernel))


def added(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    delta = up.flatten(1) @ down.flatten(1)
    return delta.view(len(up), *down.shape[1:])


def agree(got: dict[str, np.ndarray], expected: Weights, before: Weights) -> None:
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert (weight - before[name]).abs().max() > 1e-3, name
        np.testing.assert_allclose(got[name], weight.detach(), atol=2e-6, err_msg=name)
        print(f"{name}: {np.abs(got[name] - weight.detach().numpy()).max():.1e}")


@pytest.mark.parametrize("dora", [False, True])
def test_what_diffusers_saves_is_what_it_fuses(dora, templates, tmp_path) -> None:
    """Linear layers and convolutions of 1 x 1 and 3 x 3, PEFT's metadata, DoRA."""
    unet = torch_unet(TINIES["1.5"])
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(MODULES),
        use_dora=dora,
        init_lora_weights=False,
        rank_pattern={CONV: 2},
    )
    unet.add_adapter(config)
    layers: Any = peft.get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers,
        unet_lora_adapter_metadata=config.to_dict(),
    )
    unet.fuse_lora()
    unet.unload_lora()
    after, names = unet.state_dict(), [f"{name}.weight" for name in MODULES]
    got = merged(tmp_path, templates, unet=(TINIES["1.5"], before))["unet"]
    agree(got, {name: after[name] for name in names}, before)


def kohya(prefix: str, modules: dict[str, torch.Tensor], alpha: float) -> tuple[Weights, Weights]:
    """The tensors of a file, by kohya's names; what is added to each weight."""
    file, deltas = {}, {}
    for name, weight in modules.items():
        down, up = low_rank(weight, 2)
        key = f"{prefix}_{name.replace('.', '_')}"
        file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"] = down, up
        file[f"{key}.alpha"] = torch.tensor(alpha)
        deltas[f"{name}.weight"] = added(down, up) * alpha / 2
    return file, deltas


def clip_weights(config: CLIPTextConfig, templates) -> Weights:
    leaves = published_leaves(templates[config])
    return {name: random(*leaf.shape) for name, leaf in leaves.items()}


TEXT_MODULES = tuple(f"text_model.encoder.layers.0.{m}" for m in ("self_attn.q_proj", "mlp.fc2"))


@pytest.mark.parametrize("name", TINIES)
def test_kohyas_files(name, unets, templates, tmp_path) -> None:
    """1.5 by diffusers' names and XL by the original ones, with one and two text encoders; what
    diffusers makes of the UNet's part is the same."""
    torch.manual_seed(2)
    config, xl = TINIES[name], name == "XL"
    before = {key: tensor.clone() for key, tensor in unets[name].state_dict().items()}
    chosen = [m for m in MODULES if f"{m}.weight" in before and not (xl and m == POINT)]
    chosen = [m for m in before if ".attn" in m and m.endswith("to_k.weight")] if xl else chosen
    modules = {
        m.removesuffix(".weight"): before[f"{m.removesuffix('.weight')}.weight"] for m in chosen
    }
    theirs = original_names(config) if xl else {m: m for m in modules}
    renamed = {theirs[m]: weight for m, weight in modules.items()}
    file, named = kohya("lora_unet", renamed, 3.0)
    deltas = {f"{m}.weight": named[f"{theirs[m]}.weight"] for m in modules}
    save_file(file, tmp_path / "unet.safetensors")
    fused = fused_by_diffusers(tmp_path / "unet.safetensors", config, xl)
    encoders = {"te1": CLIP, "te2": BIG} if xl else {"te": CLIP}
    texts: dict[str, tuple[Any, Weights]] = {}
    changed: dict[str, Weights] = {}
    for (prefix, encoder), component in zip(
        encoders.items(), ("text_encoder", "text_encoder_2")[: len(encoders)], strict=True
    ):
        weights = clip_weights(encoder, templates)
        adapted = {m: weights[f"{m}.weight"] for m in TEXT_MODULES}
        mine, changed[component] = kohya(f"lora_{prefix}", adapted, 1.0)
        file, texts[component] = file | mine, (encoder, weights)
    save_file(file, tmp_path / "all.safetensors")
    got = merged(tmp_path / "all.safetensors", templates, unet=(config, before), **texts)
    agree(got["unet"], {key: before[key] + delta for key, delta in deltas.items()}, before)
    agree(got["unet"], {key: fused[key] for key in deltas}, before)
    assert all(torch.equal(fused[key], before[key]) for key in before if key not in deltas)
    for component, (_, weights) in texts.items():
        expected = {key: weights[key] + delta for key, delta in changed[component].items()}
        agree(got[component], expected, weights)
    with pytest.raises(MappingError, match="unknown: lora_te"):  # never only the UNet's half
        merged(tmp_path / "all.safetensors", templates, unet=(config, before))


def original_names(config: UNetConfig) -> dict[str, str]:
    """diffusers' -> CompVis'."""
    found = {}
    for rule in ldm(config).rules:
        for i in range(2) if "{}" in rule.theirs else ("",):
            found[rule.ours[0].replace("{}", str(i))] = rule.theirs.replace("{}", str(i))
    return found


def fused_by_diffusers(path: Path, config: UNetConfig, xl: bool) -> Weights:
    unet = torch_unet(config)
    cls: Any = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    parts = dict.fromkeys(("vae", "tokenizer", "text_encoder", "scheduler"))
    parts |= dict.fromkeys(
        ("tokenizer_2", "text_encoder_2") if xl else ("safety_checker", "feature_extractor")
    )
    pipe = cls(**parts, unet=unet, **({} if xl else {"requires_safety_checker": False}))
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return unet.state_dict()


def test_convolutions_in_lycoris_forms(unets, templates, tmp_path) -> None:
    """With and without a core of the kernel's size; DoRA and (IA)3 over outputs and inputs."""
    torch.manual_seed(3)
    before = {name: tensor.clone() for name, tensor in unets["1.5"].state_dict().items()}
    weight, tucker = before[f"{CONV}.weight"], "ijhw,ip,jr->prhw"
    out, channels = weight.shape[:2]
    rank = 2

    def core() -> torch.Tensor:
        return random(rank, rank, 3, 3)

    def loha() -> dict[str, torch.Tensor]:
        return {
            f"hada_w{n}_{x}": random(rank, size)
            for n in "12"
            for x, size in (("a", out), ("b", channels))
        }

    mid, down, up = core(), random(rank, channels, 1, 1), random(out, rank, 1, 1)
    hada = loha() | {"hada_t1": core(), "hada_t2": core()}
    flat = {
        f"hada_w{n}_{x}": random(*shape)
        for n in "12"
        for x, shape in (("a", (out, rank)), ("b", (rank, channels * 9)))
    }
    w1, w2 = random(4, 4), random(out // 4, channels // 4, 3, 3)
    lokr = {
        "lokr_w1": w1,
        "lokr_t2": core(),
        "lokr_w2_a": random(rank, out // 4),
        "lokr_w2_b": random(rank, channels // 4),
    }
    full = torch.randn_like(weight)
    dora_down, dora_up = low_rank(weight, rank)
    new = weight + added(dora_down, dora_up)

    def kron(second: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ab,cdhw->acbdhw", w1, second).reshape(weight.shape)

    def dora(scale: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        norm = new.square().sum(axes, keepdim=True).sqrt()
        return scale * new / norm - weight

    pair = {"lora_down.weight": dora_down, "lora_up.weight": dora_up}
    rows, columns = random(out, 1, 1, 1) + 1, random(1, channels, 1, 1) + 1
    first, second = (
        torch.einsum(tucker, hada[f"hada_t{n}"], hada[f"hada_w{n}_a"], hada[f"hada_w{n}_b"])
        for n in "12"
    )
    cases: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = [
        (
            {"lora_mid.weight": mid, "lora_down.weight": down, "lora_up.weight": up},
            torch.einsum(tucker, mid, up.flatten(1).T, down.flatten(1)),
        ),
        (hada, first * second),
        (
            flat,
            (
                (flat["hada_w1_a"] @ flat["hada_w1_b"]) * (flat["hada_w2_a"] @ flat["hada_w2_b"])
            ).view(weight.shape),
        ),
        ({"lokr_w1": w1, "lokr_w2": w2}, kron(w2)),
        (lokr, kron(torch.einsum(tucker, lokr["lokr_t2"], lokr["lokr_w2_a"], lokr["lokr_w2_b"]))),
        ({"diff": full}, full),
        ({**pair, "dora_scale": rows}, dora(rows, (1, 2, 3))),
        ({**pair, "dora_scale": columns}, dora(columns, (0, 2, 3))),
        ({"weight": rows.view(1, -1, 1, 1), "on_input": torch.tensor(0)}, weight * rows),
        ({"weight": columns, "on_input": torch.tensor([1])}, weight * columns),
    ]
    for tensors, delta in cases:
        key = f"lycoris_{CONV.replace('.', '_')}"
        save_file(
            {f"{key}.{name}": t.contiguous() for name, t in tensors.items()},
            tmp_path / "a.safetensors",
        )
        got = merged(tmp_path / "a.safetensors", templates, unet=(TINIES["1.5"], before))["unet"]
        agree(got, {f"{CONV}.weight": weight + delta}, before)
    for good, _ in (cases[0], cases[1], cases[4]):
        (name,) = [n for n in good if n.endswith(("mid.weight", "_t2"))]
        for wrong in ((rank, rank + 1, 3, 3), (rank, rank, 1, 1), (rank, rank, 3)):
            bad = {**good, name: random(*wrong)}
            save_file({f"{key}.{n}": t for n, t in bad.items()}, tmp_path / "a.safetensors")
            with pytest.raises(MappingError, match="conv1"):
                merged(tmp_path / "a.safetensors", templates, unet=(TINIES["1.5"], before))
    with pytest.raises(
        MappingError, match=r"conv1 has .*, expected \[rank, 288\] and \[32, rank\]"
    ):
        save_file(
            {f"{key}.lora_down.weight": random(2, 32, 5, 5), f"{key}.lora_up.weight": up},
            tmp_path / "a.safetensors",
        )
        merged(tmp_path / "a.safetensors", templates, unet=(TINIES["1.5"], before))


def test_the_command_merges_into_a_unet(unets, templates, tmp_path) -> None:
    unets["1.5"].save_pretrained(tmp_path / "base")
    before = unets["1.5"].state_dict()
    file, deltas = kohya(
        "lora_unet", {m: before[f"{m}.weight"] for m in (CONV, POINT, LINEAR)}, 1.0
    )
    save_file(file, tmp_path / "a.safetensors")
    arguments = [
        str(tmp_path / "base"),
        str(tmp_path / "out"),
        "--lora",
        f"{tmp_path / 'a.safetensors'}:0.5",
    ]
    assert convert(arguments) == 0
    after = UNet2DConditionModel.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in before.items():
        expected = tensor + 0.5 * deltas[name] if name in deltas else tensor
        np.testing.assert_allclose(after[name], expected, atol=1e-6)
    again = tmp_path / "again.safetensors"
    options = ["--to", "comfy", "--config", str(tmp_path / "base/config.json")]
    assert convert([str(tmp_path / "a.safetensors"), str(again), *options]) == 0
    assert "diffusion_model.input_blocks.1.0.in_layers.2.lora_A.weight" in load_file(again)
    options = ["--to", "kohya"]
    with pytest.raises(MappingError, match="give its folder with --config"):
        convert([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *options])


@pytest.mark.slow
def test_every_product_and_convolution_reads_an_adapter(templates) -> None:
    """Of what is traced: none is left out silently."""
    config = TINIES["1.5"]
    network, params, adapters = network_of(config), templates[config], {}
    for site in adapter_sites(params):
        (fan_in, out), ones = site.shape, (1,) * len(site.window)
        a, b = np.zeros((1, fan_in, *site.window)), np.zeros((out, 1, *ones))
        adapters |= dict.fromkeys(site.names, Adapter(a, b, 1.0))
    lora, module = low_rank_tree(adapters, params), network.build(config)

    def run(lora: Any, params: Any, inputs: Any) -> Any:
        return module.apply({"params": params, "lora": lora}, **inputs)

    traced = jax.make_jaxpr(run)(lora, params, network.inputs(config)).jaxpr
    used = {id(variable) for equation in traced.eqns for variable in equation.invars}
    leaves = jax.tree.leaves_with_path(lora)
    pairs = zip(leaves, traced.invars, strict=False)
    assert not [jax.tree_util.keystr(path) for (path, _), v in pairs if id(v) not in used]
    assert sum(path[-1].key == "a" and leaf.ndim == 4 for path, leaf in leaves) > 10


def zeros(name: str) -> np.ndarray:
    """In place of weights that are not read."""
    return np.zeros(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "kohyas"),
    [
        ({"unet": TINIES["1.5"], "text_encoder": CLIP}, f"lora_unet_{CONV.replace('.', '_')}"),
        (
            {"unet": TINIES["XL"], "text_encoder": CLIP, "text_encoder_2": BIG},
            "lora_unet_input_blocks_1_0_in_layers_2",
        ),
        ({"transformer": SD3["3.5"]}, "lora_unet_joint_blocks_0_x_block_attn_qkv"),
        ({"transformer": PIXART}, "lora_unet_blocks_1_cross_attn_kv_linear"),
    ],
    ids=["1.5", "XL", "SD3", "PixArt"],
)
def test_written_in_all_names_and_read_again(model, kohyas, tmp_path) -> None:
    """Every product and convolution but one, so that fused ones have a part that is not adapted;
    alpha is the rank."""
    templates, rng = {n: abstract_params(one) for n, one in model.items()}, np.random.default_rng(0)
    given, expected = dict[str, dict[str, Adapter]](), dict[str, dict[str, np.ndarray]]()
    for component, template in templates.items():
        given[component], expected[component] = {}, {}
        for name, leaf in published_leaves(template).items():
            module = re.fullmatch(r"(.*(?:attn|conv|mlp|ff|proj).*)[.]weight", name)
            if not module or len(leaf.shape) < 2 or name.endswith("attn2.to_k.weight"):
                continue
            a = rng.standard_normal((2, *leaf.shape[1:]), np.float32)
            b = rng.standard_normal((leaf.shape[0], 2, *(1 for _ in leaf.shape[2:])), np.float32)
            given[component][module[1]] = Adapter(a, b, 0.5)
            expected[component][name] = 0.5 * added(*map(torch.from_numpy, (a, b))).numpy()
    for naming in get_args(LoraNaming):
        path = tmp_path / f"{naming}.safetensors"
        write_adapters(path, given, {}, naming=naming, model=model)
        changes = read_adapters(path, templates).changes
        assert changes.keys() == given.keys()
        for component, mine in expected.items():
            deltas = {name: change.delta for name, change in changes[component].items()}
            got = {name: delta(zeros) for name, delta in deltas.items() if delta}
            assert {name for name, delta in got.items() if delta.any()} == mine.keys()
            for name, delta in mine.items():
                np.testing.assert_allclose(got[name], delta, atol=5e-6, err_msg=name)
    arrays = load_file(tmp_path / "kohya.safetensors")
    assert arrays[f"{kohyas}.alpha"] == len(arrays[f"{kohyas}.lora_down.weight"])
