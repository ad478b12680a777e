"""Weights that come and go: the same picture from less memory."""

import re
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from parameter_trees import parameter_count
from stable_diffusion_folders import save_pixart, save_sd3

import fluxjax
from fluxjax.checkpoint.templates import abstract_params, part_of
from fluxjax.config import DEV, TINY, ConfigError
from fluxjax.models.absent import Absent
from fluxjax.models.lora import variables
from fluxjax.models.names import flatten, is_stacked
from fluxjax.networks import network_of
from fluxjax.parallel.host_memory import with_places
from fluxjax.sample.given_options import check
from fluxjax.sample.memory_estimate import weight_bytes
from fluxjax.sample.options import Options

COPY = r"(%\d+) = .*@annotate_device_placement.*\(tensor<(\d+x\d+)x"
CHOSEN: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "max_sequence_length": 16}


def test_the_modulations_are_a_quarter_of_the_model():
    """What is needed before the steps, and in them: all of it, nothing twice."""
    whole = abstract_params(DEV.transformer, stacked=True)
    before, steps = (part_of(whole, DEV.transformer, part) for part in ("before", "steps"))
    for path, leaf in flatten(whole).items():
        one, other = flatten(before)[path], flatten(steps)[path]
        assert isinstance(one, Absent) != isinstance(other, Absent)
        assert one.shape == other.shape == leaf.shape
    share = parameter_count(before) / parameter_count(whole)
    assert 0.27 < share < 0.28


@pytest.mark.slow
def test_the_picture_is_the_same_byte_for_byte(tmp_path):
    """Plain, and with everything that comes and goes: modulations before the steps, blocks in codes
    from the host's memory, one network at a time; twice, as what has left is read again."""
    plain = fluxjax.load_pipeline("tiny", quantise="int8", scan_layers=True)
    expected = np.asarray(plain("a red circle", seed=1, **CHOSEN)[0])
    pipe = fluxjax.load_pipeline("tiny", quantise="int8", offload=True, stream=True)
    asked: list[tuple[str, str]] = []
    load = pipe._load_params

    def noted(component: str, part: Any = "all"):
        assert not pipe.is_loaded("transformer")
        asked.append((component, part))
        params = load(component, part)
        if component == "transformer" and part == "steps":
            codes = params["single_transformer_blocks"]["proj_mlp"]["kernel"].parts["codes"]
            assert codes.sharding.memory_kind == "pinned_host"
            norm = params["single_transformer_blocks"]["norm"]["linear"]["kernel"]
            assert isinstance(norm, Absent)
            assert not pipe.is_loaded("text_encoder_2")
        return params

    pipe._load_params = noted
    for _ in range(2):
        drawn = np.asarray(pipe("a red circle", seed=1, **CHOSEN)[0])
        np.testing.assert_array_equal(drawn, expected)
    run = [
        ("text_encoder", "all"),
        ("text_encoder_2", "all"),
        ("transformer", "before"),
        ("transformer", "steps"),
        ("vae", "all"),
    ]
    assert asked == 2 * run
    assert weight_bytes(pipe) < weight_bytes(
        fluxjax.load_pipeline("tiny", quantise="int8", scan_layers=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_each_kernel_is_brought_while_the_block_before_it_runs(platform):
    """In the program that is lowered, from shapes as `Executables` has them, for accelerators:
    modulations' kernels are copied to the device once, in their loop; the others of 2 double blocks
    for each, of 6 single ones before the loop, twice in a turn of it, and once after. In a turn
    `proj_out` multiplies by what came with the carry, then by the first copy; the second goes on
    with the carry."""
    network, shapes = network_of(TINY.transformer), abstract_params(TINY.transformer, stacked=True)
    module = network.build(TINY.transformer, scan_layers=True)
    forward = jax.jit(lambda params, inputs: module.apply(variables(params), **inputs))
    traced = forward.trace(with_places(shapes), network.inputs(TINY.transformer))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    expected = {}
    for path, leaf in flatten(shapes).items():
        if is_stacked(path) and path[-1] == "kernel":
            times = 1 if path[-2] == "linear" else 2 if path[0] == "transformer_blocks" else 4
            size = "x".join(map(str, leaf.shape[1:]))
            expected[size] = expected.get(size, 0) + times
    assert Counter(size for _, size in re.findall(COPY, text)) == expected
    _, *functions = text.split("func.func private")
    copied = [[name for name, size in re.findall(COPY, f) if size == "960x192"] for f in functions]
    ((turn, copies),) = ((f, names) for f, names in zip(functions, copied, strict=True) if names)
    used = re.findall(r"dot_general %\d+, (%\w+),.*tensor<960x192xf32>\)", turn)
    assert used[0].startswith("%arg") and used[1] == copies[0] and len(used) == len(copies) == 2
    returned = turn.rsplit(" return ", 1)[1]
    assert copies[1] in returned.split(" : ")[0].split(", ")


def test_what_does_not_go_together_is_refused():
    choices: list[dict[str, Any]] = [{"offload": True}, {"stream": True}]
    for options in choices:
        with pytest.raises(ConfigError, match="for one device"):
            fluxjax.load_pipeline("tiny", mesh="fsdp=2", **options)
        with pytest.raises(ConfigError, match="for one device"):
            check(Options(prompt=("a",), mesh="fsdp=2", **options))
    with pytest.raises(ConfigError, match="needs scan_layers"):
        fluxjax.load_pipeline("tiny", stream=True, scan_layers=False)
    with pytest.raises(
        ConfigError, match="equal blocks at a time, and a UNet has none: take offload"
    ):
        fluxjax.load_pipeline("tiny-sd", stream=True)


@pytest.mark.slow
@pytest.mark.parametrize(("save", "own"), [(save_sd3, {}), (save_pixart, {"size_bins": False})])
def test_other_families_draw_the_same_picture(save, own, shared, tmp_path):
    """Their modulations are computed in the steps; all blocks come from the host's memory."""
    folder = save(tmp_path / "model", shared / "tokenizers")
    options = {"width": 40, "height": 56, "steps": 2, "seed": 1, **own}
    ways: list[dict[str, Any]] = [{"scan_layers": True}, {"offload": True, "stream": True}]
    whole, offloaded = (
        np.asarray(fluxjax.load_pipeline(folder, **how)("a dog", **options)[0]) for how in ways
    )
    np.testing.assert_array_equal(whole, offloaded)
