"""Every dialect and kind of adapter: what each recorded file makes of the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fluxjax
from fluxjax.checkpoint.engine import MappingError, published_leaves
from fluxjax.checkpoint.lora.changes import Change
from fluxjax.checkpoint.lora.merge import merge
from fluxjax.checkpoint.lora.reader import read_adapters
from fluxjax.checkpoint.opened_network import OpenNetwork
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.source_record import Record
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import TINY, ConfigError
from fluxjax.convert.__main__ import main as convert
from fluxjax.hub import tiny_folder

COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
TEMPLATES = {name: abstract_params(getattr(TINY, name)) for name in COMPONENTS}
DIALECTS = (
    "bfl_control",
    "comfy",
    "comfy_alpha",
    "diffusers_alpha_tensors",
    "diffusers_down_up",
    "diffusers_old",
    "dora_kohya",
    "fal",
    "full_diff",
    "full_kohya",
    "glora_kohya",
    "ia3_kohya",
    "kohya",
    "kohya_edges",
    "kohya_split_qkv",
    "kohya_text_encoders",
    "locon_simpletuner",
    "loha_kohya",
    "loha_simpletuner",
    "lokr_dots",
    "lokr_kohya",
    "lokr_simpletuner",
    "no_alpha_mixed_ranks",
    "oft_kohya",
    "onetrainer",
    "peft_bias",
    "peft_dora",
    "peft_folder",
    "peft_metadata",
    "peft_rslora",
    "text_encoders_diffusers",
    "xlabs",
)


@pytest.fixture(scope="module")
def goldens(shared: Path) -> Path:
    return shared / "goldens" / "lora"


@pytest.fixture(scope="module")
def networks(goldens: Path) -> dict[str, OpenNetwork]:
    """Random weights, and those that were recorded in their places."""
    recorded, found = read_safetensors(goldens / "base.safetensors")[0], {}
    for component, template in TEMPLATES.items():
        random, tensors = np.random.default_rng(0), {}
        for name, leaf in published_leaves(template).items():
            key = name if component == "transformer" else f"{component}/{name}"
            values = recorded[key].read() if key in recorded else random.normal(size=leaf.shape)
            tensors[name] = of_array(values.astype(np.float32))
        config = getattr(TINY, component)
        found[component] = OpenNetwork(component, config, tensors, Record(), "published", goldens)
    return found


def golden_file(goldens: Path, dialect: str) -> Path:
    return next(p for p in (goldens / f"{dialect}.safetensors", goldens / dialect) if p.exists())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_recorded_file_changes_what_was_recorded(goldens, networks, dialect) -> None:
    expected = read_safetensors(goldens / "expected.safetensors")[0]
    probe = expected["probe"].read()
    changes, _ = read_adapters(golden_file(goldens, dialect), TEMPLATES)
    touched, worst = set(), 0.0
    for component, mine in changes.items():
        base = networks[component]
        after = merge(base, [(mine, 1.0)])
        for name, change in mine.items():
            old, new = base.tensors[name].read(), after.tensors[name].read()
            key = (
                f"{dialect}|{name}"
                if component == "transformer"
                else f"{dialect}|{component}/{name}"
            )
            touched.add(key)
            if change.value is not None:
                np.testing.assert_array_equal(new, expected[f"{key}|value"].read())
                continue
            if new.shape != old.shape:
                old = np.pad(old, ((0, 0), (0, new.shape[1] - old.shape[1])))
            # What is added, not what is left of it beside the weights in float32.
            delta = change.delta(reader(base, name, new.shape))
            np.testing.assert_allclose(new - old, delta, atol=1e-6 * np.abs(new).max())
            want = expected[f"{key}|probe"] if f"{key}|probe" in expected else expected[key]
            got = delta @ probe[: delta.shape[1]] if f"{key}|probe" in expected else delta
            error = np.abs(got - want.read()).max() / np.abs(want.read()).max()
            worst = max(worst, error)
    recorded = {
        k.removesuffix("|probe").removesuffix("|value")
        for k in expected
        if k.startswith(f"{dialect}|")
    }
    assert touched == recorded
    print(f"{dialect}: {worst:.1e}")
    assert worst <= (1e-4 if dialect == "oft_kohya" else 1e-5)


def reader(network: OpenNetwork, wide: str, shape: tuple[int, ...]):
    def read(name: str) -> np.ndarray:
        base = network.tensors[name].read().astype(np.float32)
        return (
            np.pad(base, ((0, 0), (0, shape[1] - base.shape[1])))
            if name == wide and base.ndim == 2
            else base
        )

    return read


def refused(path: Path) -> str:
    with pytest.raises((MappingError, ConfigError)) as error:
        read_adapters(path, TEMPLATES)
    assert str(path) in str(error.value)
    return str(error.value)


OPTIONAL = ("alpha", "lora_B.bias", "dora_scale", "rescale", "diff", "diff_b", "scale")
"""Of these a file may have fewer: what is left is another whole adapter."""


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "peft_folder"])
def test_a_damaged_file_is_refused_whole_and_says_where(goldens, tmp_path, dialect) -> None:
    """Each of its tensors in turn not finite, of another shape, of integers, left out, misnamed."""
    tensors, metadata = read_safetensors(golden_file(goldens, dialect))
    arrays = {name: tensor.read() for name, tensor in tensors.items()}
    path, last = tmp_path / "a.safetensors", {key.rpartition(".")[2]: key for key in arrays}

    def damaged(key: str, *, keep: bool = True, **changed) -> str:
        mine = {k: v for k, v in arrays.items() if keep or k != key}
        mine |= {k or key: v for k, v in changed.items()}
        write_safetensors(path, {k: of_array(v) for k, v in mine.items()}, metadata)
        return refused(path)

    for key in last.values():
        value, short = arrays[key], key.rpartition(".")[2]
        module = key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
        module = module.removesuffix(".lora")
        if short != "on_input":
            bad = value.copy()
            bad.reshape(-1)[-1] = np.nan
            assert f"not finite: {module}" in damaged(key, **{key: bad})
            if short != "alpha":
                assert module in damaged(key, **{key: np.zeros(value.shape, np.int8)})
        assert module in damaged(key, **{key: np.zeros((3, *value.shape, 5), value.dtype)})
        for axis in range(value.ndim):  # one longer than the others say
            longer = np.concatenate([value, value.take([0], axis)], axis)
            assert module in damaged(key, **{key: longer})
        assert f"{key}x" in damaged(key, keep=False, **{f"{key}x": value})
        if short not in OPTIONAL and not key.endswith(("_B.bias", "diff")):
            assert module in damaged(key, keep=False)


@pytest.mark.parametrize(
    "parts, kind",
    [
        ({"lora_A.weight": (2, 32), "lora_B.weight": (32, 2)}, "LoRA"),
        ({"lokr_w1": (2, 1), "lokr_w2": (16, 1)}, "LoKr"),
        ({"weight": (32,), "on_input": ()}, r"\(IA\)3"),
    ],
)
def test_of_norms_and_biases_there_are_only_differences(tmp_path, parts, kind) -> None:
    module, path = "transformer.transformer_blocks.0.attn.norm_q", tmp_path / "a.safetensors"
    arrays = {f"{module}.{part}": np.ones(shape, np.float32) for part, shape in parts.items()}
    write_safetensors(path, {name: of_array(array) for name, array in arrays.items()})
    with pytest.raises(MappingError, match=f"{module} has tensors of {kind}, and is no matrix"):
        read_adapters(path, TEMPLATES)


def test_alpha_may_be_an_integer_and_a_file_must_hold_something(goldens, tmp_path) -> None:
    """kohya's trainers keep an alpha that is the rank as an integer."""
    tensors, metadata = read_safetensors(golden_file(goldens, "kohya"))
    found = {}
    for dtype in (np.float32, np.int64):
        path = tmp_path / f"{np.dtype(dtype)}.safetensors"
        arrays = {
            name: tensor.read() + 1 if name.endswith("alpha") else tensor.read()
            for name, tensor in tensors.items()
        }
        arrays = {n: a.astype(dtype) if n.endswith("alpha") else a for n, a in arrays.items()}
        write_safetensors(path, {name: of_array(a) for name, a in arrays.items()}, metadata)
        found[dtype] = read_adapters(path, TEMPLATES).changes["transformer"]
    assert found[np.int64].keys() == found[np.float32].keys()
    for name, change in found[np.float32].items():
        low_rank = change.low_rank, found[np.int64][name].low_rank
        assert low_rank[0] is not None and low_rank[1] is not None
        assert np.floor(low_rank[0].scale * len(low_rank[0].a)) == pytest.approx(
            low_rank[1].scale * len(low_rank[1].a)
        )
    empty = tmp_path / "empty.safetensors"
    write_safetensors(empty, {}, {})
    assert "it has no tensors" in refused(empty)


