"""`python -m fluxjax.plan`: counts against arithmetic, at the real size too; errors; the report."""

import json
import math
import os
import subprocess
import sys
from dataclasses import fields as fields_of
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from open_sora_folders import SMALL
from parameter_trees import parameter_count
from safetensors.numpy import save_file
from test_image_encoders import xlabs_file

from fluxjax.checkpoint.component_json import config_json, write_json
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.chips import CHIPS
from fluxjax.config import (
    PRESETS,
    TINY,
    CLIPVisionConfig,
    ConfigError,
    ControlNetConfig,
    FluxPipelineConfig,
    IPAdapterConfig,
    ReduxConfig,
    SiglipVisionConfig,
)
from fluxjax.config.latents import PATCH, latent_size
from fluxjax.models.attention import dot_product_attention
from fluxjax.networks import network_of
from fluxjax.networks.flux import flops as flux_flops
from fluxjax.parallel.compiled_program import Structure, measure
from fluxjax.parallel.mesh import make_mesh
from fluxjax.plan.attention import flash_like
from fluxjax.plan.estimate import as_json, fits, floor, needed_bytes
from fluxjax.plan.options import Options, check, device_count, find_chips, read_model
from fluxjax.plan.programs import Placed, Program, compile_plan
from fluxjax.plan.tables import print_tables

H100 = CHIPS["h100"]


def tokens(config: FluxPipelineConfig) -> int:
    """Image tokens of one picture."""
    return math.prod(latent_size(config.width, config.height, config.vae)) // PATCH**2


def quiet(name: str) -> None:
    pass


@pytest.mark.slow
def test_a_lora_step_is_counted_and_shared_out():
    options = Options(model="tiny", task="lora", mesh="fsdp=4,tensor=2", batch=4, rank=4)
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    total = parameter_count(abstract_params(config.transformer))
    assert 2 * total / 8 <= placed.weights["transformer"] <= 1.1 * 2 * total / 8
    assert placed.weights["LoRA"] < 0.2 * placed.weights["transformer"]
    # AdamW: two moments of the LoRA, in its own sharding, and a counter.
    moments = 2 * placed.weights["LoRA"]
    assert moments * 0.95 <= placed.optimizer <= moments + 16
    (step,) = placed.programs
    # Forwards, once more, and backwards to the inputs; the batch is split over fsdp, the width over
    # tensor. The modulations' share of a small model, and its ends, are not split as evenly.
    each = flux_flops(config.transformer, tokens(config), config.max_sequence_length)
    assert 2.5 * each / 2 <= step.structure.matmul_flops <= 3.5 * each / 2
    assert step.structure.collective_bytes["all-gather"] > 0


@pytest.mark.slow
def test_a_step_of_all_weights_is_counted_and_shared_out():
    options = Options(model="tiny", task="full", mesh="fsdp=8", batch=8, accumulate=1, ema=True)
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    total = parameter_count(abstract_params(config.transformer))
    # Float32; biases and norms lie on every device.
    assert 4 * total / 8 <= placed.weights["transformer"] <= 1.1 * 4 * total / 8
    # AdamW's two moments and the average lie as the weights do.
    state = 3 * placed.weights["transformer"]
    assert state <= placed.optimizer <= state + 64
    (step,) = placed.programs
    # Forwards, once more, and backwards to inputs and weights.
    each = flux_flops(config.transformer, tokens(config), config.max_sequence_length)
    assert 3.8 * each <= step.structure.matmul_flops <= 4.2 * each
    # Weights are gathered forwards and backwards; gradients are summed over all devices.
    moved = step.structure.collective_bytes
    assert moved["all-gather"] > 1.8 * 2 * total * 7 / 8
    assert moved["all-reduce"] > 0.9 * 4 * total


@pytest.mark.slow
def test_what_comes_and_goes_is_counted_when_it_is_there():
    """Offloaded and streamed: T5 while it encodes, modulations before the steps."""
    options = Options(model="tiny", steps=4, width=64, height=64, offload=True, stream=True)
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    held = {program.name: program.held for program in placed.programs}
    weights = placed.weights
    assert held["encode"] == weights["text_encoder"] + weights["text_encoder_2"]
    assert held["decode"] == weights["vae"]
    # Kernels of blocks lie on the host, whatever they are used for.
    assert max(held["before"], held["denoise"]) < 0.1 * weights["transformer"]
    assert needed_bytes(placed) < sum(weights.values())


