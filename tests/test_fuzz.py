"""Every reader of strangers' files, given damaged ones: a value or one of our sentences, soon.

FLUXJAX_FUZZ_SECONDS and FLUXJAX_FUZZ_SEED try more and others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoints
from gguf_files import gguf_bytes, key, text
from mutations import mutated
from PIL import Image

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.lora.reader import read_lora
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.orbax_params import read_orbax
from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.checkpoint.quantised.gguf import read_gguf
from fluxjax.checkpoint.quantised.reader import unquantised
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.sharded import read_sharded
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import Tensor, of_array
from fluxjax.config import TINY, LoraConfig
from fluxjax.convert import convert
from fluxjax.models.lora import init_lora
from fluxjax.sample.picture_formats import encode_picture, read_record
from fluxjax.sample.prompts_file import read_prompts
from fluxjax.text.tokenizers import PromptTokenizer, load_clip_tokenizer, load_t5_tokenizer
from fluxjax.train.data.archives import parquet_items, tar_items
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.data.sources import list_items
from fluxjax.train.recipe import read_recipe

SECONDS = float(os.environ.get("FLUXJAX_FUZZ_SECONDS", "1"))
SEED = int(os.environ.get("FLUXJAX_FUZZ_SEED", "0"))
SLOWEST = 5.0  # seconds of the processor for one file
ASSETS = Path(__file__).parents[1] / "fluxjax" / "assets" / "tiny"
TEMPLATE = abstract_params(TINY.transformer)


def small_tensors() -> dict[str, Tensor]:
    return {name: of_array(np.arange(6, dtype=d)) for name, d in (("a.b", "f"), ("c", "i4"))}


def read_all(tensors: Mapping[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor.read()


def make_safetensors(folder: Path) -> None:
    write_safetensors(folder / "x.safetensors", small_tensors(), {"format": "pt"})


def make_gguf(folder: Path) -> None:
    tensors = {"a.weight": (12, (2, 256), bytes(288)), "b": (0, (4,), bytes(16))}
    keys = [key("general.architecture", 8, text("flux"))]
    (folder / "x.gguf").write_bytes(gguf_bytes(tensors, keys))


def make_quantised(folder: Path) -> None:
    """One layer of each form; their parts are named beside each other, so that they mix."""
    nf4 = json.dumps(
        {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "bfloat16",
            "shape": [2, 64],
            "nested_blocksize": 256,
            "nested_offset": 0.5,
        }
    )
    form = json.dumps({"format": "nvfp4", "convrot": True, "convrot_groupsize": 64})
    arrays = {
        "a.weight": np.zeros((64, 1), np.uint8),
        "a.weight.absmax": np.zeros(2, np.uint8),
        "a.weight.quant_map": np.zeros(16, np.float32),
        "a.weight.nested_absmax": np.ones(1, np.float32),
        "a.weight.nested_quant_map": np.zeros(256, np.float32),
        "a.weight.quant_state.bitsandbytes__nf4": np.frombuffer(nf4.encode(), np.uint8),
        "b.weight": np.zeros((2, 32), np.uint8),
        "b.weight_scale": np.zeros((2, 4), np.uint8),
        "b.weight_scale_2": np.ones((), np.float32),
        "b.comfy_quant": np.frombuffer(form.encode(), np.uint8),
        "c.weight": np.zeros((2, 64), np.int8),
        "c.SCB": np.ones(2, np.float32),
        "d._weight_qdata": np.zeros((2, 64), np.int8),
        "d._weight_scale": np.ones((2, 1), "f"),
        "e.weight._data": np.zeros((2, 64), np.int8),
        "e.weight._scale": np.ones((2, 1), "f"),
    }
    write_safetensors(folder / "x.safetensors", {n: of_array(a) for n, a in arrays.items()})


def make_shards(folder: Path) -> None:
    names = {}
    for number, (name, tensor) in enumerate(small_tensors().items()):
        write_safetensors(folder / f"x-{number}.safetensors", {name: tensor})
        names[name] = f"x-{number}.safetensors"
    index = {"metadata": {"total_size": 48}, "weight_map": names}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))


def make_lora(folder: Path) -> None:
    import jax

    config = LoraConfig(rank=2, alpha=3.0, targets=("attn.to_q", "proj_out"))
    tree = init_lora(jax.random.key(0), TEMPLATE, config)
    write_lora(folder / "adapter_model.safetensors", {"transformer": tree}, config)
    text = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": False,
        "alpha_pattern": {"attn.to_q": 5},
        "rank_pattern": {"proj_out": 2},
        "target_modules": ["to_q"],
    }
    names = {
        f"base_model.model.proj_out.lora_{x}.weight": (2, 192) if x == "A" else (64, 2)
        for x in "AB"
    }
    (folder / "peft").mkdir()
    write_safetensors(
        folder / "peft" / "adapter_model.safetensors",
        {name: of_array(np.ones(shape, np.float32)) for name, shape in names.items()},
    )
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(text))


def read_loras(folder: Path) -> None:
    for path in (folder / "adapter_model.safetensors", folder / "peft"):
        try:
            read_lora(path, TEMPLATE)
        except ValueError as error:
            assert "adapter" in str(error)


def make_orbax(folder: Path) -> None:
    from fluxjax.checkpoint.orbax_params import write_orbax

    tree = {"a": np.ones((4, 4), np.float32), "b": {"c": np.arange(3)}}
    write_orbax(folder / "params", tree)
    (folder / "params.sha256.json").unlink()  # others have none, and the hashes find everything


def read_orbax_whole(folder: Path) -> None:
    flat = engine.flatten(read_orbax(folder / "params"))
    read_all({"/".join(path): leaf for path, leaf in flat.items()})


def make_tokenizer(name: str, *without: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(
        ASSETS / name, folder / name, ignore=shutil.ignore_patterns(*without)
    )


def read_tokenizer(load: Callable[[Path], PromptTokenizer], name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        try:
            load(folder / name)(["a red circle ½ ﬁ Ａ", ""], 12)
        except (ValueError, OSError) as error:
            assert name in str(error), str(error)

    return read


def make_recipe(folder: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "train" / "lora_dev.toml", folder / "recipe.toml")


def make_picture(folder: Path) -> None:
    pixels, record = Image.new("RGB", (8, 8)), {"settings": {"seed": 3, "steps": 4}}
    (folder / "a.png").write_bytes(encode_picture(pixels, ".png", record))


def make_tar(folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("1.png", "2.png"):
            content = io.BytesIO()
            Image.new("RGB", (8, 8)).save(content, "PNG")
            texts = {"txt": b"a caption", "json": b'{"text": "a caption"}'}
            for member, data in (
                (name, content.getvalue()),
                *((f"{name[0]}.{kind}", text) for kind, text in texts.items()),
            ):
                info = tarfile.TarInfo(member)
                info.size, info.pax_headers = len(data), {"comment": "ü"}
                tar.addfile(info, io.BytesIO(data))


def read_items(items: Any) -> None:
    for item in items:
        with contextlib.suppress(ValueError, OSError):
            item.read()


def make_rows(folder: Path) -> None:
    make_picture(folder)
    rows = [{"file_name": "a.png", "text": "a caption"}, {"file_name": "b.png", "text": "x"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def make_parquet(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = {"image": [b"\x89PNG", b"x"], "text": ["a caption", "b"]}
    pq.write_table(pa.table(rows), folder / "a.parquet")


def make_prompts(folder: Path) -> None:
    first = {"prompt": "a ring", "seed": 3, "lora": ["x.safetensors:0.5"], "number": 2}
    last = {"prompt": "ü", "guidance": 2.5, "width": 64, "reference": "a.png"}
    lines = [first, "a star", last]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (folder / "prompts.txt").write_bytes(b"\xef\xbb\xbfa star\r\n\r\na ring\n")


def read_lines(folder: Path) -> None:
    for name in ("prompts.jsonl", "prompts.txt"):
        try:
            assert read_prompts(folder / name)
        except ValueError as error:
            assert f"{name}, line " in str(error) or f"{name} has no prompts" in str(error)


def make_pipeline(folder: Path) -> None:
    random_checkpoints.pipeline_folder(folder / "model")


def read_pipeline(folder: Path) -> None:
    with contextlib.suppress(ValueError, OSError):  # each reader by itself
        read_config(folder / "model")
    for network in open_source(folder / "model").values():
        read_all(network.tensors)


def make_network(folder: Path) -> None:
    """An autoencoder in two forms, one with a record of where it came from."""
    config = random_checkpoints.SMALL.vae
    write_safetensors(
        folder / "ae.safetensors",
        {n: of_array(a) for n, a in random_checkpoints.bfl_arrays(config).items()},
    )
    convert.run(convert.plan(folder / "ae.safetensors", folder / "vae", "diffusers"))


def converted(folder: Path) -> None:
    """Both forms into each other: whole, or nothing is left of it."""
    for source, target in (("ae.safetensors", "diffusers"), ("vae", "bfl")):
        out = folder.parent / f"converted-{source}"
        try:
            convert.run(convert.plan(folder / source, out, target))
        except (ValueError, OSError) as error:
            assert str(error) and not list(folder.parent.glob(f"*{out.name}*"))
        else:
            for network in open_source(out).values():
                read_all(network.tensors)
            shutil.rmtree(out)


SETTINGS = DataSettings(source="a.tar")
READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "safetensors": (make_safetensors, lambda f: read_all(read_safetensors(f / "x.safetensors")[0])),
    "gguf": (make_gguf, lambda f: read_all(read_gguf(f / "x.gguf")[0])),
    "quantised": (
        make_quantised,
        lambda f: read_all(unquantised(read_safetensors(f / "x.safetensors")[0])),
    ),
    "shards": (make_shards, lambda f: read_all(read_sharded(f))),
    "lora": (make_lora, read_loras),
    "orbax": (make_orbax, read_orbax_whole),
    "clip": (make_tokenizer("tokenizer"), read_tokenizer(load_clip_tokenizer, "tokenizer")),
    "t5": (make_tokenizer("tokenizer_2"), read_tokenizer(load_t5_tokenizer, "tokenizer_2")),
    "pieces": (
        make_tokenizer("tokenizer_2", "tokenizer.json"),
        read_tokenizer(load_t5_tokenizer, "tokenizer_2"),
    ),
    "recipe": (make_recipe, lambda f: read_recipe(f / "recipe.toml")),
    "picture": (make_picture, lambda f: read_record(f / "a.png")),
    "tar": (make_tar, lambda f: read_items(tar_items(f / "a.tar", "a.tar", SETTINGS))),
    "prompts": (make_prompts, read_lines),
    "pipeline": (make_pipeline, read_pipeline),
    "conversion": (make_network, converted),
    "rows": (make_rows, lambda f: read_items(list_items(DataSettings(source=str(f))))),
    "parquet": (
        make_parquet,
        lambda f: read_items(parquet_items(f / "a.parquet", "a.parquet", SETTINGS)),
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_a_value_or_a_sentence(tmp_path: Path, name: str) -> None:
    make, read = READERS[name]
    folder = tmp_path / "files"
    folder.mkdir()
    make(folder)
    read(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    good = {path: path.read_bytes() for path in files}
    chance = random.Random(zlib.crc32(name.encode()) + SEED)
    tried, end = 0, time.process_time() + SECONDS
    while tried < 5 or time.process_time() < end:
        path, other = chance.choice(files), chance.choice(files)
        path.write_bytes(mutated(good[path], good[other], chance))
        begun = time.process_time()
        try:
            read(folder)
        except (ValueError, OSError) as error:
            said = str(error)
            assert said and len(said) < 20_000, said[:500]
        except BaseException as error:
            kept = tmp_path.parent / f"fuzz-{name}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept)
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise AssertionError(f"{path.name} as in {kept}: {what}") from error
        took = time.process_time() - begun
        assert took < SLOWEST, f"{path.name} took {took:.1f} s"
        path.write_bytes(good[path])
        tried += 1
    print(f"{name}: {tried} files")
