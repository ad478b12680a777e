"""A picture does not depend on the mesh that it is drawn on."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields as fields_of

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from test_image_encoders import xlabs_file
from test_parallel import MESHES, relative
from test_sample_pictures import hole, photo

import fluxjax
from fluxjax.checkpoint.lora.writer import write_lora
from fluxjax.checkpoint.pipeline_folder import save_params
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import (
    TINY,
    CLIPVisionConfig,
    ConfigError,
    ControlNetConfig,
    IPAdapterConfig,
    LoraConfig,
    ReduxConfig,
    SiglipVisionConfig,
)
from fluxjax.families import Conditioning
from fluxjax.models.lora import init_lora
from fluxjax.parallel.compiled_program import measure
from fluxjax.parallel.mesh import pad_rows
from fluxjax.sample.picture_inputs import Inputs
from fluxjax.sample.pictures import to_bytes

PROMPTS = ["a red circle", "two small green rings", "a large blue star left of a heart"]
QUICK = {"steps": 2, "max_sequence_length": 18, "width": 80, "height": 64}
SEVERAL = """
import json, sys
from fluxjax.sample.__main__ import main
for i, given in enumerate(json.loads(sys.argv[1])):
    main(given + (sys.argv[2:] if i == 0 else []))
"""


def draw_in_steps(pipe) -> dict[str, np.ndarray]:
    """Every network's output on the way to three pictures."""
    settings = {"max_sequence_length": 18}
    conditioning = pipe.encode_prompt(PROMPTS, **settings)
    noise = np.random.default_rng(0).standard_normal((3, 16, 8, 10)).astype(np.float32)
    latents = pipe.denoise(conditioning, noise, steps=3)
    return {
        "noise": noise,
        "T5": conditioning.sequence,
        "CLIP": conditioning.vector,
        "latents": latents,
        "picture": pipe.decode(latents),
    }


@pytest.fixture(scope="module")
def expected():
    return draw_in_steps(fluxjax.load_pipeline(scan_layers=True))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_draws_the_picture_of_one_device(mesh, expected):
    pipe = fluxjax.load_pipeline(scan_layers=True, mesh=mesh)
    got = draw_in_steps(pipe)
    errors = {name: relative(got[name], expected[name]) for name in expected}
    print(mesh, {name: f"{error:.1e}" for name, error in errors.items()})
    assert all(got[name].shape == expected[name].shape for name in expected)
    assert max(errors.values()) <= 1e-5
    distance = np.abs(to_bytes(got["picture"]).astype(int) - to_bytes(expected["picture"]))
    assert distance.max() <= 1 and (distance > 0).mean() < 1e-3
    # The weights are spread, not copied.
    kernel = pipe.params("transformer")["transformer_blocks"]["ff"]["net_2"]["kernel"]
    parts = pipe.mesh.shape["fsdp"] * pipe.mesh.shape["tensor"]
    assert kernel.addressable_shards[0].data.size * parts == kernel.size


@pytest.mark.slow
def test_tiles_are_decoded_on_all_devices():
    """Five tiles on eight devices."""
    latents = np.random.default_rng(0).standard_normal((1, 16, 8, 28)).astype(np.float32)
    one = fluxjax.load_pipeline(scan_layers=True).decode(latents, tile=8)
    many = fluxjax.load_pipeline(scan_layers=True, mesh="").decode(latents, tile=8)
    assert many.shape == one.shape
    assert relative(many, one) <= 1e-5


def test_decoding_gathers_weights_and_no_picture():
    """1024 tokens, which CPUs take through a kernel of our own."""
    latents = jax.ShapeDtypeStruct((8, 16, 32, 32), np.float32)
    pipe = fluxjax.load_pipeline(mesh="fsdp=4,tensor=2")
    found = measure(pipe.executables.get("decode", latents))
    gathers = [call for call in found.collectives if call.kind == "all-gather"]
    assert gathers and not any("1024" in call.shape for call in gathers)


