"""How much a LoRA counts, as PEFT says it in metadata or beside the file; and hostile ones."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from fluxjax.checkpoint.engine import MappingError
from fluxjax.checkpoint.lora.original_names import prefix_of
from fluxjax.checkpoint.lora.peft_config import (
    PEFT_METADATA,
    Patterns,
    PeftConfig,
    read_peft_config,
)
from fluxjax.checkpoint.lora.reader import read_adapters, read_lora
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import TINY, ConfigError

TEMPLATE = abstract_params(TINY.transformer)
WIDTH = TINY.transformer.inner_dim
NAMES = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")


def adapter(folder: Path, prefix="base_model.model.", metadata=None, names=NAMES, **arrays) -> Path:
    folder.mkdir(exist_ok=True)
    rng, tensors = np.random.default_rng(0), {}
    for name in names:
        tensors[f"{prefix}{name}.lora_A.weight"] = rng.normal(size=(2, WIDTH)).astype("f")
        tensors[f"{prefix}{name}.lora_B.weight"] = rng.normal(size=(WIDTH, 2)).astype("f")
    path = folder / "adapter_model.safetensors"
    arrays = {k: of_array(v) for k, v in {**tensors, **arrays}.items()}
    write_safetensors(path, arrays, metadata)
    return path


def written(folder: Path, told: dict, arrays: dict) -> Path:
    """With these metadata."""
    path = folder / "told.safetensors"
    tensors = {name: of_array(array) for name, array in arrays.items()}
    write_safetensors(path, tensors, {PEFT_METADATA: json.dumps(told)})
    return path


def config(folder: Path, **values) -> Path:
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **values})
    (folder / "adapter_config.json").write_text(text)
    return folder


def scales(path: Path) -> list[float]:
    tree = read_lora(path, TEMPLATE).tree
    places = (
        tree["single_transformer_blocks_0"]["attn"]["to_q"],
        tree["transformer_blocks_0"]["attn"]["to_k"],
    )
    return [float(place["scale"]) for place in places]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lora_alpha": 5}, [2.5, 2.5]),
        ({"lora_alpha": 5, "use_rslora": True}, [5 / np.sqrt(2)] * 2),
        ({"lora_alpha": 5, "alpha_pattern": {"attn.to_q": 1}}, [0.5, 2.5]),
        ({"alpha_pattern": {"to_k": 6, r"transformer_blocks\.\d+\.attn\.to_k": 8}}, [1, 3]),
        ({"alpha_pattern": {"^transformer_blocks.0.attn.to_k": 6, "^attn.to_q": 8}}, [1, 3]),
        ({"r": 4, "rank_pattern": {"to_q": 2, "to_k": 2}}, [1, 1]),
        ({"target_modules": ["to_q", "attn.to_k"]}, None),
        # What narrows the named modules down leaves open which are meant.
        ({"target_modules": ["to_q", "attn.to_k"], "layers_to_transform": [1]}, [1, 1]),
        ({"target_modules": ["to_q", "attn.to_k"], "layers_pattern": "blocks"}, [1, 1]),
        ({"target_modules": ["to_q", "attn.to_k"], "exclude_modules": ["x"]}, [1, 1]),
        ({"target_modules": "all-linear", "init_lora_weights": "gaussian"}, [1, 1]),
    ],
)
def test_the_config_beside_the_file_counts(tmp_path: Path, values, expected) -> None:
    path = adapter(tmp_path)
    config(tmp_path, **values)
    if expected is None:
        with pytest.raises(MappingError, match="missing: "):
            read_lora(path, TEMPLATE)
        return
    np.testing.assert_allclose(scales(path), expected, rtol=1e-6)
    np.testing.assert_allclose(scales(tmp_path), expected, rtol=1e-6)
    metadata = {f"transformer.{key}": v for key, v in {"r": 2, "lora_alpha": 2, **values}.items()}
    same = adapter(tmp_path / "b", "transformer.", {PEFT_METADATA: json.dumps(metadata)})
    np.testing.assert_allclose(scales(same), expected, rtol=1e-6)
    # As `save_lora_adapter` of diffusers' networks writes them: neither has a prefix.
    own = {key.removeprefix("transformer."): value for key, value in metadata.items()}
    same = adapter(tmp_path / "c", "", {PEFT_METADATA: json.dumps(own)})
    np.testing.assert_allclose(scales(same), expected, rtol=1e-6)


def test_metadata_count_for_the_network_they_name(tmp_path: Path) -> None:
    """What they do not say is PEFT's default, or refused: never a scale that is made up."""

    def read(values, networks=("transformer",), prefixes=("transformer.",), **more):
        names = (NAMES, ("text_model.encoder.layers.0.mlp.fc1",))
        arrays = {}
        for prefix, modules in zip(prefixes, names, strict=False):
            width = WIDTH if modules is NAMES else TINY.text_encoder.hidden_size
            out = WIDTH if modules is NAMES else TINY.text_encoder.intermediate_size
            arrays |= {f"{prefix}{n}.lora_A.weight": np.ones((2, width), "f") for n in modules}
            arrays |= {f"{prefix}{n}.lora_B.weight": np.ones((out, 2), "f") for n in modules}
        path = written(tmp_path, values, {**arrays, **more})
        templates = {name: abstract_params(TINY.networks[name]) for name in networks}
        changes = read_adapters(path, templates).changes
        pairs = {c: [one.low_rank for one in mine.values()] for c, mine in changes.items()}
        return {c: {pair.scale for pair in mine if pair} for c, mine in pairs.items()}

    assert read({"transformer.r": 2}) == {"transformer": {4.0}}  # PEFT's lora_alpha is 8
    assert read({"r": 2, "lora_alpha": 5}) == {"transformer": {2.5}}
    two = {
        "networks": ("transformer", "text_encoder"),
        "prefixes": ("transformer.", "text_encoder."),
    }
    both = {"transformer.lora_alpha": 5, "text_encoder.lora_alpha": 3}
    assert read(both, **two) == {"transformer": {2.5}, "text_encoder": {1.5}}
    for values, options, silent in (
        ({"transformer.lora_alpha": 5}, two, "text_encoder"),
        ({"r": 2, "lora_alpha": 5}, two, "t.*"),
        ({"unet.lora_alpha": 5}, {}, "transformer"),
        ({}, {}, "transformer"),
    ):
        with pytest.raises(ConfigError, match=f"do not say how much it counts in the {silent}$"):
            read(values, **options)
    alpha = {f"transformer.{NAMES[0]}.alpha": np.float32(5.03125)}  # as 16 bits may round it
    assert read({"transformer.lora_alpha": 5}, **alpha) == {"transformer": {2.5, 5.03125 / 2}}
    with pytest.raises(
        MappingError, match=r"alpha is 5\.03\d+ of rank 2, and its metadata .*other"
    ):
        read({"transformer.lora_alpha": 2}, **alpha)


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_"])
def test_a_t5_that_is_the_first_text_encoder_is_named_so(tmp_path: Path, prefix) -> None:
    """PixArt's, as OneTrainer and kohya's scripts name adapters of it."""
    t5 = TINY.text_encoder_2
    module = "encoder.block.0.layer.1.DenseReluDense.wo"
    name = f"{prefix}{module.replace('.', '_')}"
    a, b = np.ones((2, t5.d_ff), "f"), np.ones((t5.d_model, 2), "f")
    path = tmp_path / "t5.safetensors"
    arrays = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": a[0, :1]}
    write_safetensors(path, {key: of_array(array) for key, array in arrays.items()})
    changes = read_adapters(path, {"text_encoder": abstract_params(t5)}).changes["text_encoder"]
    pair = changes[f"{module}.weight"].low_rank
    assert pair is not None and pair.scale == 0.5
    assert prefix_of("kohya", "text_encoder", {"text_encoder": t5}) == "lora_te1_"


