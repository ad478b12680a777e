"""Every sampler's table against diffusers: recorded runs by the program that draws, others live."""

import json
import warnings
from functools import partial
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open

from fluxjax.checkpoint.component_json import parse_config, read_config_json
from fluxjax.config import ConfigError
from fluxjax.config.sampler import DEFAULTS, SamplerConfig
from fluxjax.sample.denoise import denoise
from fluxjax.schedules.euler import Churn
from fluxjax.schedules.samplers import NAMES, chosen, sampler_run
from fluxjax.schedules.schedule import pad
from fluxjax.schedules.step_table import LATENTS

# diffusers' own float32 cancellation, from a sigma of 4096.
LOOSE = {"euler_v_trailing_zero_snr": 6e-6}
BOUND = 2e-6
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def toy(x, t, numpy=jnp):
    """The recorded runs' network."""
    return numpy.tanh(0.7 * x + 0.001 * t)


def toy_with_variance(x, t):
    return jnp.concatenate([toy(x, t), jnp.tanh(0.3 * x - 0.0005 * t)], 1)


@partial(jax.jit, static_argnames="network")
def run(state, schedule, noise, network):
    passes = np.zeros((len(schedule.times), 0), np.float32)
    return denoise(network, schedule.times, state, schedule, passes, noise=noise)


def sampler_config(values):
    return parse_config(SamplerConfig, values, Path("scheduler_config.json"))


def recorded_table(case):
    config = sampler_config({**case["config"], "_class_name": case["scheduler"]})
    step, given = case["step"], case["set_timesteps"]
    choices = {}
    if "s_churn" in step:
        choices["churn"] = Churn(step["s_churn"], step["s_tmin"], step["s_tmax"], step["s_noise"])
    for theirs, ours in (("eta", "eta"), ("use_clipped_model_output", "noise_of_clamped")):
        choices |= {ours: step[theirs]} if theirs in step else {}
    for theirs, ours in (("mu", "mu"), ("sigmas", "own")):
        choices |= {ours: given[theirs]} if theirs in given else {}
    return sampler_run(config, case["num_inference_steps"], case["start_index"], **choices)


def trajectory(case, table, tensor):
    """Latents before the first and after every evaluation, by the scanned program."""
    x = tensor("noise0") * np.float32(table.scale)
    if case["strength"] is not None:
        signal, level = table.levels[0]
        x = (signal * tensor("init_latents") + level * tensor("noise0")).astype(np.float32)
    schedule = pad(table.schedule)
    noise = np.zeros((len(x), len(schedule.times), *x.shape[1:]), np.float32)
    if table.draws.any():
        noise[:, np.flatnonzero(table.draws)] = np.moveaxis(tensor("noise"), 0, 1)
    network = toy if case["prediction"] == "mean" else toy_with_variance
    state, found = (jnp.array(x), *[jnp.zeros_like(x)] * (LATENTS - 1)), [x]
    for i in range(schedule.steps):
        state = run(state, schedule.part(i, i + 1), noise, network)
        found.append(np.asarray(state[0]))
    return found


def error(got, expected):
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def test_every_recorded_run(shared):
    """All in the one program: thresholds and a learned variance are others, buckets too."""
    cases = json.loads((shared / "goldens" / "schedulers.json").read_text())["cases"]
    tensors = safe_open(shared / "goldens" / "schedulers.safetensors", "np")
    assert len(cases) == 56
    run.clear_cache()
    errors = {}
    for case in cases:
        name, table = case["name"], recorded_table(case)
        assert np.flatnonzero(table.draws).tolist() == case["noise_drawn_at"], name
        assert table.scale == pytest.approx(case["init_noise_sigma"], rel=1e-6), name
        times = tensors.get_tensor(f"{name}/timesteps")
        np.testing.assert_allclose(table.schedule.times, times, rtol=3e-7, atol=1e-6, err_msg=name)
        expected = tensors.get_tensor(f"{name}/trajectory")
        found = trajectory(
            case, table, lambda part, name=name: tensors.get_tensor(f"{name}/{part}")
        )
        assert len(found) == len(expected) == case["model_evaluations"] + 1
        errors[name] = max(error(a, b) for a, b in zip(found, expected, strict=True))
    assert not {name: e for name, e in errors.items() if not e < LOOSE.get(name, BOUND)}
    # Buckets of 4, 8, 16 and 32 evaluations; thresholded 16; a learned variance 16.
    assert run._cache_size() == 6