@pytest.mark.slow
def test_a_lora_over_split_weights(tmp_path, expected):
    config = LoraConfig(rank=4, targets=("attn.to_q", "attn.to_out.0", "proj_mlp", "proj_out"))
    params = abstract_params(fluxjax.load_pipeline().config.transformer, stacked=True)
    lora = init_lora(jax.random.key(0), params, config)
    lora = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), lora
    )
    write_lora(tmp_path / "lora.safetensors", {"transformer": lora}, config, {})
    given = {"scan_layers": True, "loras": [tmp_path / "lora.safetensors"]}
    conditioning = Conditioning(expected["T5"], None, expected["CLIP"])

    def latents(pipe):
        return pipe.denoise(conditioning, expected["noise"], steps=3)

    one = latents(fluxjax.load_pipeline(**given))
    many = latents(fluxjax.load_pipeline(**given, mesh="fsdp=2,tensor=2,sequence=2"))
    assert relative(many, one) <= 1e-5 and relative(expected["latents"], one) > 1e-2


@pytest.mark.slow
def test_a_reference_on_a_mesh(expected):
    """Its 35 tokens follow the 20 of the picture: 55, padded over four devices."""
    conditioning = Conditioning(expected["T5"], None, expected["CLIP"])
    row = np.arange(3 * 80 * 112).astype(np.uint8).reshape(80, 112, 3)
    one, many = (
        fluxjax.load_pipeline(scan_layers=True, mesh=mesh) for mesh in (None, "sequence=4,data=2")
    )
    seen, seen_there = (pipe.encode_reference(Image.fromarray(row)) for pipe in (one, many))
    assert seen.shape == (1, 16, 10, 14) and relative(seen_there, seen) <= 1e-5
    latents, latents_there = (
        pipe.denoise(conditioning, expected["noise"], steps=3, inputs=Inputs(seen))
        for pipe in (one, many)
    )
    assert relative(latents_there, latents) <= 1e-5
    assert relative(latents, expected["latents"]) > 1e-2


def test_batches_are_padded_by_their_last_row():
    tree = (np.arange(6).reshape(3, 2), np.float32(7), None)
    padded = pad_rows(tree, 4)
    assert padded[0].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]] and padded[1:] == tree[1:]


def test_a_mesh_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        fluxjax.load_pipeline(mesh="fsdp=3")


