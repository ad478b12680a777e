"""Where a pipeline comes from: the embedded model, a diffusers or Orbax folder, BFL's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from fluxjax.checkpoint.lora.scaled_file import scaled_files
from fluxjax.checkpoint.opened_network import OpenNetwork, has_codes
from fluxjax.checkpoint.pipeline_folder import read_config, tokenizer_of
from fluxjax.checkpoint.templates import Part, abstract_params, part_of
from fluxjax.checkpoint.tokenizer_places import open_tokenizers, tokenizer_places
from fluxjax.config import ConfigError, PipelineConfig
from fluxjax.config.choices import FileFamily, SequenceAttention
from fluxjax.families import FLUX
from fluxjax.hub import embedded_adapter, find
from fluxjax.models.lora import adapt
from fluxjax.models.stacking import scan_by_default
from fluxjax.networks import network_of
from fluxjax.parallel.host_memory import streamed
from fluxjax.parallel.mesh import make_mesh, place
from fluxjax.parallel.mesh_shape import MeshShape
from fluxjax.parallel.rules import param_shardings, state_shardings
from fluxjax.parallel.sequence import AXIS, Layout, attention_over
from fluxjax.quantised_kinds import KEEP
from fluxjax.sample.controls import given_controlnets, open_controlnets
from fluxjax.sample.ip_adapter import given_ip_adapters, open_ip_adapters
from fluxjax.sample.loaded_loras import low_rank_of, with_loras
from fluxjax.sample.lora_slots import LoraSlots
from fluxjax.sample.model_files import ModelFiles, open_model_file, open_model_folder
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.quantise_option import parse_quantise
from fluxjax.sample.redux import Redux, open_redux
from fluxjax.sample.refiner import Refiner
from fluxjax.sample.settings import Dtype
from fluxjax.sample.sources import TINY, Sources, absolute
from fluxjax.shapes import Params


def load_pipeline(
    model: str | Path = "tiny",
    *,
    dtype: Dtype | None = None,
    text_encoders: str | Path | None = None,
    vae: str | Path | None = None,
    family: FileFamily | None = None,
    scan_layers: bool | None = None,
    loras: Sequence[str | Path | tuple[str | Path, float]] = (),
    lora_slots: int = 0,
    mesh: Mesh | MeshShape | str | None = None,
    sequence: SequenceAttention = "auto",
    quantise: str = KEEP,
    offload: bool = False,
    stream: bool = False,
    redux: str | Path | None = None,
    refiner: str | Path | None = None,
    controlnet: Any = None,
    ip_adapter: Any = None,
    image_encoder: str | Path | None = None,
) -> Pipeline:
    """Open a model: all its files are checked now, its weights read when they are first needed.

    Args:
      model: "tiny", or with a tool that it has learnt "tiny-edit", "tiny-fill" or "tiny-canny";
        "tiny-pixart", "tiny-sd" or "tiny-video"; a diffusers folder, an Orbax folder, the
        file of a transformer (flux1-*.safetensors or .gguf, Open_Sora_v2.safetensors,
        HunyuanVideo's in anybody's names) or a UNet, which needs the two below unless it
        holds them, or a whole Stable Diffusion in one file. Tokenizers that it lacks are
        the published ones, from the hub. Here and below a hub's name will do as well, such
        as "black-forest-labs/FLUX.1-dev" (see `fluxjax.hub`).
      dtype: of weights and computation; by default float32 on a CPU and bfloat16 elsewhere.
      text_encoders: a folder with text_encoder, text_encoder_2, tokenizer and tokenizer_2, or with
        ComfyUI's files of them, of one in several precisions that in 16 bits. Of a HunyuanVideo
        they tell what it draws from: a language model alone from text, LLaVA from a first frame.
      vae: another autoencoder than the model's own, which a transformer's file lacks: a diffusers
        folder, or an original file (ae.safetensors, hunyuan_vae.safetensors).
      family: whose a single file is, where neither names nor shapes tell it: Stable Diffusion 2's
        of 512 pixels ("sd2"), which predict noise, and those of 768 ("sd2-v") look alike.
      scan_layers: compile one block of each kind and scan over them, or each block for itself,
        which on CPUs runs 1.3 times faster and by default is done for up to 12 blocks.
      loras: files of adapters (LoRA, DoRA, LoKr, LoHa, OFT and others) for the transformer and the
        text encoders, "FILE", "FILE:scale" or (FILE, scale); all of them are in effect.
      lora_slots: a rank that is kept free for adapters which each call of the pipeline chooses, and
        for each picture, with no new compilation: pipe(..., lora=[("FILE", 0.8)]). Not with
        `loras`.
      mesh: spread weights and work over devices, such as "fsdp=4,tensor=2" (see
        `fluxjax.parallel.mesh`); by default all is on the first device. Where several processes
        have joined (`fluxjax.parallel.hosts`) the mesh is of all their devices, by default "", all
        of them are called alike, and all of them get the pictures.
      sequence: how attention works where the mesh splits the tokens of a picture.
      quantise: what weights are on the device, decoded a layer at a time. "keep" leaves those of
        quantised files in their codes; "int8", "nf4" or another of
        `fluxjax.quantised_kinds.LOADED` puts the blocks of the transformer and the text encoders
        into that, "transformer=nf4,text_encoder_2=int8" those of each; "none" decodes all.
      offload: have no other networks on the device than those that are at work: the text encoders
        leave before denoising, the autoencoder comes after it, the modulations of all steps (27 %
        of FLUX.1) are computed first and their weights go. What is needed again is read again.
      stream: keep the transformer's blocks in the host's memory, and bring one at a time. Both draw
        the same picture, and neither goes with a mesh.
      redux: a folder of FLUX.1 Redux, which `redux_image` needs.
      refiner: Stable Diffusion XL's refiner, a folder or a whole file, which draws the last steps
        of each picture (`refiner_start`), with the base model's dtype, mesh and memory; adapters
        are the base model's alone.
      controlnet: a folder or file of a ControlNet, "FOLDER:SCALE" or (FOLDER, SCALE), or a list of
        up to three, which `control` is for. A folder of diffusers' FluxControlNetPipeline has its
        own.
      ip_adapter: the file of an IP-Adapter (XLabs'), "FILE", "FILE:SCALE" or (FILE, SCALE), or a
        list of up to three, which `ip_image` is for, seen by the CLIP vision encoder in the folder
        `image_encoder`.

    Raises FileNotFoundError, ConfigError or ValueError with one sentence naming what is wrong.
    """
    dtype = _known_dtype(dtype)
    tool = embedded_adapter(model)
    path = find(TINY if tool else model, "model", read_config)
    model_family, networks, config, texts = _open_model(path, text_encoders, vae, family)
    kinds = parse_quantise(quantise)
    scaled = scaled_files(loras)
    used = scaled if tool is None else [(tool, 1.0), *scaled]
    networks, config, low_rank = with_loras(networks, config, used)
    config.require_whole(path)
    if stream and scan_layers is False:
        raise ConfigError("stream brings one block at a time: it needs scan_layers")
    scaled_nets = given_controlnets(controlnet)
    if controlnet is None and (own := path / "controlnet").is_dir():
        scaled_nets = [(str(own), 1.0)]
    controlnets = open_controlnets(scaled_nets, config)
    config = replace(config, controlnets=tuple(net.config for net in controlnets))
    denoiser = config.networks[config.denoiser]
    if scan_layers is None:
        most = max(network_of(part).blocks(part) for part in config.networks.values())
        scan_layers = stream or scan_by_default(most)
    tokenizers = tokenizer_places(path, texts, config)
    mesh = _opened_mesh(mesh, denoiser, sequence)
    if mesh is not None and (offload or stream):
        raise ConfigError("offload and stream are for one device: give them or a mesh")
    if lora_slots and used:
        raise ConfigError("lora_slots do not go with loras: choose those by call too")
    slots = _slots(lora_slots, config, scan_layers, mesh) if lora_slots else None
    lora = low_rank_of(low_rank, denoiser, _stacked(denoiser, scan_layers))
    if redux is not None and model_family is not FLUX:
        raise ConfigError(f"FLUX.1 Redux is heard by FLUX.1 alone, and {path} is another model")
    prior = None if redux is None else _open_redux(redux, config, dtype)
    scaled_ip = given_ip_adapters(ip_adapter)
    prompter = open_ip_adapters(scaled_ip, image_encoder, path, config, dtype)
    held, notes = _held(networks, kinds, scan_layers, config.denoiser)
    pipeline = Pipeline(
        model_family,
        config,
        _Loader(
            networks, controlnets, config.denoiser, dtype, scan_layers, lora, mesh, held, stream
        ),
        partial(open_tokenizers, tokenizers, config),
        dtype=dtype,
        scan_layers=scan_layers,
        lora=lora,
        slots=slots,
        mesh=mesh,
        sequence=sequence,
        quantised=held,
        offload=offload,
        stream=stream,
        redux=prior,
        image_prompter=prompter,
        control_scales=[scale for _, scale in scaled_nets],
        sources=Sources(
            quantise=None if quantise == KEEP else quantise,
            family=family,
            controlnet=_with_scales(scaled_nets),
            ip_adapter=_with_scales(scaled_ip),
            image_encoder=_where(image_encoder),
            redux=_where(redux),
            refiner=_where(refiner),
            model=absolute(str(model)),
            text_encoders=_where(text_encoders),
            vae=_where(vae),
            lora=_with_scales(scaled),
        ),
    )
    pipeline.notes += notes
    lacking = [tokenizer_of(name) for name, place in tokenizers.items() if place.published]
    if path.is_dir() and lacking:
        pipeline.notes.append(f"{path} has no {' and no '.join(lacking)}: the published are used")
    if refiner is not None:
        second = load_pipeline(
            refiner,
            dtype=dtype,
            text_encoders=texts if Path(refiner).is_file() else None,
            scan_layers=scan_layers,
            mesh=mesh,
            sequence=sequence,
            quantise=quantise,
            offload=offload,
            stream=stream,
        )
        config.require_refiner(second.config, refiner)
        pipeline.refiner = Refiner(second, pipeline)
    return pipeline


def _known_dtype(dtype: Dtype | None) -> Dtype:
    if dtype is None:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in get_args(Dtype):
        raise ConfigError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    return dtype


def _open_model(
    path: Path,
    text_encoders: str | Path | None,
    vae: str | Path | None,
    family: FileFamily | None,
) -> ModelFiles:
    if path.is_file():
        return open_model_file(path, text_encoders, vae, family)
    if family is not None:
        raise ConfigError(f"family says whose a single file is, and {path} is none")
    if text_encoders is not None:
        raise ConfigError(f"text encoders are given for a single file, and {path} is none")
    return open_model_folder(path, vae)


def _open_redux(redux: str | Path, config: PipelineConfig, dtype: Dtype) -> Redux:
    return open_redux(find(redux, "checkpoint"), config.networks["text_encoder_2"].d_model, dtype)


def _where(path: str | Path | None) -> str | None:
    return None if path is None else absolute(str(path))


def _with_scales(files: Sequence[tuple[str | Path, float]]) -> tuple[str, ...]:
    return tuple(f"{absolute(str(file))}:{scale:g}" for file, scale in files)


def _opened_mesh(
    mesh: Mesh | MeshShape | str | None, denoiser: Any, sequence: SequenceAttention
) -> Mesh | None:
    """The devices that are asked for; with several processes all of them, where nothing is said.

    Raises ConfigError for tokens that cannot be split so.
    """
    if mesh is None and jax.process_count() > 1:
        mesh = ""
    if isinstance(mesh, str | MeshShape):
        mesh = make_mesh(mesh)
    if mesh is None or mesh.shape[AXIS] == 1:
        return mesh
    network = network_of(denoiser)
    if network.token_split is None:
        raise ConfigError(
            f"the tokens of a {network.words} are not split: give a mesh without sequence"
        )
    # Heads that ulysses cannot split are a mistake now.
    layout = Layout(1, 1, mesh.shape[AXIS])
    attention_over(layout, network.token_split.heads(denoiser), sequence, "auto")
    return mesh


def _slots(rank: int, config: PipelineConfig, scan_layers: bool, mesh: Mesh | None) -> LoraSlots:
    places = None if mesh is None else partial(_slot_places, config, mesh)
    templates = {
        name: abstract_params(
            config.networks[name], stacked=_stacked(config.networks[name], scan_layers)
        )
        for name in (config.denoiser, *config.text_encoders)
        if network_of(config.networks[name]).adapter_prefixes
    }
    return LoraSlots(templates, rank, places)


def _slot_places(config: PipelineConfig, mesh: Mesh, component: str, lora: Params) -> Params:
    return state_shardings(config.networks[component], lora, mesh)


@dataclass(frozen=True)
class _Loader:
    """Reads the weights of a pipeline's networks onto their devices."""

    networks: dict[str, OpenNetwork]
    controlnets: Sequence[OpenNetwork]
    denoiser: str
    dtype: Dtype
    scan_layers: bool
    lora: Params | None
    """Of the denoiser."""
    mesh: Mesh | None
    held: dict[str, Params]
    """Shapes of the networks that have weights in codes."""
    stream: bool

    def __call__(self, component: str, part: Part = "all") -> Any:
        if component == "controlnets":
            different = {id(net): net for net in self.controlnets}
            loaded = {key: self._whole(net) for key, net in different.items()}
            return tuple(loaded[id(net)] for net in self.controlnets)
        network, denoises = self.networks[component], component == self.denoiser
        config = network.config
        template = self.held.get(component) or self._template(config)
        template = part_of(template, config, part)
        places: Any = SingleDeviceSharding(jax.devices()[0])
        lora_places = jax.tree.map(lambda _: places, self.lora)
        if self.stream and denoises:
            places = streamed(template)
        if self.mesh is not None:
            places = param_shardings(config, template, self.mesh)
            lora_places = state_shardings(config, self.lora, self.mesh)
        params = network.fill(template, dtype=self.dtype, shardings=places)
        return adapt(params, place(self.lora, lora_places) if denoises else None)

    def _whole(self, network: OpenNetwork) -> Params:
        template = self._template(network.config)
        places: Any = SingleDeviceSharding(jax.devices()[0])
        if self.mesh is not None:
            places = param_shardings(network.config, template, self.mesh)
        return network.fill(template, dtype=self.dtype, shardings=places)

    def _template(self, config: Any) -> Params:
        return abstract_params(config, stacked=_stacked(config, self.scan_layers))


def _held(
    networks: dict[str, OpenNetwork], kinds: dict[str, str], scan_layers: bool, denoiser: str
) -> tuple[dict[str, Params], list[str]]:
    """Shapes of the networks that have weights in codes, and remarks.

    Raises ConfigError where no matrix of the `denoiser` can have the kind that is asked for.
    """
    held, notes = {}, []
    for name, kind in kinds.items():
        if name not in networks:
            continue
        network = networks[name]
        found, mixed = network.template(
            stacked=_stacked(network.config, scan_layers), quantise=kind
        )
        if mixed:
            notes.append(
                f"{len(mixed)} kinds of layers of the {name}, such as {mixed[0]}, have codes of "
                "several forms and are decoded; they keep them with scan_layers=False"
            )
        if name == denoiser:
            network.require_codes(found, kind)
        if has_codes(found):
            held[name] = found
    return held, notes


def _stacked(config: Any, scan_layers: bool) -> bool:
    return scan_layers and bool(network_of(config).scanned)