def test_a_first_layer_may_have_more_inputs_than_its_adapter(goldens, tmp_path) -> None:
    """Of a text model's LoRA over Fill, or beside an adapter that widens: as in diffusers it adds
    nothing to the inputs that are joined. How many there are is the text model's, or Fill's."""
    path, fill = tmp_path / "narrow.safetensors", 384
    control, canny = golden_file(goldens, "bfl_control"), replace(TINY.transformer, in_channels=128)
    templates = {"transformer": abstract_params(replace(TINY.transformer, in_channels=fill))}
    random, up = np.random.default_rng(0), np.ones((192, 2), np.float32)

    def written(inputs: int, **more: np.ndarray) -> np.ndarray:
        a = random.normal(size=(2, inputs)).astype(np.float32)
        tensors = {"lora_A.weight": a, "lora_B.weight": up, **more}
        names = {f"transformer.x_embedder.{n}": of_array(x) for n, x in tensors.items()}
        write_safetensors(path, names)
        return a

    for wrong, more in ((128, {}), (64, {"lora_magnitude_vector": np.ones(192, np.float32)})):
        written(wrong, **more)
        with pytest.raises(MappingError, match=rf"has \[2, {wrong}\] .*expected .*{fill}"):
            read_adapters(path, templates)
    written(fill)
    wide = path.rename(tmp_path / "wide.safetensors")
    a = written(64)
    with pytest.raises(MappingError, match=r"has \[2, 384\] .*expected \[rank, 128\]"):
        read_adapters(wide, {"transformer": abstract_params(canny)})
    with pytest.raises(ConfigError, match=r"read 128 and 384 inputs: they are of models that draw"):
        fluxjax.load_pipeline(tiny_folder(), loras=[(wide, 1.0), (control, 1.0)])
    found = read_adapters(path, templates).changes["transformer"]["x_embedder.weight"].low_rank
    np.testing.assert_array_equal(found.a, np.pad(a, ((0, 0), (0, fill - 64))))
    beside = fluxjax.load_pipeline(tiny_folder(), loras=[(control, 1.0), (path, 0.5)])
    expected = np.pad(a.T, ((0, 64), (0, 0)))
    np.testing.assert_array_equal(beside.executables.lora["x_embedder"]["a"], expected)