def test_a_lokr_tells_its_scale_in_metadata_too(tmp_path: Path) -> None:
    name = f"transformer.{NAMES[0]}"
    arrays = {f"{name}.lokr_w1": np.ones((2, 2), "f"), f"{name}.lokr_w2_a": np.ones((96, 4), "f")}
    arrays[f"{name}.lokr_w2_b"] = np.ones((4, WIDTH // 2), "f")
    told = {"transformer.peft_type": "LOKR", "transformer.r": 4, "transformer.alpha": 6}
    path = written(tmp_path, told, arrays)
    (change,) = read_adapters(path, {"transformer": TEMPLATE}).changes["transformer"].values()
    assert change.delta is not None
    np.testing.assert_allclose(change.delta(lambda name: np.empty(0)), 4 * 6 / 4)


def test_as_recorded_from_peft(shared: Path, tmp_path: Path) -> None:
    folder = shared / "goldens" / "lora"
    recorded = read_safetensors(folder / "expected.safetensors")[0]
    expected = {
        name.split("|")[1].removesuffix(".weight"): tensor.read()
        for name, tensor in recorded.items()
        if name.startswith("peft_folder|")
    }
    assert len(expected) == 2
    tree = read_lora(folder / "peft_folder", TEMPLATE).tree
    for name, probe in expected.items():
        place = tree
        for part in name.replace("blocks.", "blocks_").split("."):
            place = place[part]
        ours = (place["a"] @ place["b"] * place["scale"]).T
        probed = ours @ recorded["probe"].read()[: ours.shape[1]]
        np.testing.assert_allclose(probed, probe, rtol=1e-5, atol=1e-6)
    shutil.copy(folder / "peft_folder" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(ConfigError, match=r"how much it counts is in adapter_config\.json"):
        read_lora(tmp_path, TEMPLATE)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_dora": True}, "missing: magnitude of base_model.model.single"),
        ({"use_something_new": True}, "use_something_new"),
        ({"lora_bias": True}, "missing: the bias of B .up. of base_model"),
        ({"lora_bias": "yes"}, "lora_bias is 'yes'"),
        ({"bias": "all"}, "bias = all"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa"),
        ({"peft_type": "LOHA"}, "has tensors of LoRA, and .* is of a LoHa"),
        ({"peft_type": "LOKR", "r": "2"}, "r is 2"),
        ({"r": 3}, "has rank 2, and .* says 3"),
        ({"rank_pattern": {"to_k": 8}}, "has rank 2, and .* says 8"),
        ({"lora_alpha": "5"}, "lora_alpha is 5"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**200}, "lora_alpha is 1000"),
        ({"lora_alpha": 1e29}, "not finite"),
        ({"alpha_pattern": {"(to_q|to_k)": 2}}, "is not read, only names are"),
        ({"alpha_pattern": {".*" * 30 + "x": 2}}, "is not read, only names are"),
        ({"alpha_pattern": {"[^\n]*" * 30 + "x": 2}}, "is not read, only names are"),
        ({"peft_type": "L" * 1000}, "is of a 'L{60}'; only"),
        ({f"use_{'x' * 1000}": True}, "asks for use_x{56} = True"),
        ({"alpha_pattern": {f"x{i}.*": 2 for i in range(100)}}, "100 patterns"),
        ({"alpha_pattern": {"[": 2}}, "no usable alpha"),
        ({"alpha_pattern": [1]}, "should map names to numbers"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ],
)
def test_more_than_lora_and_damage_are_named(tmp_path: Path, values, words) -> None:
    path = adapter(tmp_path)
    config(tmp_path, **values)
    if values.get("lora_alpha") == 1e29:  # finite, until it is multiplied
        adapter(tmp_path, **{f"base_model.model.{NAMES[0]}.alpha": np.asarray(1e300)})
    with pytest.raises(ValueError, match=words) as caught:
        read_lora(path, TEMPLATE)
    assert "adapter_config.json" in str(caught.value) or "adapter_model" in str(caught.value)


@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
def test_what_is_no_product_is_named(tmp_path: Path, names) -> None:
    changed = {f"transformer.{name}.diff": np.zeros((WIDTH, WIDTH), "f") for name in names}
    path = adapter(tmp_path, names=(), **changed)
    more = "" if len(names) == 1 else ", and 1 more"
    with pytest.raises(ConfigError, match=rf"low-rank products: it changes [\w.]+{more}$"):
        read_lora(path, TEMPLATE)


def test_numbers_beyond_any_float(tmp_path: Path) -> None:
    for text in ('{"lora_alpha": 1' + "0" * 400 + "}", '{"lora_alpha": 1e999}', "[" * 10**5):
        adapter(tmp_path)
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
            read_lora(tmp_path, TEMPLATE)
        metadata = {PEFT_METADATA: text.replace("lora", "transformer.lora")}
        with pytest.raises(ConfigError, match="damaged"):
            read_peft_config(tmp_path / "x", metadata, "transformer")


def test_many_targets_and_patterns_cost_little() -> None:
    """Hundreds of modules against tens of thousands of names, and the worst expressions."""
    names = [f"transformer_blocks.{i}.attn.to_{x}" for i in range(100) for x in "qkvo"]
    begun = time.process_time()
    many = PeftConfig(targets=frozenset(f"no.module.{i}" for i in range(30_000)) | {"to_q"})
    assert len(many.targeted(names)) == 100
    worst = {f".*{'a' * 150}{i}": 1.0 for i in range(10)} | {f"n{i}": 1.0 for i in range(30_000)}
    patterns = Patterns({**worst, "to_q": 7.0})
    assert [patterns.get(name, 1.0) for name in names].count(7.0) == 100
    with pytest.raises(ValueError, match="30000 patterns are expressions"):
        Patterns({f"x{i}.*": 1.0 for i in range(30_000)})
    assert time.process_time() - begun < 3


def test_other_files_are_told(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "flux.safetensors",
        {"double_blocks.0.img_attn.qkv.weight": of_array(np.zeros(2, np.float32))},
    )
    with pytest.raises(ConfigError, match="it is a whole FLUX transformer, to be given as a model"):
        read_lora(tmp_path / "flux.safetensors", TEMPLATE)
    write_safetensors(tmp_path / "x.safetensors", {"a": of_array(np.zeros(2, np.float32))})
    with pytest.raises(ConfigError, match="none of its 1 tensors is one of a LoRA"):
        read_lora(tmp_path / "x.safetensors", TEMPLATE)
    with pytest.raises(ValueError, match="holds several LoRAs, name one of: flux"):
        read_lora(tmp_path, TEMPLATE)
    (tmp_path / "pickled").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no LoRA"):
        read_lora(tmp_path / "pickled", TEMPLATE)
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match="pickle"):
        read_lora(tmp_path / "pickled", TEMPLATE)