def simulated(table, x, draw):
    """The table in float64, without the program."""
    columns, state = table.schedule, np.zeros((LATENTS, *x.shape))
    state[0] = x * table.scale
    for i in range(len(columns.times)):
        m = columns.gains[i] * toy(columns.scales[i] * state[0], columns.times[i], np)
        a, b, limit = columns.clips[i]
        rest = [m, np.clip(a * state[0] + b * m, -limit, limit)]
        rest.append(draw() if table.draws[i] else np.zeros_like(x))
        state = np.einsum("ij,j...->i...", columns.matrices[i].astype(float), [*state, *rest])
    return state[0]


def live(sampler, values, steps, **step):
    """diffusers' own run, in float64."""
    scheduler = getattr(diffusers, sampler)(**values)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 4, 8, 8), generator=generator)
    start, x = x.numpy().astype(float), x.double() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if "FlowMatch" not in sampler else x
        m = torch.tanh(0.7 * seen.double() + 0.001 * t)
        names = scheduler.step.__code__.co_varnames
        more = {"generator": generator} if "generator" in names else {}
        x = scheduler.step(m, t, x, **more, **step).prev_sample.double()
    return scheduler, start, x.numpy()


KARRAS = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}  # the last two are equal
RARE = (
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    ("EulerDiscreteScheduler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}),
    (
        "EulerDiscreteScheduler",
        {
            "interpolation_type": "log_linear",
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
        },
    ),
    ("HeunDiscreteScheduler", {"prediction_type": "sample"}),
    ("DPMSolverMultistepScheduler", KARRAS),
    ("DPMSolverMultistepScheduler", {**KARRAS, "solver_type": "heun", "euler_at_final": True}),
    ("UniPCMultistepScheduler", {**KARRAS, "lower_order_final": False}),
)


def grid():
    """Settings that the recordings do not have: spacings, odd steps, orders, sigmas."""
    for sampler in NAMES:
        values = dict(NAMES[sampler])
        name = values.pop("sampler")
        has = DEFAULTS[name]
        for steps in (1, 2, 7, 19):
            for spacing in ("leading", "linspace", "trailing"):
                for prediction in ("epsilon", "v_prediction")[:: 1 if steps == 7 else 2]:
                    if name == "LCMScheduler" and spacing != "leading":
                        continue
                    more = {"timestep_spacing": spacing, "prediction_type": prediction}
                    if name == "PNDMScheduler":
                        more |= {"skip_prk_steps": steps < 4 or spacing == "leading"}
                    if "clip_sample" in has:
                        more |= {"clip_sample": steps == 7}
                    if spacing == "leading":
                        more |= {"steps_offset": 1}
                    yield name, {**SD, **values, **more}, steps
                    kind = {1: None, 2: "karras", 7: "exponential", 19: "beta"}[steps]
                    if kind is not None and f"use_{kind}_sigmas" in has:
                        yield name, {**SD, **values, **more, f"use_{kind}_sigmas": True}, steps
    for name, values in RARE:
        yield name, {**SD, **values}, 7


def test_live():
    """Against diffusers in float64: what is left is the float32 of the tables themselves."""
    warnings.simplefilter("ignore")
    errors = {}
    for sampler, values, steps in grid():
        table = sampler_run(sampler_config({**values, "_class_name": sampler}), steps)
        scheduler, start, expected = live(sampler, values, steps)
        key = f"{sampler} {steps} {values}"
        times = scheduler.timesteps.numpy()
        np.testing.assert_allclose(table.schedule.times, times, rtol=1e-6, atol=2e-5, err_msg=key)
        generator = torch.Generator().manual_seed(0)
        torch.randn((1, 4, 8, 8), generator=generator)

        kind = torch.float32 if sampler == "DPMSolverMultistepScheduler" else torch.float64
        draw = partial(torch.randn, (1, 4, 8, 8), generator=generator, dtype=kind)
        got = simulated(table, start, lambda draw=draw: draw().numpy())
        errors[key] = error(got, expected)
    assert len(errors) > 200
    assert not {key: e for key, e in errors.items() if not e < 3e-6}


def test_black_is_kept_at_timestep_0_too():
    values = {**SD, "_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}
    kept = sampler_run(sampler_config(values), 4).keeping
    assert kept.times[-1] == 0 and kept.thresholds is not None and (kept.thresholds > 0).all()
    last = sampler_run(sampler_config(values), 4, 3).keeping
    assert last.times.tolist() == [0] and last.thresholds is not None
    assert last.thresholds.tolist() == [1], "white is painted in a run of the last step alone"


def test_another_sampler_reads_the_same_file():
    """As `from_config` does: what the file says stays, the rest is the new class's."""
    values = {**SD, "_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True}
    config = chosen(sampler_config(values), "dpm++", sigmas="karras")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        diffusers.PNDMScheduler(**{k: v for k, v in values.items() if k != "_class_name"}).config,
        use_karras_sigmas=True,
    )
    for name in DEFAULTS["DPMSolverMultistepScheduler"]:
        expected = theirs.config[name]
        if name not in ("lambda_min_clipped", "disable_corrector"):
            assert getattr(config.complete(), name) == expected, name


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "dpm++3m", "unipc"])
def test_flows_have_samplers_too(name):
    flow = sampler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    config = chosen(flow, name).complete()
    assert config.is_flow and config.num_train_timesteps == 1000
    start = np.full((1, 1), 0.5)
    got = simulated(sampler_run(config, 50), start, lambda: 0 * start)
    exact = simulated(sampler_run(chosen(flow, "heun"), 200), start, lambda: 0 * start)
    assert abs(got - exact) < (0.015 if name == "euler" else 0.003)


