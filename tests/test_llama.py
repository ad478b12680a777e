"""Language models as text encoders against transformers, their templates and tokenizers."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from parameter_trees import parameter_count, to_theirs
from torch_reference import from_torch, relative_l2

from fluxjax.checkpoint import engine
from fluxjax.checkpoint.component_json import config_json, parse_config
from fluxjax.checkpoint.detect import detect_network, infer_config
from fluxjax.checkpoint.templates import abstract_params
from fluxjax.config import LLAMA3_8B, QWEN3_4B, ConfigError, LlamaConfig
from fluxjax.diff.layers import captured, pair_layers, recorded
from fluxjax.models.stacking import stack_layers
from fluxjax.networks.llama import LLAMA
from fluxjax.parallel.apply import apply_on
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.rules import param_shardings
from fluxjax.text.prompt_template import VIDEO, templated
from fluxjax.text.tokenizers import load_tokenizer

TINY = LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    stops_after=2,
)
TINIES = {"llama": TINY, "qwen3": replace(TINY, qk_norm=True, head_dim=12, stops_after=None)}


@cache
def torch_model(config):
    torch.manual_seed(0)
    values = config_json(replace(config, stops_after=None))
    cls = getattr(transformers, values["architectures"][0])
    model = cls(cls.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim == 1 else 0.05))
    return model


def run_theirs(config, inputs, dtype=torch.float32):
    x = {name: torch.from_numpy(value).long() for name, value in inputs.items()}
    model = torch_model(config).to(dtype)
    with torch.no_grad():
        output = model(**x, output_hidden_states=True)
    model.to(torch.float32)
    stops = config.stops_after
    last = output.last_hidden_state if stops is None else output.hidden_states[stops]
    return last.float().numpy()


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "qwen3"])
def test_every_layer_equals_transformers(name):
    """Heads that share keys and values, padding, and layers that are never read."""
    config, inputs = TINIES[name], LLAMA.inputs(TINIES[name])
    with recorded(torch_model(config)) as layers:
        expected = run_theirs(config, inputs)
    params, module = from_torch(torch_model(config), config), LLAMA.build(config)
    assert ("layers_2" in params, "norm" in params) == (name == "qwen3",) * 2
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    got, state = jax.jit(lambda p, x: module.apply({"params": p}, **x, **capture))(params, inputs)
    pairs = pair_layers(layers, captured(state["intermediates"]))
    assert len(pairs) > 12 * config.kept_layers
    errors = {pair.name: relative_l2(pair.ours, pair.expected) for pair in pairs}
    assert not {layer: error for layer, error in errors.items() if not error < 1e-5}
    assert relative_l2(got, expected) < 1e-5


@pytest.mark.slow
def test_on_a_mesh_scanned_and_in_bfloat16():
    config = TINIES["qwen3"]
    inputs = LLAMA.inputs(config)
    expected = run_theirs(config, inputs)
    params = stack_layers(from_torch(torch_model(config), config))
    mesh, module = make_mesh("data=2,fsdp=2,tensor=2"), LLAMA.build(config, scan_layers=True)
    placed = jax.device_put(params, param_shardings(config, params, mesh))
    got = jax.jit(lambda p, x: apply_on(mesh, module, {"params": p}, **x))(placed, inputs)
    assert relative_l2(got, expected) < 1e-5
    low = LLAMA.build(config, scan_layers=True, dtype=jnp.bfloat16)
    ours = jax.jit(lambda p, x: low.apply({"params": p}, **x))(params, inputs)
    theirs = relative_l2(run_theirs(config, inputs, torch.bfloat16), expected)
    assert relative_l2(ours.astype(jnp.float32), expected) <= 1.5 * theirs


def test_what_is_read_of_every_form_of_file():
    """A model alone, one with its head, and LLaVA's, beside what sees pictures."""
    model = {name: tensor.numpy() for name, tensor in torch_model(TINY).state_dict().items()}
    extra = np.zeros((2, 2), np.float32)
    files = {
        "published": model,
        "causal": {f"model.{n}": a for n, a in model.items()} | {"lm_head.weight": extra},
        "llava": {f"language_model.model.{n}": a for n, a in model.items()}
        | {"language_model.lm_head.weight": extra, "vision_tower.x.weight": extra}
        | {"multi_modal_projector.linear_1.weight": extra},
    }
    template = abstract_params(TINY)
    expected = engine.to_ours(model, LLAMA.dialect("published").table(TINY), template)
    for name, arrays in files.items():
        network, dialect = detect_network({n: a.shape for n, a in arrays.items()})
        assert (network, dialect.name) == (LLAMA, name)
        with pytest.raises(ConfigError, match=r"cannot be told from shapes.*config\.json"):
            infer_config(network, dialect, {n: a.shape for n, a in arrays.items()})
        got = engine.to_ours(arrays, dialect.table(TINY), template)
        assert jax.tree.all(jax.tree.map(np.array_equal, got, expected))
    published = to_theirs(expected, LLAMA.dialect("causal").table(TINY))
    assert published.keys() < files["causal"].keys()


