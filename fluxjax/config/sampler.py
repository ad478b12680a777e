"""Any sampler's scheduler_config.json, as the classes of diffusers read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fluxjax.config.base import check_types, in_range, require
from fluxjax.config.choices import MAX_STEPS, Respacing, Spacing
from fluxjax.config.scheduler import SchedulerConfig

SamplerClass = Literal[
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
]
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """What a file gives; None stands for the default of the class, see `complete`.

    The names are diffusers', so that one class's file can be read as another's, as `from_config`
    does: what a file leaves out has the default of the class that reads it.
    """

    sampler: SamplerClass = "DDIMScheduler"
    """diffusers' class."""
    num_train_timesteps: int | None = None
    """Timesteps of training, from least noise to most."""
    beta_start: float | None = None
    """Variance of the noise that the first timestep adds."""
    beta_end: float | None = None
    """That of the last."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """How the variances go from one to the other: evenly, by their square roots, or so that the
    share of the picture falls as a squared cosine."""
    trained_betas: tuple[float, ...] | None = None
    """The variances themselves, in place of the three fields before."""
    rescale_betas_zero_snr: bool | None = None
    """Whether the last timestep is noise alone."""
    prediction_type: Prediction | None = None
    """What the network says: the noise, v, the picture, or the velocity of a flow."""
    timestep_spacing: Spacing | None = None
    """How the steps of a run lie among those of training."""
    steps_offset: int | None = None
    """Added to timesteps of leading spacing."""
    use_karras_sigmas: bool | None = None
    """Whether levels are spaced as by Karras et al. 2022, equation 5, with rho 7."""
    use_exponential_sigmas: bool | None = None
    """Whether the logarithms of levels are spaced evenly."""
    use_beta_sigmas: bool | None = None
    """Whether levels lie at quantiles of Beta(0.6, 0.6)."""
    use_lu_lambdas: bool | None = None
    """Whether levels are spaced as by Lu et al. 2022, evenly in the logarithm of signal to
    noise."""
    sigma_min: float | None = None
    """The least level of respaced ones; None is that of the last step."""
    sigma_max: float | None = None
    """The highest of respaced ones; None is that of the first step."""
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None
    """Where the last step ends: free of noise, or at the first timestep of training."""
    interpolation_type: Literal["linear", "log_linear"] | None = None
    """How levels between training's timesteps are found."""
    timestep_type: Literal["discrete", "continuous"] | None = None
    """Whether the network is told timesteps, or a quarter of the logarithm of the level."""
    set_alpha_to_one: bool | None = None
    """Whether the last step ends free of noise, or at the first timestep's level."""
    clip_sample: bool | None = None
    """Whether predicted pictures are clamped."""
    clip_sample_range: float | None = None
    """To plus and minus this."""
    thresholding: bool | None = None
    """Whether predicted pictures are clamped to a quantile of their own (Saharia et al. 2022)."""
    dynamic_thresholding_ratio: float | None = None
    """That quantile."""
    sample_max_value: float | None = None
    """What the quantile may be at most; below 1 it is 1."""
    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"] | None
    ) = None
    """The variance of the noise that DDPM adds, or what a learned one is."""
    skip_prk_steps: bool | None = None
    """Whether PNDM starts without Runge-Kutta."""
    solver_order: int | None = None
    """Order of a multistep solver: how many predictions a step combines."""
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] | None = None
    """Which solver of that order."""
    algorithm_type: (
        Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"] | None
    ) = None
    """DPM-Solver (of the noise) or DPM-Solver++ (of the picture), each also with noise added
    (sde)."""
    lower_order_final: bool | None = None
    """Whether the last steps of a short run are of lower order."""
    euler_at_final: bool | None = None
    """Whether the last step is of first order."""
    lambda_min_clipped: float | None = None
    """The least logarithm of signal to noise that steps are spaced over."""
    predict_x0: bool | None = None
    """Whether UniPC combines predicted pictures, and not noise."""
    disable_corrector: tuple[int, ...] | None = None
    """Steps that UniPC's corrector leaves out."""
    original_inference_steps: int | None = None
    """Of LCM: steps of its distillation, among which those of a run are taken."""
    timestep_scaling: float | None = None
    """Of LCM: by what timesteps are multiplied in its boundary condition."""
    use_flow_sigmas: bool | None = None
    """Whether levels are those of a flow."""
    flow_shift: float | None = None
    """How far these are moved towards noise."""
    shift: float | None = None
    """How far levels of a flow are moved towards noise."""
    use_dynamic_shifting: bool | None = None
    """Whether the number of the picture's tokens decides that."""
    time_shift_type: Literal["exponential", "linear"] | None = None
    """Whether the number so found is a logarithm or the shift itself."""
    base_image_seq_len: int | None = None
    """Tokens at which the logarithm of a dynamic shift is base_shift."""
    max_image_seq_len: int | None = None
    """Tokens at which it is max_shift; a straight line goes through both."""
    base_shift: float | None = None
    """Logarithm of the shift of a small picture."""
    max_shift: float | None = None
    """That of a large one."""
    shift_terminal: float | None = None
    """The level of the last step, to which all are stretched."""
    invert_sigmas: bool | None = None
    """Whether levels go from the picture to noise."""
    stochastic_sampling: bool | None = None
    """Whether each step draws new noise."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, lowest, highest in (
            ("num_train_timesteps", 2, 10**5),
            ("beta_start", 1e-9, 1.0),
            ("beta_end", 1e-9, 1.0),
            ("steps_offset", 0, MAX_STEPS),
            ("solver_order", 1, 3),
            ("original_inference_steps", 1, MAX_STEPS),
            ("sigma_min", 1e-9, 1e9),
            ("sigma_max", 1e-9, 1e9),
            ("clip_sample_range", 1e-6, 1e6),
            ("dynamic_thresholding_ratio", 0, 1),
            ("sample_max_value", 1, 1e6),
            ("shift", 1e-6, 1e6),
            ("flow_shift", 1e-6, 1e6),
            ("shift_terminal", 0, 0.999),
            ("base_image_seq_len", 1, 2**31),
            ("max_image_seq_len", 1, 2**31),
            ("base_shift", -100, 100),
            ("max_shift", -100, 100),
        ):
            if getattr(self, name) is not None:
                in_range(self, lowest, highest, name)
        if self.trained_betas is not None:
            require(
                2 <= len(self.trained_betas) <= 10**5
                and all(0 < b < 1 for b in self.trained_betas),
                "SamplerConfig.trained_betas must be numbers between 0 and 1",
            )

    def given(self, name: str) -> Any:
        """A value of the file, or of its class; None where neither has it."""
        value = getattr(self, name)
        return DEFAULTS[self.sampler].get(name) if value is None else value

    @property
    def is_flow(self) -> bool:
        """Whether it samples a model of flow matching."""
        return self.sampler.startswith("FlowMatch") or self.prediction_type == "flow_prediction"

    def complete(self) -> SamplerConfig:
        """With the class's defaults for what is None, and without what the class does not have.

        Raises ConfigError for what the class refuses.
        """
        defaults = DEFAULTS[self.sampler]
        kept = {name: getattr(self, name) for name in defaults}
        values = {name: defaults[name] if v is None else v for name, v in kept.items()}
        config = SamplerConfig(sampler=self.sampler, **values)
        spaced = [
            name
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
            if getattr(config, name)
        ]
        require(len(spaced) < 2, f"only one of {' and '.join(spaced)} can be true")
        return config

    def mu(self, image_tokens: int) -> float:
        """Logarithm of the dynamic shift of a picture of `image_tokens`."""
        return SchedulerConfig(
            **{
                name: getattr(self, name)
                for name in LINE_OF_SHIFTS
                if getattr(self, name) is not None
            }
        ).mu(image_tokens)

    @property
    def respacing(self) -> Respacing:
        """How the noise levels of a completed configuration are spaced."""
        if self.use_karras_sigmas:
            return "karras"
        if self.use_lu_lambdas:
            return "lu"
        if self.use_exponential_sigmas:
            return "exponential"
        return "beta" if self.use_beta_sigmas else "plain"


_TABLE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
_FLOW = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
LINE_OF_SHIFTS: dict[str, Any] = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""By which the size of a picture decides about a dynamic shift."""
_FLOW_LEVELS: dict[str, Any] = {
    **LINE_OF_SHIFTS,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    **_SIGMAS,
}
_SOLVER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}