def test_a_single_step_cannot_end_at_a_terminal_level():
    flow = sampler_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1})
    for name in (None, "unipc"):
        with pytest.raises(ConfigError, match=r"shift_terminal=0\.1 .* take at least 2"):
            sampler_run(chosen(flow, name), 1)
        assert np.isfinite(sampler_run(chosen(flow, name), 2).schedule.times).all()


@pytest.mark.parametrize(
    ("values", "asked", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, {"name": "plms"}, "'plms' is no sampler of this model"),
        ({"_class_name": "DDIMScheduler"}, {"sigmas": "karras"}, "DDIMScheduler has no karras"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"name": "ddim"}, "no sampler of a"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"spacing": "leading"}, "no times"),
        (
            {
                "_class_name": "DDIMScheduler",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            {},
            "no finite step",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, {}, "no finite step"),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, **KARRAS}
            | {"lower_order_final": False},
            {},
            "no finite step",
        ),
        (
            {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": 500},
            {},
            "begin at timestep",
        ),
        ({"_class_name": "DDIMScheduler", "beta_end": 7.0}, {}, "beta_end must be from"),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "use_karras_sigmas": True,
                "use_beta_sigmas": True,
            },
            {},
            "only one of",
        ),
    ],
)
def test_what_no_sampler_can_do_is_said(values, asked, words):
    with pytest.raises(ConfigError, match=words):
        sampler_run(chosen(sampler_config(values), **asked), 20)


def test_another_scheduler_is_named(tmp_path):
    file = tmp_path / "scheduler_config.json"
    file.write_text('{"_class_name": "KarrasVeScheduler"}')
    with pytest.raises(ConfigError, match=r"scheduler_config\.json is of KarrasVeScheduler"):
        read_config_json(SamplerConfig, file)


def test_infinity_is_the_limit_that_there_is_not_and_nothing_else(tmp_path):
    file = tmp_path / "scheduler_config.json"
    name = '"_class_name": "DPMSolverMultistepScheduler"'
    file.write_text(f'{{{name}, "lambda_min_clipped": -Infinity}}')
    assert read_config_json(SamplerConfig, file).complete().lambda_min_clipped is None
    for key, value in (("beta_start", "Infinity"), ("lambda_min_clipped", "Infinity")):
        file.write_text(f'{{{name}, "{key}": {value}}}')
        with pytest.raises(ConfigError, match=rf"config\.json: .*{key} must be a number, got inf"):
            read_config_json(SamplerConfig, file)