@pytest.mark.slow
def test_counts_of_sampling_on_one_device():
    options = Options(
        model="tiny",
        steps=3,
        batch=2,
        width=64,
        height=96,
        dtype="float32",
        quantise="text_encoder_2=int8",
    )
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    for name, held in placed.weights.items():
        values = 4 * parameter_count(abstract_params(getattr(config, name)))
        if name == "text_encoder_2":  # all but the embedding
            assert 0.25 * values < held < 0.35 * values
        else:
            assert held == values
    denoise = {program.name: program for program in placed.programs}["denoise"]
    each = flux_flops(config.transformer, tokens(config), config.max_sequence_length)
    assert abs(denoise.structure.matmul_flops / (2 * 3 * each) - 1) < 0.03
    assert denoise.reads == 3 * placed.weights["transformer"]
    assert not denoise.structure.collectives and placed.optimizer == 0


@pytest.mark.slow
def test_an_image_is_drawn_anew_in_as_many_steps_as_its_strength_runs():
    options = Options(model="tiny", pictures=("image",), steps=5, width=64, height=64)
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    denoise = {program.name: program for program in placed.programs}["denoise"]
    each = flux_flops(config.transformer, tokens(config), config.max_sequence_length)
    assert abs(denoise.structure.matmul_flops / (3 * each) - 1) < 0.03
    assert denoise.reads == 3 * placed.weights["transformer"]
    assert placed.notes == ("an image is drawn anew in 3 of 5 steps, by a strength of 0.6",)


@pytest.mark.slow
def test_an_edit_is_learnt_with_its_reference_beside_it(monkeypatch):
    monkeypatch.setitem(PRESETS, "kontext", TINY)
    options = Options(model="kontext", task="lora", width=64, height=96, rank=4)
    config = read_model(options)
    (step,) = compile_plan(options, config, quiet).programs
    each = flux_flops(config.transformer, 2 * tokens(config), config.max_sequence_length)
    assert 2.5 * each <= step.structure.matmul_flops <= 3.5 * each


@pytest.mark.slow
@pytest.mark.parametrize("model", ["kontext", "fill", "control"])
def test_every_tool_is_counted(model, monkeypatch):
    """Kontext sees its reference, as large as the picture, beside it; Fill and Control encode one
    picture, and their transformers read more channels."""
    real = PRESETS[model]
    image = tokens(real)
    seen = 2 * image if model == "kontext" else image
    if model == "kontext":
        assert abs(flux_flops(real.transformer, seen, 512) / 165.458e12 - 1) < 1e-5
    transformer = replace(TINY.transformer, in_channels=real.transformer.in_channels)
    small = replace(TINY, transformer=transformer)
    monkeypatch.setitem(PRESETS, model, small)
    options = Options(model=model, steps=3, width=64, height=96, dtype="float32")
    config = read_model(options)
    placed = {program.name: program for program in compile_plan(options, config, quiet).programs}
    encoder = "reference" if model == "kontext" else "posterior"
    assert placed.keys() == {"denoise", "encode", "decode", encoder}
    seen = tokens(config) * (2 if model == "kontext" else 1)
    each = flux_flops(config.transformer, seen, config.max_sequence_length)
    assert abs(placed["denoise"].structure.matmul_flops / (3 * each) - 1) < 0.03
    assert placed[encoder].structure.matmul_flops > 0


def tool_folders(root):
    """Configurations alone, of tools for the embedded model; an IP-Adapter's tensors."""
    width, text = TINY.transformer.inner_dim, TINY.text_encoder_2.d_model
    fields = {f.name: getattr(TINY.transformer, f.name) for f in fields_of(TINY.transformer)}
    net = ControlNetConfig(**{**fields, "num_layers": 2, "num_single_layers": 1})
    siglip = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=112,
    )
    clip = CLIPVisionConfig(
        with_projection=True, hidden_size=32, intermediate_size=64, num_hidden_layers=2
    )
    projector = ReduxConfig(redux_dim=32, txt_in_features=text)
    for place, config in (
        ("net", net),
        ("redux/image_encoder", siglip),
        ("redux/image_embedder", projector),
        ("clip", clip),
    ):
        write_json(root / place / "config.json", config_json(config))
    adapter = IPAdapterConfig(
        num_layers=2, inner_dim=width, cross_attention_dim=48, image_embed_dim=768, num_tokens=5
    )
    save_file(xlabs_file(adapter), root / "ip.safetensors")
    return net, siglip, clip, adapter, adapter


