"""LoRA: the forward, the files of others, and the picture that diffusers draws with both."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_xlabs_flux_lora_to_diffusers,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from test_flux import CONFIG, inputs

import fluxjax
from fluxjax.checkpoint.engine import MappingError
from fluxjax.checkpoint.lora.reader import read_lora
from fluxjax.checkpoint.lora.scaled_file import split_scale
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.cli import run
from fluxjax.config import DEV, TINY, ConfigError, LoraConfig
from fluxjax.config.lora import TARGETS
from fluxjax.hub import tiny_folder
from fluxjax.models.dense import Dense
from fluxjax.models.flux import FluxTransformer
from fluxjax.models.lora import (
    combine_loras,
    init_lora,
    join_scales,
    matches,
    split_scales,
    variables,
)
from fluxjax.models.names import flatten, unflatten
from fluxjax.models.stacking import unstack_layers
from fluxjax.parallel.mesh import make_mesh, replicated
from fluxjax.parallel.rules import param_shardings, state_shardings
from fluxjax.sample.__main__ import main
from fluxjax.sample.picture_formats import read_record

SIZE = {"width": 64, "height": 48, "steps": 4, "max_sequence_length": 16}
ONE_BLOCK = replace(DEV.transformer, num_layers=1, num_single_layers=1)


def random_lora(params, config: LoraConfig, seed: int = 0, size: float = 0.1) -> dict:
    """With a `b` that is not zero."""
    lora = init_lora(jax.random.key(seed), params, config)
    rng = np.random.default_rng(seed)
    flat = flatten(lora)
    for path, leaf in flat.items():
        if path[-1] == "b":
            flat[path] = jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32)
    return unflatten(flat)


def effects(lora) -> dict[tuple[str, ...], np.ndarray]:
    """(a b) scale of every module, of one layer each."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(lora).items()}
    return {
        path[:-1]: leaf @ flat[*path[:-1], "b"] * flat[*path[:-1], "scale"][..., None, None]
        for path, leaf in flat.items()
        if path[-1] == "a"
    }