DEFAULTS: Mapping[SamplerClass, Mapping[str, Any]] = {
    "DDPMScheduler": {
        **_TABLE,
        **_LEADING,
        **_CLIP,
        **_THRESHOLD,
        **_ZERO_SNR,
        "variance_type": "fixed_small",
    },
    "DDIMScheduler": {
        **_TABLE,
        **_LEADING,
        **_CLIP,
        **_THRESHOLD,
        **_ZERO_SNR,
        "set_alpha_to_one": True,
    },
    "PNDMScheduler": {**_TABLE, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {
        **_TABLE,
        **_LINSPACE,
        **_SIGMAS,
        **_ZERO_SNR,
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_TABLE, **_LINSPACE, **_ZERO_SNR},
    "HeunDiscreteScheduler": {
        **_TABLE,
        **_LINSPACE,
        **_SIGMAS,
        **_CLIP,
        "clip_sample": False,
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    "DPMSolverMultistepScheduler": {
        **_TABLE,
        **_LINSPACE,
        **_SIGMAS,
        **_THRESHOLD,
        **_ZERO_SNR,
        **_FLOW,
        **_SOLVER,
        "use_lu_lambdas": False,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "lambda_min_clipped": None,
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_TABLE,
        **_LINSPACE,
        **_SIGMAS,
        **_THRESHOLD,
        **_ZERO_SNR,
        **_FLOW,
        **_SOLVER,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": (),
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "LCMScheduler": {
        **_TABLE,
        **_LEADING,
        **_CLIP,
        **_THRESHOLD,
        **_ZERO_SNR,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "FlowMatchEulerDiscreteScheduler": {**_FLOW_LEVELS, "stochastic_sampling": False},
    # In diffusers without a dynamic shift and other spacings: here it steps along Euler's levels.
    "FlowMatchHeunDiscreteScheduler": _FLOW_LEVELS,
}