def test_strengths_orders_and_types(goldens, networks) -> None:
    """Every change counts from the weights as they were, whatever else is added."""
    base, name = networks["transformer"], "transformer_blocks.0.attn.to_out.0.weight"
    read = [
        read_adapters(golden_file(goldens, d), TEMPLATES).changes["transformer"]
        for d in ("dora_kohya", "glora_kohya", "oft_kohya")
    ]
    old = base.tensors[name].read()
    deltas = [merge(base, [(one, 1.0)]).tensors[name].read() - old for one in read]
    assert all(np.abs(delta).max() > 0.01 for delta in deltas)
    strengths = (0.5, -2.0, 0.25)
    expected = old + sum(s * d for s, d in zip(strengths, deltas, strict=True))
    pairs = list(zip(read, strengths, strict=True))
    for order in (pairs, pairs[::-1]):
        np.testing.assert_allclose(merge(base, order).tensors[name].read(), expected, atol=2e-6)
    assert merge(base, [(read[0], 0.0)]).tensors[name] is base.tensors[name]
    half = merge(base, pairs, dtype=np.float16).tensors[name]
    assert half.dtype == half.read().dtype == np.float16
    with pytest.raises(ConfigError, match=r"to_out\.0\.weight is not finite in float16"):
        merge(base, [(read[0], 1e6)], dtype=np.float16).tensors[name].read()
    control = read_adapters(golden_file(goldens, "bfl_control"), TEMPLATES).changes["transformer"]
    other = {
        n: Change(value=np.zeros_like(c.value)) for n, c in control.items() if c.value is not None
    }
    wide = merge(base, [(control, 0.5)])
    assert wide.config.in_channels == 128 and wide.config.out_channels == 64
    assert not np.allclose(wide.tensors["x_embedder.weight"].read()[:, 64:], 0)
    for one, change in control.items():
        if change.value is not None:  # replaced at any strength
            np.testing.assert_array_equal(wide.tensors[one].read(), change.value)
    with pytest.raises(ConfigError, match="two adapters put different values"):
        merge(base, [(control, 1.0), (other, 1.0)])


def converted(goldens: Path, out: Path, *options: str, dialects=("kohya", "kohya_text_encoders")):
    """The embedded model with recorded adapters in its weights, written by the command."""
    loras = [f"--lora={golden_file(goldens, dialect)}" for dialect in dialects]
    assert convert([str(tiny_folder()), str(out), "--dtype", "float32", *loras, *options]) == 0
    return open_source(out)