def same_effects(got, expected, bound: float = 1e-6) -> None:
    got, expected = effects(got), effects(expected)
    for path in got.keys() | expected.keys():
        one = got.get(path, np.zeros(1))
        other = expected.get(path, np.zeros(1))
        assert np.abs(one - other).max() <= bound, path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A LoRA that diffusers saved and one that we wrote, with different modules and alphas."""
    folder = tmp_path_factory.mktemp("loras")
    params = abstract_params(TINY.transformer)
    ours = LoraConfig(rank=3, alpha=1.5, targets=("attn.to_[qkv]", "proj_mlp", "norm1.linear"))
    write_lora(
        folder / "ours.safetensors", {"transformer": random_lora(params, ours, size=1.0)}, ours
    )
    torch.manual_seed(0)
    pipe = FluxPipeline.from_pretrained(tiny_folder())
    config = PeftConfig(
        r=4,
        lora_alpha=8,
        target_modules=[*TARGETS, "proj_mlp"],
        rank_pattern={"ff.net.2": 2},
        alpha_pattern={"attn.to_q": 2},
    )
    pipe.transformer.add_adapter(config)
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.7 * torch.randn_like(weight))
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
        weight_name="theirs.safetensors",
    )
    return folder / "theirs.safetensors", folder / "ours.safetensors"


@pytest.fixture(scope="module")
def pipeline(files):
    theirs, ours = files
    return fluxjax.load_pipeline("tiny", loras=[(theirs, 0.7), f"{ours}:-0.5"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_same_picture_as_diffusers_with_two_loras(files, pipeline):
    theirs, ours = files
    reference = FluxPipeline.from_pretrained(tiny_folder())
    reference.set_progress_bar_config(disable=True)

    def draw():
        return reference(
            "a red circle",
            width=64,
            height=48,
            num_inference_steps=4,
            guidance_scale=3.5,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(3),
        ).images[0]

    plain = np.asarray(draw(), int)
    reference.load_lora_weights(theirs.parent, weight_name=theirs.name, adapter_name="theirs")
    reference.load_lora_weights(ours.parent, weight_name=ours.name, adapter_name="ours")
    reference.set_adapters(["theirs", "ours"], [0.7, -0.5])
    expected = np.asarray(draw(), int)
    got = np.asarray(pipeline("a red circle", seed=3, guidance=3.5, **SIZE)[0], int)
    distance = np.abs(got - expected)
    change = np.abs(expected - plain).mean()
    print(f"{(distance <= 1).mean():.5f} within 1, changed by {change:.1f} on the average")
    assert (distance <= 1).mean() >= 0.999 and distance.max() <= 4
    assert change > 2, "LoRA that change nothing prove nothing"


@pytest.mark.slow
def test_the_command_records_its_loras_and_repeats_them(
    files, pipeline, monkeypatch, tmp_path, capsys
):
    asked = []

    def load(model, *, loras, **options):
        asked.append(loras)
        return pipeline

    monkeypatch.setattr("fluxjax.sample.loading.load_pipeline", load)
    monkeypatch.setenv("FLUXJAX_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(files[0].parent)
    size = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    loras = ["--lora", "theirs.safetensors:0.7", "--lora", "ours.safetensors:-0.5"]
    out = tmp_path / "a.png"
    for arguments in (
        ["a star", *loras, *size, "--seed", "1", "--out", str(out)],
        ["--like", str(out), "--out", str(tmp_path / "b.png")],
    ):
        monkeypatch.setattr(sys, "argv", ["sample", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(main)
        assert ended.value.code == 0, capsys.readouterr().err
    expected = [f"{files[0]}:0.7", f"{files[1]}:-0.5"]
    assert list(map(list, asked)) == [expected, expected]
    record = read_record(tmp_path / "b.png")
    assert record["lora"] == [f"{files[0].name}:0.7", f"{files[1].name}:-0.5"]
    assert record["sha256"]["lora 2"] == hashlib.sha256(files[1].read_bytes()).hexdigest()


def test_scale_of_a_file():
    assert split_scale("a.safetensors") == ("a.safetensors", 1.0)
    assert split_scale("a:b.safetensors:-0.25") == ("a:b.safetensors", -0.25)
    assert split_scale("C:a.safetensors") == ("C:a.safetensors", 1.0)
    with pytest.raises(ConfigError, match="must be a number"):
        split_scale("a.safetensors:nan")
    with pytest.raises(ConfigError, match="within 1e\\+30, got -1e"):  # no float32 holds it
        split_scale("a.safetensors:-1e39")


def merged(params, lora) -> dict:
    flat = dict(flatten(params))
    for module, change in effects(lora).items():
        flat[*module, "kernel"] = flat[*module, "kernel"] + jnp.asarray(change, jnp.float32)
    return unflatten(flat)


@pytest.fixture(scope="module")
def stacked():
    """(model, parameters, LoRA, inputs) of a small network with scanned blocks."""
    model = FluxTransformer(CONFIG, scan_layers=True)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32),
        abstract_params(CONFIG, stacked=True),
    )
    config = LoraConfig(rank=2, alpha=3.0, targets=(*TARGETS, r".*embedder.*", "norm.*linear"))
    return model, params, random_lora(params, config), inputs(CONFIG)


@pytest.mark.slow
def test_forward_equals_merged_weights_also_sharded(stacked):
    model, params, lora, x = stacked
    apply = jax.jit(model.apply)
    expected = apply({"params": merged(params, lora)}, **x)
    plain = apply({"params": params}, **x)
    size = float(jnp.abs(expected).max())
    got = apply({"params": params, "lora": lora}, **x)
    assert jnp.abs(got - expected).max() <= 1e-5 * size
    assert jnp.abs(plain - expected).max() >= 0.01 * size
    mesh = make_mesh("fsdp=4,tensor=2")
    placed = {
        "params": jax.device_put(params, param_shardings(CONFIG, params, mesh)),
        "lora": jax.device_put(lora, state_shardings(CONFIG, lora, mesh)),
    }
    kernel = placed["params"]["transformer_blocks"]["attn"]["to_q"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    on_mesh = apply(placed, **jax.device_put(x, replicated(mesh)))
    assert jnp.abs(on_mesh - expected).max() <= 1e-5 * size


def test_a_float32_lora_over_bfloat16_weights():
    """Small changes survive, where merging them into the weights would lose them."""
    dense = Dense(64, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (5, 3, 32))
    params = dense.init(jax.random.key(1), x)["params"]
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in ((2, (32, 4)), (3, (4, 64))))
    lora = {"a": a, "b": b, "scale": jnp.float32(0.25)}
    out = dense.apply({"params": params, "lora": lora}, x)
    assert out.dtype == jnp.bfloat16
    expected = dense.apply({"params": params}, x) + 0.25 * (x @ a @ b)
    assert jnp.abs(out - expected.astype(jnp.bfloat16)).max() <= 2**-7 * jnp.abs(expected).max()


def test_gradients_reach_the_lora_alone():
    dense = Dense(7)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    params = dense.init(jax.random.key(1), x)["params"]
    lora = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 7)), "scale": jnp.float32(0.5)}

    def loss(lora):
        return jnp.sum(jnp.square(dense.apply({"params": params, "lora": lora}, x)))

    gradients = jax.grad(loss)(lora)
    assert gradients["scale"] == 0 and jnp.abs(gradients["a"]).min() > 0
    equations = jax.make_jaxpr(jax.grad(loss))(lora).jaxpr.eqns
    products = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "dot_general"]
    products = {tuple(sorted(shape)) for shape in products}
    assert {(2, 3), (2, 7)} <= products, "the count itself must work"
    assert (3, 7) not in products, "a gradient of the frozen weights was formed"
    trained, scales = split_scales({"to_q": lora})
    assert flatten(trained).keys() == {("to_q", "a"), ("to_q", "b")}
    assert join_scales(trained, scales) == {"to_q": lora}
    assert variables(params) == {"params": params}


def test_initial_values_and_targets():
    params = abstract_params(CONFIG, stacked=True)
    config = LoraConfig(rank=4, alpha=2.0, targets=("attn.to_q", r"single.*\.1\.proj_mlp"))
    lora = init_lora(jax.random.key(0), params, config)
    query = lora["transformer_blocks"]["attn"]["to_q"]
    bound = 1 / np.sqrt(CONFIG.inner_dim)
    assert 0.9 * bound < float(jnp.abs(query["a"]).max()) <= bound
    assert not query["b"].any() and query["scale"].tolist() == [0.5, 0.5]
    assert lora["single_transformer_blocks"]["proj_mlp"]["scale"].tolist() == [0.0, 0.5]
    same = init_lora(jax.random.key(0), abstract_params(CONFIG), config)
    per_block = unstack_layers(lora)
    for path, leaf in flatten(same).items():
        np.testing.assert_array_equal(leaf, flatten(per_block)[path])
    with pytest.raises(ConfigError, match=r"'attn\.to_x', 'nothing'"):
        init_lora(jax.random.key(0), params, LoraConfig(targets=("nothing", "attn.to_x", "proj")))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"targets": ("(",)}):
        with pytest.raises(ConfigError):
            LoraConfig(**wrong)
    assert matches("ff.net.2", "transformer_blocks.3.ff.net.2")
    assert not matches("ff.net.2", "transformer_blocks.3.xff.net.2")


@pytest.mark.parametrize("naming", ["peft", "kohya", "comfy"])
def test_written_and_read_again(tmp_path, naming):
    """Stacked and per block, only some layers, only some parts of fused modules."""
    params = abstract_params(CONFIG, stacked=True)
    targets = ("attn.to_[qkv]", "attn.add_k_proj", r"transformer_blocks\.1\.ff.net.2", "norm_out.*")
    config = LoraConfig(rank=3, alpha=2.0, targets=targets)
    lora, path = random_lora(params, config), tmp_path / "a.safetensors"
    write_lora(
        path,
        {"transformer": lora},
        config,
        {"recipe": "x"},
        naming=naming,
        model={"transformer": CONFIG},
    )
    got = read_lora(path, params)
    assert got.metadata["recipe"] == "x"
    assert json.loads(got.metadata["fluxjax_lora"])["alpha"] == 2.0
    same_effects(got.tree, lora)
    arrays, metadata = read_safetensors(path)  # alpha is the rank wherever a program looks for it
    asked = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    assert asked.get("transformer.lora_alpha") == asked.get("transformer.r")
    for name, tensor in arrays.items():
        if name.endswith("alpha"):
            assert tensor.read() == arrays[name.replace("alpha", "lora_down.weight")].shape[0]
    same_effects(read_lora(path, abstract_params(CONFIG)).tree, unstack_layers(lora))
    if naming == "peft":
        assert (
            "transformer.transformer_blocks.0.ff.net.2.lora_A.weight"
            not in (read_safetensors(path)[0])
        )


def kohya(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All modules of one double and one single block at the size of FLUX.1-dev."""
    sizes = {"_attn_proj": (3072, 3072), "_attn_qkv": (3072, 9216), "_mlp_0": (3072, 12288)}
    sizes |= {"_mlp_2": (12288, 3072), "_mod_lin": (3072, 18432)}
    modules = {f"double_blocks_0_{s}{n}": v for s in ("img", "txt") for n, v in sizes.items()}
    modules |= {
        "single_blocks_0_linear1": (3072, 21504),
        "single_blocks_0_linear2": (15360, 3072),
        "single_blocks_0_modulation_lin": (3072, 9216),
    }
    arrays: dict[str, np.ndarray] = {}
    for module, (fan_in, out) in modules.items():
        rank = 6 if module.endswith("img_attn_qkv") else 2
        up = rng.standard_normal((out, rank))
        if rank == 6:  # block-diagonal: three LoRA of rank 2
            up *= np.kron(np.eye(3), np.ones((out // 3, 2)))
        arrays[f"lora_unet_{module}.lora_down.weight"] = rng.standard_normal((rank, fan_in))
        arrays[f"lora_unet_{module}.lora_up.weight"] = up
        arrays[f"lora_unet_{module}.alpha"] = np.asarray(1.0)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    write_safetensors(path, {name: of_array(array) for name, array in arrays.items()})
    return path


def probed(tree) -> dict[str, np.ndarray]:
    """(x a) b scale of every module for a random x: products of full size would be large."""
    found = {}
    for path, a in flatten(tree).items():
        if path[-1] == "a":
            b, scale = (flatten(tree)[*path[:-1], name] for name in ("b", "scale"))
            x = np.random.default_rng(0).standard_normal(a.shape[0])
            found[".".join(path[:-1])] = (x @ a) @ b * scale
    return found


def test_kohya_and_xlabs_files_mean_what_diffusers_reads(tmp_path):
    rng = np.random.default_rng(0)
    params = abstract_params(ONE_BLOCK)
    xlabs = {}
    for module, out in (
        ("double_blocks.0.processor.qkv_lora1", 9216),
        ("double_blocks.0.processor.qkv_lora2", 9216),
        ("double_blocks.0.processor.proj_lora1", 3072),
        ("single_blocks.0.processor.qkv_lora", 9216),
    ):
        xlabs[f"{module}.down.weight"] = rng.standard_normal((2, 3072)).astype(np.float32)
        xlabs[f"{module}.up.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    for arrays, convert in (
        (kohya(rng), _convert_kohya_flux_lora_to_diffusers),
        (xlabs, _convert_xlabs_flux_lora_to_diffusers),
    ):
        path = save(tmp_path / "a.safetensors", arrays)
        converted = convert({name: torch.tensor(array) for name, array in arrays.items()})
        theirs = save(
            tmp_path / "b.safetensors",
            {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in converted.items()},
        )
        got = probed(read_lora(path, params).tree)
        expected = probed(read_lora(theirs, params).tree)
        assert got.keys() == expected.keys() and len(got) >= 8
        for name in got:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-3)
    assert got["transformer_blocks_0.attn.to_q"].std() > 1


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.double_blocks.0.", "base_model.model.double_blocks.0."]
)
def test_fused_names_of_others_and_the_halves_of_the_last_layer(tmp_path, prefix):
    rng, d = np.random.default_rng(0), CONFIG.inner_dim
    a, b = rng.standard_normal((2, d)), rng.standard_normal((3 * d, 2))
    out = rng.standard_normal((2 * d, 2))
    last = re.sub("double_blocks.0.$", "final_layer.adaLN_modulation.1", prefix)
    arrays = {
        f"{prefix}img_attn.qkv.lora_A.weight": a,
        f"{prefix}img_attn.qkv.lora_B.weight": b,
        f"{last}.lora_A.weight": a,
        f"{last}.lora_B.weight": out,
    }
    path = save(tmp_path / "a.safetensors", {k: v.astype(np.float32) for k, v in arrays.items()})
    found = effects(read_lora(path, abstract_params(CONFIG)).tree)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        expected = (b[i * d : (i + 1) * d] @ a).T
        np.testing.assert_allclose(
            found["transformer_blocks_0", "attn", name], expected, rtol=1e-4, atol=1e-5
        )
    scale_first = np.concatenate([out[d:], out[:d]])
    np.testing.assert_allclose(
        found["norm_out", "linear"], (scale_first @ a).T, rtol=1e-4, atol=1e-5
    )


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    d = CONFIG.inner_dim
    query = "transformer.transformer_blocks.0.attn.to_q"
    zeros = np.zeros
    arrays = {
        f"{query}.lora_A.weight": zeros((2, d)),
        f"{query}.lora_B.weight": zeros((d, 2)),
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight": zeros((2, d)),
        "lora_transformer_transformer_blocks_0_attn_to_q.lora_up.weight": zeros((d, 2)),
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": zeros((2, d)),
        "transformer.transformer_blocks.0.attn.to_k.lora_down.weight": zeros((2, d)),
        "transformer.transformer_blocks.0.attn.to_v.lora_A.weight": zeros((2, d)),
        "transformer.transformer_blocks.0.attn.to_v.lora_B.weight": zeros((d, 3)),
        "transformer.transformer_blocks.9.attn.to_q.lora_A.weight": zeros((2, d)),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": zeros((2, d)),
        "transformer.proj_out.lora_A.weight": np.full((2, d), np.nan),
        "transformer.proj_out.lora_B.weight": zeros((CONFIG.out_channels, 2)),
        "../../etc/x": zeros(1),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    path = save(tmp_path / "a.safetensors", arrays)
    with pytest.raises(MappingError) as error:
        read_lora(path, abstract_params(CONFIG))
    text = str(error.value)
    for words in (
        "8 tensor(s)",
        "unknown: ../../etc/x [1]",
        "missing: B (up) of transformer.transformer_bl",
        "doubled: lora_transformer_transformer_blocks_0_attn_to_q",
        "unknown: text_encoder.text_mo",
        "shape: transformer.transformer_blocks.0.attn.to_v has [2, 48] and [48, 3]",
        "unknown: transformer.transformer_blocks.9.attn.to_q",
        "not finite: transformer.proj_out",
        "doubled: transformer.transformer_blocks.0.attn.to_k.lora_down.weight",
    ):
        assert words in text, words


def test_a_file_that_lacks_what_its_metadata_names(tmp_path, files):
    tensors, metadata = read_safetensors(files[0])
    gone = "transformer.transformer_blocks.1.ff.net.2.lora_"
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    assert len(left) == len(tensors) - 2
    write_safetensors(tmp_path / "a.safetensors", left, metadata)
    with pytest.raises(MappingError, match=r"1 tensor.*\n  missing: transformer_blocks.1.ff.net.2"):
        read_lora(tmp_path / "a.safetensors", abstract_params(TINY.transformer))


def test_damaged_metadata_and_other_files_are_refused(tmp_path):
    params, path = abstract_params(CONFIG), tmp_path / "a.safetensors"
    base = "transformer.proj_out.lora_"
    d, out = CONFIG.inner_dim, CONFIG.out_channels
    arrays = {f"{base}A.weight": np.ones((2, d)), f"{base}B.weight": np.ones((out, 2))}
    tensors = {name: of_array(array.astype(np.float32)) for name, array in arrays.items()}
    for text in (
        "{",
        "[]",
        '{"transformer.lora_alpha": "many"}',
        '{"transformer.use_dora": true}',
        '{"transformer.alpha_pattern": {"(a+)+$": 1}}',
    ):
        write_safetensors(path, tensors, {"lora_adapter_metadata": text})
        with pytest.raises((ConfigError, MappingError), match=r"a\.safetensors"):
            read_lora(path, params)
    rank_stabilised = '{"transformer.lora_alpha": 4, "transformer.use_rslora": true}'
    write_safetensors(path, tensors, {"lora_adapter_metadata": rank_stabilised})
    np.testing.assert_allclose(read_lora(path, params).tree["proj_out"]["scale"], 4 / np.sqrt(2))
    with pytest.raises(FileNotFoundError, match="there is no LoRA file"):
        read_lora(tmp_path / "none.safetensors", params)
    with pytest.raises(ValueError, match="pickle"):
        read_lora(tmp_path / "a.ckpt", params)


def test_several_at_once_are_their_sum():
    params = abstract_params(CONFIG, stacked=True)
    one = random_lora(params, LoraConfig(rank=2, alpha=1.0, targets=("attn.to_[qk]",)), seed=1)
    two = random_lora(params, LoraConfig(rank=3, targets=("attn.to_k", "proj_mlp")), seed=2)
    both = combine_loras([(one, 0.5), (two, -2.0)])
    assert both["transformer_blocks"]["attn"]["to_k"]["a"].shape[-1] == 5
    first, second = effects(one), effects(two)
    for path, change in effects(both).items():
        expected = 0.5 * first.get(path, 0.0) - 2.0 * second.get(path, 0.0)
        np.testing.assert_allclose(change, expected, atol=1e-6)
    same_effects(combine_loras([(one, 0.5), (one, -0.5)]), {})
    halved = effects(combine_loras([(one, 0.5)]))
    assert all(np.allclose(halved[path], 0.5 * first[path]) for path in first)
