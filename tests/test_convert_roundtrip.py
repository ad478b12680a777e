"""SOURCE -> anything -> SOURCE gives the same names, dtypes, shapes and bits."""

import json
import math
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import random_checkpoints as make
import tensorstore
from jax.sharding import SingleDeviceSharding

from fluxjax.checkpoint import engine, orbax_params
from fluxjax.checkpoint.component_json import config_json
from fluxjax.checkpoint.safetensors_file import read_safetensors, write_safetensors
from fluxjax.checkpoint.sharded import name_plainly, shards_of
from fluxjax.checkpoint.source import open_source
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.tensors import of_array
from fluxjax.config import TINY
from fluxjax.convert import convert
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.mesh_shape import parse_mesh
from fluxjax.parallel.rules import param_shardings

FP8 = ml_dtypes.float8_e4m3fn


def write(path, arrays, metadata=None):
    write_safetensors(path, {name: of_array(a) for name, a in arrays.items()}, metadata)
    return path


def run(source, destination, to, **options):
    convert.run(convert.plan(source, destination, to, **options))
    return destination


def through_all(tmp_path, source, home):
    """Convert along a chain of all forms and straight through two; yields what came back."""
    chain = source
    for to in ("diffusers", "orbax", "bfl"):
        chain = run(chain, tmp_path / f"to_{to}", to)
    yield run(chain, tmp_path / "from_chain", home)
    yield run(tmp_path / "to_diffusers", tmp_path / "from_diffusers", home)
    yield run(tmp_path / "to_orbax", tmp_path / "from_orbax", home)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = make.pipeline_folder(tmp_path_factory.mktemp("pipeline") / "model")
    (folder / "config.json").write_text("")  # as hunyuanvideo-community's, nobody's
    return folder


def test_pipeline_folder(tmp_path, pipeline):
    files = {p.relative_to(pipeline): p.read_bytes() for p in pipeline.rglob("*.json")}
    for back in through_all(tmp_path, pipeline, "diffusers"):
        make.assert_same_bits(make.read_arrays(back), make.read_arrays(pipeline))
        assert {p.relative_to(back): p.read_bytes() for p in back.rglob("*.json")} == files
    bfl = tmp_path / "to_bfl"
    assert sorted(p.name for p in bfl.glob("*.safetensors")) == [
        "ae.safetensors",
        "clip_l.safetensors",
        "flux1-dev.safetensors",
        "t5xxl.safetensors",
    ]


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("transformer", np.float32), ("transformer", FP8), ("vae", np.float16)],
)
def test_bfl_file(tmp_path, part, dtype):
    config = getattr(make.SMALL, part)
    # Under this name BFL publishes it; shapes do not tell FLUX's autoencoder from another.
    name = "ae" if part == "vae" else "source"
    source = write(tmp_path / f"{name}.safetensors", make.bfl_arrays(config, dtype))
    for back in through_all(tmp_path, source, "bfl"):
        make.assert_same_bits(make.read_arrays(back), make.read_arrays(source))
    assert open_source(back)[part].config == config


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_text_encoder_file(tmp_path, part):
    arrays = make.hf_arrays(getattr(make.SMALL, part), FP8)
    name = "clip_l" if part == "text_encoder" else "source"
    source = write(tmp_path / f"{name}.safetensors", arrays)
    for back in through_all(tmp_path, source, "bfl"):
        make.assert_same_bits(make.read_arrays(back), arrays)


def test_old_and_new_names_of_text_encoders_come_back(tmp_path):
    clip = make.hf_arrays(make.SMALL.text_encoder)
    clip = {name.removeprefix("text_model."): array for name, array in clip.items()}
    clip["embeddings.position_ids"] = np.arange(9)[None]
    t5 = make.hf_arrays(make.SMALL.text_encoder_2)
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"]
    for name, arrays in (("clip_l", clip), ("t5", t5)):
        folder = tmp_path / name
        folder.mkdir()
        source = write(folder / f"{name}.safetensors", arrays)
        for back in through_all(folder, source, "diffusers"):
            make.assert_same_bits(make.read_arrays(back), arrays)