@pytest.mark.parametrize("target", ["diffusers", "bfl", "orbax"])
def test_the_command_merges_into_every_form(goldens, tmp_path, target) -> None:
    dialects = ("kohya", "kohya_text_encoders", "full_diff")
    expected = read_safetensors(goldens / "expected.safetensors")[0]
    probe = expected["probe"].read()
    after = converted(goldens, tmp_path / "out", "--to", target, dialects=dialects)
    before, seen = open_source(tiny_folder()), 0
    for component, network in after.items():
        for name, tensor in network.tensors.items():
            key = name if component == "transformer" else f"{component}/{name}"
            delta = tensor.read().astype(np.float64) - before[component].tensors[name].read()
            probed = partial(_probed, probe)
            wanted: Any = 0.0
            for one in dialects:
                golden, already = expected.get(f"{one}|{key}"), expected.get(f"{one}|{key}|probe")
                if golden is not None or already is not None:
                    seen += 1
                    wanted = wanted + (probed(golden.read()) if golden else already.read())
            got = probed(delta)
            np.testing.assert_allclose(got, np.broadcast_to(wanted, got.shape), atol=3e-5)
    assert seen == sum(key.split("|")[0] in dialects for key in expected)


def _probed(probe: np.ndarray, delta: np.ndarray) -> np.ndarray:
    return delta @ probe[: delta.shape[1]] if delta.ndim == 2 else delta


def test_a_control_adapter_widens_the_model_that_it_is_merged_into(goldens, tmp_path) -> None:
    networks = converted(goldens, tmp_path / "out", dialects=("bfl_control",))
    assert networks["transformer"].config.in_channels == 128
    assert networks["transformer"].tensors["x_embedder.weight"].shape == (192, 128)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "FluxControlPipeline"
    # As the model with the adapter beside it is sampled.
    assert fluxjax.load_pipeline(tmp_path / "out").config.guidance == 30.0


LOW_RANK = ("kohya", "kohya_split_qkv", "kohya_text_encoders", "peft_metadata", "xlabs")


@pytest.mark.parametrize("naming", ["peft", "kohya", "comfy"])
def test_other_names_keep_what_is_added(goldens, tmp_path, naming) -> None:
    def deltas(path: Path) -> dict[str, np.ndarray]:
        found = {}
        for component, changes in read_adapters(path, TEMPLATES).changes.items():
            for name, change in changes.items():
                assert change.low_rank is not None
                a, b, scale = change.low_rank
                assert path.parent != tmp_path or scale == 1
                found[f"{component}/{name}"] = b @ a * scale
        return found

    for dialect in LOW_RANK:
        source, out = golden_file(goldens, dialect), tmp_path / f"{dialect}.{naming}.safetensors"
        assert convert([str(source), str(out), "--to", naming, "--config", str(tiny_folder())]) == 0
        before, after = deltas(source), deltas(out)
        assert before.keys() == after.keys()
        for name, delta in before.items():
            bound = 1e-6 * np.abs(delta).max()
            np.testing.assert_allclose(after[name], delta, atol=bound, err_msg=name)
    back = tmp_path / "back.safetensors"
    convert([str(out), str(back), "--to", "peft", "--config", str(tiny_folder())])
    for name, delta in deltas(back).items():
        np.testing.assert_allclose(delta, before[name], atol=1e-6 * np.abs(delta).max())


def test_what_is_no_low_rank_product_is_not_written_in_other_names(goldens, tmp_path) -> None:
    for dialect, name in (("lokr_kohya", "to_q.weight"), ("peft_bias", "to_q.bias")):
        options = ["--to", "comfy", "--config", str(tiny_folder())]
        with pytest.raises(ConfigError, match=f"more than a low-rank(.|\n)*{name}"):
            convert([str(golden_file(goldens, dialect)), str(tmp_path / "a.safetensors"), *options])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"written as one \.safetensors file"):
        convert([str(golden_file(goldens, "kohya")), str(tmp_path / "a"), "--to", "peft"])
    with pytest.raises(ValueError, match="are for models, and --to peft for a LoRA"):
        convert([str(tiny_folder()), str(tmp_path / "a"), "--to", "peft", "--lora", "x"])
    with pytest.raises(FileNotFoundError, match=r"there is no LoRA file nothing\.st"):
        convert([str(tiny_folder()), str(tmp_path / "a"), "--lora", "nothing.st:0.5"])