@pytest.mark.slow
def test_networks_of_tools_are_counted(tmp_path):
    net, siglip, *ip_adapters = tool_folders(tmp_path)
    plain = Options(model="tiny", steps=3, width=64, height=96, dtype="float32")
    options = replace(
        plain,
        controlnet=(str(tmp_path / "net"),) * 2,
        redux=str(tmp_path / "redux"),
        ip_adapter=(str(tmp_path / "ip.safetensors"),) * 2,
        image_encoder=str(tmp_path / "clip"),
        offload=True,
    )
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    found = {program.name: program for program in placed.programs}
    assert found.keys() == {
        *("redux", "ip_adapter", "encode", "posterior", "before", "denoise", "decode")
    }
    weights = placed.weights
    # The same ControlNet twice has its weights once.
    assert weights["controlnets"] == 4 * parameter_count(abstract_params(net))
    assert weights["redux"] > 4 * parameter_count(abstract_params(siglip))
    assert found["redux"].held == weights["redux"], "no other network is there"
    assert weights["ip_adapter"] == 4 * sum(map(parameter_count, map(abstract_params, ip_adapters)))
    text = config.max_sequence_length + siglip.tokens
    each = flux_flops(config.transformer, tokens(config), text)
    each += 2 * network_of(net).flops(net, tokens(config), text)
    steps = found["denoise"].structure.matmul_flops + found["before"].structure.matmul_flops
    assert abs(steps / (3 * each) - 1) < 0.03


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"controlnet": ("union",)}, "union: this ControlNet has blocks of width 3072"),
        ({"model": "fill", "controlnet": ("union",)}, "ControlNets go with models that draw from"),
        (
            {"controlnet": ("onion",)},
            "'onion' is neither one of union, union-2, xlabs nor a folder",
        ),
        ({"controlnet": ("union",) * 4}, "at most 3 ControlNets"),
        ({"redux": "dev"}, "tokens of width 4096, and this model reads text of width 128"),
        ({"ip_adapter": ("xlabs",)}, "for 19 double blocks, and the model has 2"),
        ({"ip_adapter": ("xlabs",) * 4}, "at most 3 IP-Adapters"),
        ({"image_encoder": "clip"}, "name one too"),
        ({"task": "lora", "redux": "dev"}, "are for --task sample"),
    ],
)
def test_tools_of_another_model_are_one_sentence(asked, words):
    with pytest.raises(ConfigError, match=words):
        check(Options(**{"model": "tiny", **asked}))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("opensora-256", 8_316),
        ("opensora-768", 76_032),
        ("hunyuan-540", 67_320),
        ("hunyuan-720", 118_800),
    ],
)
def test_presets_of_clips(name, tokens):
    config = PRESETS[name]
    config.require_whole(name)
    config.require_size(config.width, config.height)
    pixels = config.width * config.height // (2 * config.vae.scale) ** 2
    assert config.latent_frames(config.frames) * pixels == tokens


def decoder_flops(t: int, h: int, w: int) -> int:
    """Each convolution of the published decoder, and its attention, for a tile of so many latents;
    a multiply-add counts two."""

    def conv(given: int, made: int, size: int = 3) -> int:
        return 2 * given * made * size**3 * t * h * w

    total = conv(16, 16, 1) + conv(16, 512) + 4 * conv(512, 512)
    total += 4 * conv(512, 512, 1) + 4 * 512 * (t * h * w) ** 2
    before = 512
    for level, width in enumerate((512, 512, 256, 128)):
        total += conv(before, width) + 5 * conv(width, width)
        total += conv(before, width, 1) if before != width else 0
        before = width
        if level < 3:
            t, h, w = 2 * t - 1 if level else t, 2 * h, 2 * w
            total += conv(width, width)
    return total + conv(128, 3)


