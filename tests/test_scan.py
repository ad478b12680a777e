"""One scan runs every sampler: tables of several, against what diffusers recorded step by step."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch_reference import relative_l2

import fluxjax
from fluxjax.families import Conditioning
from fluxjax.sample.denoise import Kept, denoise, in_parts
from fluxjax.sample.executables import Executables
from fluxjax.schedules.flow_euler import flow_euler, sigmas
from fluxjax.schedules.schedule import Schedule, pad, with_gains_in

COMPILED: list[int] = []


def toy(x, t):
    """The recordings' network."""
    return jnp.tanh(0.7 * x + 0.001 * t)


@jax.jit
def scan(state, schedule, noise):
    COMPILED.append(len(state))
    passes = jnp.zeros((len(schedule.times), 0))
    return denoise(toy, schedule.times, state, schedule, passes, noise=noise)


def run(schedule: Schedule, start: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
    """The picture so far after each step."""
    x, padded, seen = jnp.asarray(start, jnp.float32), pad(schedule), []
    state = (x, *[jnp.zeros_like(x)] * (schedule.latents - 1))
    if noise is not None:
        missing = len(padded.times) - len(noise)
        noise = np.pad(noise, [(0, missing)] + [(0, 0)] * (noise.ndim - 1))[None]
    in_parts(
        lambda state, part: scan(state, part, noise),
        state,
        padded,
        on_step=lambda step, state: seen.append(np.asarray(state[0])),
    )
    return np.stack(seen)


@pytest.fixture(scope="module")
def recorded(shared):
    from safetensors.numpy import load_file

    cases = json.loads((shared / "goldens" / "schedulers.json").read_text())["cases"]
    tensors = load_file(shared / "goldens" / "schedulers.safetensors")

    def find(name: str) -> dict:
        case = next(case for case in cases if case["name"] == name)
        wanted = {
            key.split("/", 1)[1]: v for key, v in tensors.items() if key.startswith(f"{name}/")
        }
        return case | wanted

    return find


def same(case: dict, schedule: Schedule) -> None:
    trajectory, drawn = case["trajectory"], None
    if case["noise_drawn_at"]:
        drawn = np.zeros((len(schedule.times), *trajectory.shape[1:]), np.float32)[:, 0]
        drawn[case["noise_drawn_at"]] = case["noise"].reshape(-1, *drawn.shape[1:])
    got = run(schedule, trajectory[0], drawn)
    assert got.shape == trajectory[1:].shape
    for ours, theirs in zip(got, trajectory[1:], strict=True):
        assert relative_l2(ours, theirs) <= 2e-6


@pytest.mark.parametrize("name", ["flow_flux_dynamic", "flow_sd3_shift3"])
def test_flow_euler(recorded, name):
    """Without matrices: what FLUX runs."""
    case = recorded(name)
    schedule = flow_euler(case["sigmas"])
    same(case, schedule._replace(times=case["timesteps"].astype(np.float32)))


def test_flow_stochastic(recorded):
    """x' = (1 - s') (x - s v) + s' noise: a column of noise."""
    case = recorded("flow_stochastic")
    s, following = case["sigmas"][:-1].astype(float), case["sigmas"][1:].astype(float)
    rows = np.stack([1 - following, -(1 - following), following], axis=-1)[:, None]
    times = case["timesteps"].astype(np.float32)
    same(case, Schedule(times, s.astype(np.float32), s > 0, None, rows.astype(np.float32)))


def test_ancestral_euler_with_scaled_inputs(recorded):
    case = recorded("euler_ancestral_leading")
    s, following = case["sigmas"][:-1].astype(float), case["sigmas"][1:].astype(float)
    up = np.sqrt(following**2 * (s**2 - following**2) / s**2)
    down = np.sqrt(following**2 - up**2)
    rows = np.stack([np.ones_like(s), down - s, up], axis=-1)[:, None].astype(np.float32)
    scales = (1 / np.sqrt(s**2 + 1)).astype(np.float32)
    times = case["timesteps"].astype(np.float32)
    same(case, Schedule(times, np.ones_like(scales), s > 0, scales, rows))


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_karras"])
def test_two_latents_for_dpmpp_2m(recorded, name):
    """The second is the picture predicted by the step before."""
    case = recorded(name)
    s = case["sigmas"].astype(float)
    alpha = 1 / np.sqrt(1 + s**2)
    sigma = s * alpha
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha / sigma)
    matrices = np.zeros((len(s) - 1, 2, 4))
    for i in range(len(s) - 1):
        x, last, m = np.eye(4)[[0, 1, 2]]
        predicted = (x - sigma[i] * m) / alpha[i]
        h = log_snr[i + 1] - log_snr[i]
        slope = 0 * x
        if 0 < i < len(s) - 2:
            slope = (predicted - last) * h / (log_snr[i] - log_snr[i - 1])
        decay = alpha[i + 1] * np.expm1(-h)
        moved = sigma[i + 1] / sigma[i] * x - decay * (predicted + slope / 2)
        matrices[i] = moved, predicted
    times, ones = case["timesteps"].astype(np.float32), np.ones(len(matrices), np.float32)
    same(case, Schedule(times, ones, ones > 0, None, matrices.astype(np.float32)))