@pytest.mark.parametrize("newer", [False, True])
def test_scaled_fp8(tmp_path, newer):
    plain = make.bfl_arrays(make.SMALL.transformer)
    arrays = make.scaled_fp8(plain, newer)
    assert len(arrays) > len(plain)
    source = write(tmp_path / "source.safetensors", arrays)
    for back in through_all(tmp_path, source, "bfl"):
        make.assert_same_bits(make.read_arrays(back), arrays)
    written = make.read_arrays(tmp_path / "to_diffusers")
    assert {array.dtype for array in written.values()} == {np.dtype(ml_dtypes.bfloat16)}
    close = written["x_embedder.weight"].astype(np.float32)
    np.testing.assert_allclose(
        close, plain["img_in.weight"].astype(np.float32), rtol=0.07, atol=0.01
    )


def test_scaled_t5_and_casting(tmp_path):
    arrays = make.scaled_fp8(make.hf_arrays(make.SMALL.text_encoder_2))
    source = write(tmp_path / "source.safetensors", arrays)
    back = run(run(source, tmp_path / "folder", "diffusers"), tmp_path / "back.safetensors", "bfl")
    make.assert_same_bits(make.read_arrays(back), arrays)
    cast = run(source, tmp_path / "cast", "bfl", dtype="float16")
    written = make.read_arrays(cast)
    assert not any("scale" in name for name in written)
    assert {array.dtype for array in written.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("scale", [1e-7, 3.1e-4, 1.0, 77.7, 1e5])
def test_every_fp8_code_survives_its_scale(tmp_path, scale):
    codes = np.arange(256, dtype=np.uint8).view(FP8)
    arrays = make.scaled_fp8(make.bfl_arrays(make.SMALL.transformer))
    arrays["img_in.weight"] = np.resize(codes, arrays["img_in.weight"].shape)
    arrays["img_in.scale_weight"] = np.asarray(np.float32(scale))
    source = write(tmp_path / "source.safetensors", arrays)
    back = run(run(source, tmp_path / "folder", "diffusers"), tmp_path / "back.safetensors", "bfl")
    got, nan = make.read_arrays(back)["img_in.weight"], np.isnan(codes.astype(np.float32))
    kept = ~np.resize(nan, got.shape)
    assert (got.view(np.uint8) == arrays["img_in.weight"].view(np.uint8))[kept].all()
    assert np.isnan(got.astype(np.float32))[~kept].all()


def test_all_in_one(tmp_path):
    small = make.SMALL
    parts = [
        make.bfl_arrays(small.transformer, FP8),
        make.bfl_arrays(small.vae),
        make.hf_arrays(small.text_encoder),
        make.hf_arrays(small.text_encoder_2),
    ]
    one = make.all_in_one(*parts)
    one["text_encoders.clip_l.logit_scale"] = np.asarray(np.float32(4.6))
    source = write(tmp_path / "all.safetensors", one)
    folder = run(source, tmp_path / "folder", "diffusers")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    files = run(folder, tmp_path / "files", "bfl")
    names = ("flux1-dev", "ae", "clip_l", "t5xxl")
    for name, arrays in zip(names, parts, strict=True):
        arrays = arrays | ({"logit_scale": np.asarray(np.float32(4.6))} if name == "clip_l" else {})
        make.assert_same_bits(make.read_arrays(files / f"{name}.safetensors"), arrays)


def test_shards_and_index(tmp_path, pipeline):
    folder = run(pipeline, tmp_path / "sharded", "diffusers", shard_bytes=200_000)
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    back = run(folder, tmp_path / "back", "diffusers")
    make.assert_same_bits(make.read_arrays(back), make.read_arrays(pipeline))
    # A variant alone, as diffusers and transformers name its shards and their index.
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    variant = index.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    variant.write_text(index.read_text().replace("model-0", "model.fp16-0"))
    index.unlink()
    shards = [one.rename(str(one).replace("model-0", "model.fp16-0")) for one in shards]
    back = run(folder, tmp_path / "of_variant", "diffusers")
    make.assert_same_bits(make.read_arrays(back), make.read_arrays(pipeline))
    assert not list(back.rglob("*.index.*")), "which names files that are not there"
    # As a run of training leaves it: with the names that PyTorch looks for.
    named = shutil.copytree(folder / "transformer", tmp_path / "named")
    before = set(named.iterdir())
    for _ in range(2):
        name_plainly(named)
    plain = [one.name.replace("model.fp16-0", "model-0") for one in shards]
    assert set(shards_of(named / index.name).values()) == set(plain)
    assert {one.name for one in named.glob("*.safetensors")} == set(plain)
    assert len(set(named.iterdir())) == len(before)
    alone = [tmp_path / f"alone/model{end}.safetensors" for end in (".fp16", "")]
    alone[0].parent.mkdir()
    alone[0].touch()
    name_plainly(alone[0].parent)
    assert list(alone[0].parent.iterdir()) == [alone[1]]
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        open_source(folder)


def test_config_travels_with_a_single_file(tmp_path):
    """Heads of 32 cannot be told from shapes: our own file remembers, another's must be told."""
    config = TINY.transformer
    arrays = make.bfl_arrays(config)
    source = write(tmp_path / "source.safetensors", arrays)
    with pytest.raises(ValueError, match="heads of 32"):
        open_source(source)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    ours = run(source, tmp_path / "ours.safetensors", "bfl", config_file=tmp_path / "config.json")
    assert open_source(ours)["transformer"].config == config
    make.assert_same_bits(make.read_arrays(ours), arrays)


EXTRA = {"dtype": "F32", "shape": [1], "data": "AAAAAA=="}


@pytest.mark.parametrize(
    "wrong",
    [
        {"renamed": {"embeddings.position_embedding.weight": "embeddings.token_embedding.weight"}},
        {"renamed": {"no.such.weight": "x"}},
        {"renamed": {"embeddings.position_embedding.weight": "x"}},
        {"doubled": {"embeddings.token_embedding.weight": "embeddings.position_embedding.weight"}},
        {"doubled": {"x": "no.such.weight"}},
        {"extras": {"embeddings.token_embedding.weight": EXTRA}},
        {"extras": {"x": EXTRA}},
        {"extras": {"x": {**EXTRA, "shape": [10**30]}}},
        {"scaled": {"embeddings.token_embedding.weight": "F8_E4M3"}},
        {"scaled": {"embeddings.token_embedding.weight": "F32"}},
        {"dialect": "another"},
    ],
)
def test_a_record_that_contradicts_the_network_is_refused(tmp_path, pipeline, wrong):
    """It would be written, and our own reader would not read it."""
    folder = tmp_path / "clip"
    shutil.copytree(pipeline / "text_encoder", folder)
    record = {"dialect": "reference", "renamed": {}, "doubled": {}, "extras": {}, "scaled": {}}
    (folder / "fluxjax_source.json").write_text(json.dumps(record))
    names = open_source(folder)["text_encoder"].tensors
    assert "text_model.embeddings.token_embedding.weight" in names
    text = json.dumps({**record, **wrong}).replace("embeddings.", "text_model.embeddings.")
    (folder / "fluxjax_source.json").write_text(text)
    with pytest.raises(ValueError, match=r"does not fit the network|source is damaged"):
        open_source(folder)


def test_one_flipped_bit_in_orbax_is_found(tmp_path, pipeline):
    source = tmp_path / "vae"
    shutil.copytree(pipeline / "vae", source)
    folder = run(source, tmp_path / "orbax", "orbax")
    data = max((folder / "params").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    with pytest.raises(ValueError, match=f"damaged.*{data.name}"):
        open_source(folder)


def chunks_of(folder):
    """Path -> the shape in which an array of an Orbax folder is stored."""
    kvstore = {"driver": "ocdbt", "base": f"file://{folder}/"}
    store = tensorstore.KvStore.open(kvstore).result()
    names = [key.decode() for key in store.list().result() if key.endswith(b"/.zarray")]
    return {
        tuple(name.removesuffix("/.zarray").split(".")): tuple(json.loads(store[name])["chunks"])
        for name in names
    }


@pytest.mark.slow
def test_an_orbax_folder_laid_out_for_a_mesh(tmp_path, pipeline):
    """Each device's part is stored by itself; any other devices restore the same bits."""
    folder = run(pipeline, tmp_path / "orbax", "orbax", mesh=parse_mesh("fsdp=4,tensor=2"))
    mesh = make_mesh("fsdp=4,tensor=2")
    for name, network in open_source(pipeline).items():
        template = abstract_params(network.config)
        wanted = engine.to_tree(network.tensors, template)
        shardings = param_shardings(network.config, template, mesh)
        flat, found = engine.flatten(wanted), chunks_of(folder / name / "params")
        assert found.keys() == flat.keys()
        for path, sharding in engine.flatten(shardings).items():
            assert found[path] == sharding.shard_shape(flat[path].shape), path
        one = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), template)
        for places in (shardings, one):
            target = jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), wanted, places
            )
            restored = ocp.StandardCheckpointer().restore(folder / name / "params", target)
            make.assert_same_bits(
                {k: np.asarray(v) for k, v in engine.flatten(restored).items()}, flat
            )
    block = "single_transformer_blocks_0"
    found = chunks_of(folder / "transformer" / "params")
    assert found[block, "attn", "to_q", "kernel"] == (128 // 4, 128 // 2)
    assert found[block, "proj_out", "kernel"] == (384 // 8, 128)
    back = run(folder, tmp_path / "back", "diffusers")
    make.assert_same_bits(make.read_arrays(back), make.read_arrays(pipeline))


def test_large_parts_are_stored_in_several(tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr(orbax_params, "_CHUNK_BYTES", 4096)
    (network,) = open_source(pipeline / "text_encoder").values()
    folder = run(pipeline / "text_encoder", tmp_path / "orbax", "orbax", mesh=parse_mesh("fsdp=2"))
    template = abstract_params(network.config)
    shardings = engine.flatten(
        param_shardings(network.config, template, make_mesh("fsdp=2,data=4"))
    )
    found, divided = chunks_of(folder / "params"), 0
    for path, leaf in engine.flatten(template).items():
        shard, chunk = shardings[path].shard_shape(leaf.shape), found[path]
        assert not any(np.remainder(shard, chunk)), path
        assert 2 * math.prod(chunk) <= 4096, path
        divided += chunk != shard
    assert divided > 2
    back = run(folder, tmp_path / "back", "diffusers")
    make.assert_same_bits(make.read_arrays(back), make.read_arrays(pipeline / "text_encoder"))


def test_diffusers_and_transformers_open_what_we_write(tmp_path):
    import torch
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    source = make.pipeline_folder(tmp_path / "source", make.DIFFUSERS, np.float32)
    files = run(source, tmp_path / "files", "bfl")
    folder = run(files, tmp_path / "folder", "diffusers", shard_bytes=500_000)
    for cls, name in (
        (FluxTransformer2DModel, "transformer"),
        (AutoencoderKL, "vae"),
        (CLIPTextModel, "text_encoder"),
        (T5EncoderModel, "text_encoder_2"),
    ):
        model, info = cls.from_pretrained(folder / name, output_loading_info=True)
        assert not any(info.values()), info
        expected = make.read_arrays(source / name)
        state = model.state_dict()
        some = [key for key in expected if key in state or key.removeprefix("text_model.") in state]
        assert len(some) == len(expected)
        for key in some:
            tensor = state[key] if key in state else state[key.removeprefix("text_model.")]
            assert torch.equal(tensor, torch.from_numpy(expected[key])), key


def test_what_diffusers_writes_is_read(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 9,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(tmp_path / "clip")
    network = open_source(tmp_path / "clip")["clip"]
    config = network.config
    assert config.text_config.num_attention_heads == config.vision_config.num_attention_heads == 2
    folder = run(tmp_path / "clip", tmp_path / "orbax", "orbax", mesh=parse_mesh("fsdp=2"))
    back = run(folder, tmp_path / "back", "diffusers")
    make.assert_same_bits(make.read_arrays(back), make.read_arrays(tmp_path / "clip"))
    assert not any(CLIPModel.from_pretrained(back, output_loading_info=True)[1].values())


def test_file_is_what_the_safetensors_library_reads(tmp_path):
    from safetensors.numpy import load_file

    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.float32(3), "e": np.zeros((0, 4), np.int8)}
    path = write(tmp_path / "x.safetensors", arrays, {"key": "välue"})
    make.assert_same_bits(load_file(path), {k: np.asarray(v) for k, v in arrays.items()})
    assert read_safetensors(path)[1] == {"key": "välue"}