@pytest.mark.slow
def test_the_real_size_of_hunyuan_video():
    """All of a run as it is sampled, in petaflops: 50 forwards, the language model, tiles."""
    options = Options(model="hunyuan-720", mesh="sequence=8")
    placed = compile_plan(options, read_model(options), quiet)
    programs = {program.name: program.structure for program in placed.programs}
    flops = {name: 8 * one.matmul_flops / 1e15 for name, one in programs.items()}
    print(flops, placed.weights)
    assert flops["denoise"] == pytest.approx(50 * 12.069, rel=0.01)
    # On all devices alike: 351 tokens.
    assert flops["encode"] / 8 == pytest.approx(4.65e-3, rel=0.01)
    # Tiles of 5 x 32 x 32 latents, smaller at the end; each device decodes as many.
    rows, columns = [32, 32, 32, 18], [32] * 6 + [16]
    tiles = [*product([5] * 10 + [3], rows, columns)]
    counted = sum(decoder_flops(*tile) for tile in tiles) / 1e15
    assert flops["decode"] == pytest.approx(
        counted * 8 * -(-len(tiles) // 8) / len(tiles), rel=2e-3
    )

    assert placed.weights["text_encoder"] == pytest.approx(14.1e9, rel=0.01)
    assert "published, on eight GPUs: 338 s" in placed.notes


@pytest.mark.slow
def test_a_clip_is_counted_with_its_tiles(monkeypatch):
    monkeypatch.setitem(PRESETS, "opensora-256", SMALL)
    options = Options(model="opensora-256", steps=12, dtype="float32")
    config = read_model(options)
    placed = compile_plan(options, config, quiet)
    programs = {program.name: program for program in placed.programs}
    assert programs.keys() == {"encode", "denoise", "decode"}
    each = flux_flops(config.transformer, 2 * 2 * 3, config.max_sequence_length)
    # 24 passes but one, whose step rests; ends count for more in so small a network.
    assert abs(programs["denoise"].structure.matmul_flops / (23 * each) - 1) < 0.1
    assert programs["decode"].structure.matmul_flops > 0
    assert "published, on one H100: 60 s, 52.5 GB on each" in placed.notes
    (step,) = compile_plan(replace(options, task="lora", rank=2), config, quiet).programs
    # Forwards, once more, and backwards to the inputs, but for text's, which is embedded once.
    text = 2 * config.max_sequence_length * config.transformer.joint_attention_dim * 32
    assert 2.5 < (step.structure.matmul_flops - text) / (each - text) < 3.5
    with pytest.raises(ConfigError, match="frames must be 1 more than a multiple of 4, got 8"):
        read_model(Options(model="opensora-256", frames=8))
    with pytest.raises(ConfigError, match="frames are those of a clip"):
        read_model(Options(model="tiny", frames=5))
    alone = compile_plan(replace(options, offload=True), config, quiet)
    assert needed_bytes(alone) < needed_bytes(placed)


@pytest.mark.slow
def test_the_real_size_by_command_without_weights(tmp_path):
    """FLUX.1-dev on 8 simulated devices: the published counts, in a process of its own."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": ""}
    command = [sys.executable, "-m", "fluxjax.plan", "dev", "--mesh", "fsdp=8", "--batch", "8"]
    ended = subprocess.run(
        [*command, "--json", "--chips", "H100", "v5e"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    programs = {program["name"]: program for program in plan["programs"]}
    assert abs(programs["denoise"]["flops"] / (28 * 74.385e12) - 1) < 0.01
    assert abs(programs["decode"]["flops"] / 10.47e12 - 1) < 0.01
    assert abs(programs["encode"]["flops"] / 4.86e12 - 1) < 0.01
    weights = plan["bytes_per_device"]["weights"]
    assert weights["transformer"] <= 1.02 * 2 * 11_901_408_320 / 8
    # Every step gathers the weights of its blocks, seven eighths of which lie elsewhere; the
    # modulations, 27 % of all, only once.
    blocks = 2 * (11_901_408_320 - 3.229e9) * 7 / 8
    assert 1 < programs["denoise"]["collective_bytes"]["all-gather"] / (28 * blocks) < 1.1
    assert [chip["name"] for chip in plan["chips"]] == ["H100 PCIe", "H100 SXM", "TPU v5e"]
    h100 = plan["chips"][1]
    assert h100["fits"] and h100["bound"]["denoise"] == "compute"
    assert abs(h100["floor_seconds"]["denoise"] - 28 * 0.0752) < 0.02


def test_collectives_of_bfloat16_count_two_bytes():
    mesh = make_mesh("fsdp=8")
    spec = jax.ShapeDtypeStruct
    for dtype, size in ((jnp.bfloat16, 2), (jnp.float32, 4)):
        x = spec((8, 64), dtype, sharding=NamedSharding(mesh, P()))
        kernel = spec((64, 128), dtype, sharding=NamedSharding(mesh, P("fsdp")))

        def product(x, kernel):
            whole = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))
            return x @ whole

        found = measure(jax.jit(product).lower(x, kernel).compile())
        assert found.collective_bytes == {"all-gather": 64 * 128 * size * 7 / 8}


@pytest.mark.parametrize("length", [100, 300])
def test_the_stand_in_is_attention(length):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, length, 3, 8)) for key in keys)
    expected = dot_product_attention(q, k, v, implementation="xla")
    assert jnp.abs(flash_like(q, k, v) - expected).max() < 1e-6


def test_floors_and_what_fits():
    structure = Structure(
        argument_bytes=0,
        output_bytes=3,
        temporary_bytes=10,
        donated_bytes=1,
        matmul_flops=989e12,
        collectives=(),
    )
    step = Program("step", structure, int(2 * 3350e9), 120)
    limits = floor(step, H100)
    assert (limits.compute, limits.memory, limits.links) == (1.0, 2.0, 0.0)
    assert limits.seconds == 2.0 and limits.bound == "memory"
    small = replace(structure, temporary_bytes=4)
    placed = Placed({"a": 100, "b": 20}, 7, (step, Program("other", small, 0, 120)))
    assert needed_bytes(placed) == 100 + 20 + 7 + 10 + 3 - 1
    alone = Program("other", small, 0, 130)  # adds less than the other, beside more weights
    assert needed_bytes(replace(placed, programs=(step, alone))) == 7 + 130 + 4 + 3 - 1
    assert fits(placed, 80)
    assert not fits(replace(placed, optimizer=int(75e9)), 80), "some memory is the runtime's"


def test_report(capsys):
    structure = Structure(0, 0, 10**9, 0, 1e12, ())
    placed = Placed(
        {"transformer": 10**9}, 0, (Program("step", structure, 0, 10**9),), ("a remark",)
    )
    made = {"model": "dev"}
    print_tables(placed, (H100,), made)
    printed = capsys.readouterr().out
    for words in (
        "transformer",
        "2.00 GB",
        "yes",
        "H100 SXM",
        "1.01 ms (compute)",
        "nothing",
        "a remark",
    ):
        assert words in printed, words
    values = as_json(placed, (H100,), made)
    assert values["bytes_per_device"]["total"] == 2 * 10**9
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offload": True, "task": "lora"}, "for --task sample on one device"),
        ({"quantise": "nf4", "task": "full"}, "weights that are not trained"),
        ({"mesh": "fsdp=3", "devices": 8}, "does not fit 8 devices"),
        ({"mesh": "fsdp=2,pipe=2"}, "a mesh is written as"),
        ({"mesh": "fsdp=16"}, "needs 16 simulated devices"),
        ({"mesh": "fsdp=8", "batch": 4}, "batch 4 must be a multiple of 8"),
        ({"task": "full", "batch": 2, "accumulate": 4}, "batch 2 must be a multiple of 4"),
        ({"model": "devil"}, "neither a preset"),
        ({"model": "fill", "task": "lora"}, "in_channels is 384, and in a text-to-image model"),
        ({"pictures": ("mask",)}, "this model draws from text alone, .* it was given a mask"),
        ({"width": 100}, "width must be"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"chips": ("H100", "Z80")}, "no chip is called 'Z80'"),
    ],
)
def test_impossible_plans_are_one_sentence(options, words):
    chosen = Options(**{"model": "tiny", **options})
    with pytest.raises(ConfigError, match=words) as error:
        check(chosen)
        compile_plan(chosen, read_model(chosen), quiet)
    assert len(str(error.value).splitlines()) == 1


def test_devices_of_a_mesh_and_chips_by_part_of_their_name():
    assert device_count(Options(mesh="fsdp=4,tensor=2")) == 8
    assert device_count(Options(mesh="fsdp=4,tensor=2", devices=32)) == 32
    assert device_count(Options()) == 1
    assert [chip.name for chip in find_chips(("v5",))] == ["TPU v5e", "TPU v5p"]
    assert len(find_chips(())) == 10
    assert read_model(Options(model="tiny")) == TINY