def test_three_latents_for_a_method_of_adams():
    """Third order against a loop; one program for every table of three latents and length."""
    steps = np.linspace(1.0, 0.05, 14)
    matrices, before = np.zeros((13, 3, 5)), len(COMPILED)
    for i, h in enumerate(np.diff(steps)):
        weights = ((1.0, 0, 0), (1.5, -0.5, 0), (23 / 12, -16 / 12, 5 / 12))[min(i, 2)]
        matrices[i] = [
            [1, h * weights[1], h * weights[2], h * weights[0], 0],
            [0, 0, 0, 1, 0],
            [0, 1, 0, 0, 0],
        ]
    one = np.ones(13, np.float32)
    schedule = Schedule(
        steps[:-1].astype(np.float32), one, one > 0, None, matrices.astype(np.float32)
    )
    start = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    x, slopes, expected = start.astype(np.float64), [], []
    for i, h in enumerate(np.diff(steps)):
        slopes = [np.tanh(0.7 * x + 0.001 * steps[i]), *slopes]
        weights = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12))[min(i, 2)]
        x = x + h * sum(w * s for w, s in zip(weights, slopes, strict=False))
        expected.append(x)
    assert relative_l2(run(schedule, start), np.stack(expected)) <= 1e-6
    run(schedule._replace(matrices=matrices * np.float32(0.5)), start)
    assert COMPILED[before:] == [3]


def test_what_is_kept_goes_along_with_its_noise():
    """As diffusers' FluxInpaintPipeline does after each step."""
    draw = np.random.default_rng(1).standard_normal
    picture, noise = (draw((1, 6, 2)).astype(np.float32) for _ in range(2))
    mask = np.array([1, 1, 0, 0, 0.5, 1], np.float32).reshape(1, 6, 1)
    levels = np.array([1, 0.7, 0.4, 0], np.float32)
    schedule = flow_euler(levels)._replace(keep=np.stack([1 - levels[1:], levels[1:]], -1))
    x = noise
    for level, following in itertools.pairwise(levels):
        x = x + (following - level) * np.tanh(0.7 * x + 0.001 * level)
        x = (1 - mask) * (following * noise + (1 - following) * picture) + mask * x
    passes = jnp.zeros((4, 0))
    padded = jax.tree.map(jnp.asarray, pad(schedule))
    kept = Kept(*map(jnp.asarray, (mask, picture, noise)))
    (got,) = denoise(toy, padded.times, (jnp.asarray(noise),), padded, passes, kept=kept)
    np.testing.assert_allclose(got, x, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got[:, 2:4], picture[:, 2:4])