def test_attention_over_split_tokens_is_chosen():
    from fluxjax.sample.command import draw
    from fluxjax.sample.options import Options

    pipe = fluxjax.load_pipeline(mesh="sequence=8", sequence="ring")
    assert pipe.executables.sequence == "ring"
    with pytest.raises(ConfigError, match="ulysses cannot split 6 heads over sequence=8"):
        draw(Options(prompt=("a star",), mesh="sequence=8", sequence="ulysses"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of three prompts, each with an image to start from and a control picture, and beside
    it their pictures drawn by one device; a ControlNet with random weights."""
    from fluxjax.sample.command import draw
    from fluxjax.sample.options import Options

    folder = tmp_path_factory.mktemp("prompts")
    photo(0, (80, 64)).save(folder / "image.png")
    photo(1, (80, 64)).save(folder / "control.png")
    given = {"image": "image.png", "strength": 0.7, "control": "control.png"}
    lines = [{"prompt": text, "seed": 5 + i, **given} for i, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fields = {f.name: getattr(TINY.transformer, f.name) for f in fields_of(TINY.transformer)}
    blocks = {"num_layers": 1, "num_single_layers": 1}
    save_random(folder, "net", ControlNetConfig(**{**fields, **blocks}))
    net = (str(folder / "net"),)
    options = Options(prompts=folder / "prompts.jsonl", out=folder / "one", controlnet=net, **QUICK)
    assert draw(options) == 0
    return folder / "prompts.jsonl"


def save_random(folder, name, config) -> None:
    random = np.random.default_rng(0)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda x: 0.05 * random.standard_normal(x.shape, np.float32), shapes)
    save_params(folder, name, params, config, None)


@pytest.fixture(scope="module")
def tools(prompts):
    """Options of the embedded model's Fill, which hears a picture through Redux and sees one
    through an IP-Adapter, both random, and of its Canny; beside, what one device draws by them."""
    from fluxjax.sample.command import draw
    from fluxjax.sample.options import Options

    folder = prompts.parent
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 28}
    text = TINY.text_encoder_2.d_model
    save_random(folder, "redux/image_encoder", SiglipVisionConfig(**sizes))
    save_random(folder, "redux/image_embedder", ReduxConfig(redux_dim=32, txt_in_features=text))
    clip = CLIPVisionConfig(**sizes, projection_dim=18, with_projection=True)
    save_random(folder, "clip", clip)
    adapter = IPAdapterConfig(
        num_layers=TINY.transformer.num_layers,
        inner_dim=TINY.transformer.inner_dim,
        cross_attention_dim=24,
        image_embed_dim=18,
        num_tokens=4,
    )
    save_file(xlabs_file(adapter), folder / "ip.safetensors")
    hole((80, 64)).save(folder / "mask.png")
    image, control = str(folder / "image.png"), str(folder / "control.png")
    fill = {
        "model": "tiny-fill",
        **{"image": image, "mask": str(folder / "mask.png")},
        **{"redux": folder / "redux", "redux_image": (control,)},
        **{"ip_adapter": (str(folder / "ip.safetensors"),), "ip_image": (control,)},
        "image_encoder": folder / "clip",
    }
    runs = {"fill": fill, "canny": {"model": "tiny-canny", "control": (control,)}}
    runs = {name: QUICK | given | {"seed": 5} for name, given in runs.items()}
    for name, given in runs.items():
        assert draw(Options(prompt=(PROMPTS[0],), out=folder / f"one_{name}", **given)) == 0
    return runs


def as_arguments(options) -> list[str]:
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in options.items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def equal_to_those_of_one(alone, folder) -> None:
    names = sorted(path.name for path in alone.iterdir())
    assert names and names == sorted(path.name for path in folder.iterdir())
    for name in names:
        one, many = (np.asarray(Image.open(f / name), int) for f in (alone, folder))
        assert np.abs(one - many).max() <= 1 and (one != many).mean() < 1e-3
        assert one.std() > 5


@pytest.mark.slow
def test_a_file_of_prompts_is_drawn_in_batches(prompts, tmp_path, capsys):
    """Three pictures on eight devices are one batch; each is what it is alone."""
    from fluxjax.sample.command import draw
    from fluxjax.sample.options import Options

    net = (str(prompts.parent / "net"),)
    assert draw(Options(prompts=prompts, mesh="fsdp=8", out=tmp_path, controlnet=net, **QUICK)) == 0
    equal_to_those_of_one(prompts.parent / "one", tmp_path)
    assert len({line.split("seed")[1][:3] for line in capsys.readouterr().out.splitlines()}) == 3
    jax.clear_caches()


@pytest.mark.slow
def test_two_processes_draw_together_and_one_of_them_saves(prompts, tools, tmp_path):
    """Four devices each; weights, heads and pictures lie across both, and each has read what is
    given: a file of prompts, and then one prompt by each tool."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    first = QUICK | {"prompts": prompts, "controlnet": prompts.parent / "net"}
    runs = [as_arguments(first | {"out": tmp_path / "one", "mesh": "tensor=2,fsdp=4"})]
    for name, given in tools.items():
        options = given | {"out": tmp_path / f"one_{name}", "mesh": "tensor=2,fsdp=4"}
        runs.append([PROMPTS[0], *as_arguments(options)])
    joined = as_arguments({"coordinator": f"localhost:{port}", "num_processes": 2})
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    terminal, end = os.openpty()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL, json.dumps(runs), *joined, f"--process-id={i}"],
            env={**os.environ, "XLA_FLAGS": flags, "TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        for i, stderr in enumerate((end, subprocess.PIPE))
    ]
    os.close(end)
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(_all_of, terminal)
        try:
            said = [process.communicate(timeout=400) for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert "steps" in shown.result() and "2/2" in shown.result(), "no bar on the terminal"
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0][0].count("seed") == 3 + len(tools)
    # Gloo prints on stdout, with several threads at once: its lines are torn.
    assert not any(word in said[1][0] for word in ("seed", ".png")), said[1][0]
    assert said[1][1] == ""
    for name in ("one", *(f"one_{name}" for name in tools)):
        equal_to_those_of_one(prompts.parent / name, tmp_path / name)


def _all_of(terminal: int) -> str:
    """What is written to a terminal until its last writer closes it."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 4096):
            parts.append(part)
    return b"".join(parts).decode()