def test_real_sizes(tmp_path):
    """7.07 of Llama's 7.51 billion parameters are read."""
    whole = replace(LLAMA3_8B, stops_after=None)
    counts = [parameter_count(abstract_params(c, stacked=True)) for c in (LLAMA3_8B, whole)]
    assert [round(n / 1e9, 2) for n in counts] == [7.07, 7.51]
    shapes = {n: leaf.shape for n, leaf in engine.published_leaves(abstract_params(whole)).items()}
    assert infer_config(LLAMA, LLAMA.dialects[0], shapes) == whole
    leaves = engine.published_leaves(abstract_params(LLAMA3_8B))
    kept = {n: leaf.shape for n, leaf in leaves.items()}
    assert infer_config(LLAMA, LLAMA.dialects[0], kept) == LLAMA3_8B
    assert LLAMA.flops is not None
    assert round(LLAMA.flops(LLAMA3_8B, 0, 351) / 1e12, 2) == 4.65
    for config in (LLAMA3_8B, QWEN3_4B, *TINIES.values()):
        assert parse_config(LlamaConfig, config_json(config), tmp_path / "config.json") == config
    values = config_json(LLAMA3_8B)
    scaled = values | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(ConfigError, match="rope_type='llama3' is not supported"):
        parse_config(LlamaConfig, scaled, tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"num_attention_heads=4 must be a multiple of .*=3"):
        replace(TINY, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="stops_after must be from 1 to num_hidden_layers=3"):
        replace(TINY, stops_after=4)


@cache
def small_tokenizer():
    """Bytes, Llama 3's special tokens, and its beginning of text before every prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {x: i for i, x in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["begin_of_text", "start_header_id", "end_header_id", "eot_id", "pad"]
    backend.add_special_tokens([AddedToken(f"<|{s}|>", special=True) for s in special])
    first = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=[first, "$A"], special_tokens=[(first, backend.token_to_id(first))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=first, pad_token="<|pad|>"
    )


def test_templates_are_read_as_diffusers_has_them(tmp_path):
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video

    theirs = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    assert (VIDEO.text, VIDEO.crop) == (theirs["template"], theirs["crop_start"])
    small_tokenizer().save_pretrained(tmp_path)
    ours = load_tokenizer("LlamaTokenizerFast", tmp_path)
    prompts = ["a {red} cat", "", "waves " * 900]
    for length in (256, 4000):
        ids = templated(ours, prompts, max_sequence_length=length)
        expected = small_tokenizer()(
            [theirs["template"].format(p) for p in prompts],
            max_length=length + VIDEO.crop,
            padding="max_length",
            truncation=True,
            return_tensors="np",
        )
        np.testing.assert_array_equal(ids.input_ids, expected["input_ids"])
        np.testing.assert_array_equal(ids.attention_mask, expected["attention_mask"])
    assert ids.removed[:2] == ("", "") and ids.removed[2].endswith("waves")
    with pytest.raises(ValueError, match=r"tokenizer.json is another model's.*vocab_size\) is 200"):
        load_tokenizer("LlamaTokenizerFast", tmp_path, 200)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer("LlamaTokenizerFast", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer("LlamaTokenizerFast", tmp_path)