def test_passes_are_added_up_by_weights_of_each_step():
    """Three of them, as InstructPix2Pix: empty + s (text - image) + i (image - empty)."""
    x = np.random.default_rng(2).standard_normal((2, 5)).astype(np.float32)
    shifts = (0.3, -0.2, 0.9)

    def network(x, t):
        each = jnp.split(x, 3)
        return jnp.concatenate(
            [toy(part, t) + shift for part, shift in zip(each, shifts, strict=True)]
        )

    levels, passes = np.array([1, 0.6, 0], np.float32), np.array([[5, 1.5], [2, 0.5]], np.float32)
    expected = x
    for (level, following), (text, image) in zip(itertools.pairwise(levels), passes, strict=True):
        said, seen, empty = (
            np.tanh(0.7 * expected + 0.001 * level) + s for s in np.asarray(shifts)
        )
        guided = empty + text * (said - seen) + image * (seen - empty)
        expected = expected + (following - level) * guided
    schedule = jax.tree.map(jnp.asarray, flow_euler(levels))
    (got,) = denoise(network, schedule.times, (jnp.asarray(x),), schedule, jnp.asarray(passes))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def bfloat16(tensor):
    return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)


@pytest.mark.parametrize("rounding", ["diffusers", "bfl"])
def test_bfloat16_steps_round_as_diffusers_and_bfl_do(rounding):
    """Element by element. diffusers: the step size and the product in bfloat16, the sum in float32,
    the state in bfloat16. BFL: the step size is a Python number, which is not rounded.

    FluxPipeline has the noise levels on the latents' device; there a GPU rounds as a CPU does.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / 28, 28)))
    draw = np.random.default_rng(3).standard_normal
    outputs, start = (
        torch.from_numpy(draw(shape).astype(np.float32)).to(torch.bfloat16)
        for shape in ((28, 1, 256, 64), (1, 256, 64))
    )
    x = start
    for i, output in enumerate(outputs):
        if rounding == "diffusers":
            x = scheduler.step(output, scheduler.timesteps[i], x, return_dict=False)[0]
        else:
            x = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]).item() * output
    assert x.dtype == torch.bfloat16

    def ours(table: Schedule):
        schedule = jax.tree.map(jnp.asarray, table)
        (got,) = jax.jit(denoise, static_argnums=0)(
            lambda x, one: one, bfloat16(outputs), (bfloat16(start),), schedule, jnp.zeros((28, 0))
        )
        assert got.dtype == jnp.bfloat16
        return got.astype(jnp.float32)

    exact = flow_euler(scheduler.sigmas.numpy())
    rounded = with_gains_in(exact, jnp.bfloat16)
    good, other = (rounded, exact) if rounding == "diffusers" else (exact, rounded)
    np.testing.assert_array_equal(ours(good), x.float().numpy())
    assert (ours(other) != x.float().numpy()).mean() > 0.01, "the rule matters"


def test_where_pytorch_rounds_a_step_size():
    """A tensor without axes that stands before takes the other's dtype; one that stands behind, or
    a Python number, is multiplied in float32 on CPUs."""
    draw = np.random.default_rng(4).standard_normal(4096)
    output, size = torch.from_numpy(draw).to(torch.bfloat16), torch.tensor(-0.0357142)
    rounded = (size.to(torch.bfloat16).float() * output.float()).to(torch.bfloat16)
    exact = (size * output.float()).to(torch.bfloat16)
    assert (rounded != exact).float().mean() > 0.1
    assert (size * output == rounded).all()
    assert (output * size == exact).all() and (size.item() * output == exact).all()


def test_the_pipeline_steps_as_its_rounding_says(monkeypatch):
    seen = {}

    def executable(self, name, state, drawn, *, rounding):
        seen[rounding] = np.asarray(drawn.schedule.gains)
        raise InterruptedError

    monkeypatch.setattr(Executables, "get", executable)
    pipe = fluxjax.load_pipeline("tiny", dtype="bfloat16")
    states = Conditioning(np.zeros((1, 4, 128), np.float32), None, np.zeros((1, 128), np.float32))
    for rounding in ("diffusers", "bfl", "none"):
        with pytest.raises(InterruptedError):
            pipe.denoise(states, np.zeros((1, 16, 4, 4)), steps=4, rounding=rounding)
    exact = flow_euler(sigmas(4, 4, pipe.config.scheduler)).gains
    for rounding, gains in seen.items():
        expected = exact.astype(jnp.bfloat16) if rounding == "diffusers" else exact
        np.testing.assert_array_equal(gains, expected.astype(np.float32))
    assert len(seen) == 3 and (seen["diffusers"] != seen["bfl"]).any()
