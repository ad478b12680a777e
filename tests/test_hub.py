"""Models by their names on a hub: only what is needed, from the cache without a network."""

import json
from functools import partial
from pathlib import Path

import pytest
from loopback_hub import COMMIT, run_python, serve

from fluxjax.config import ConfigError
from fluxjax.hub import Name, choose, find, hub_name, tiny_folder

FIND = "import sys; from fluxjax.hub import find; print(find(*sys.argv[1:]))"
DEV = [
    "README.md",
    "LICENSE.md",
    "flux1-dev.safetensors",
    "ae.safetensors",
    "dev_grid.jpg",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.onnx",
    "text_encoder_2/model.safetensors.index.json",
    "text_encoder_2/pytorch_model.bin.index.json",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bf16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
]
NAME = Name("owner/name", "main")


def test_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("black-forest-labs/FLUX.1-dev") == ("black-forest-labs/FLUX.1-dev", "main", "")
    assert hub_name("o/n@v1.0") == ("o/n", "v1.0", "")
    assert hub_name("o/n@refs/pr/7/a/b.safetensors") == ("o/n", "refs/pr/7", "a/b.safetensors")
    assert hub_name("city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf") == (
        "city96/FLUX.1-dev-gguf",
        "main",
        "flux1-dev-Q4_K_S.gguf",
    )
    assert hub_name("o/n/my file.safetensors") == ("o/n", "main", "my file.safetensors")
    for path in (
        "tiny",
        "model.safetensors",
        "/o/n",
        "o/n--m",
        "./o/n",
        "../n",
        "~/o",
        "o/n/m",
        "o/n/",
        "o/",
        "out/style.safetensors",
        "o\\n",
        "o/n@",
        "o/../n.safetensors",
    ):
        assert hub_name(path) is None, path
        assert find(path) == (tiny_folder() if path == "tiny" else Path(path).expanduser())
    (tmp_path / "o" / "n").mkdir(parents=True)
    assert hub_name("o/n") is None and find("o/n") == Path("o/n")


def test_only_what_is_needed_is_chosen():
    chosen = set(choose(DEV, NAME, "model"))
    assert set(DEV) - chosen == {
        "README.md",
        "LICENSE.md",
        "flux1-dev.safetensors",
        "ae.safetensors",
        "dev_grid.jpg",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/model.onnx",
        "text_encoder_2/pytorch_model.bin.index.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    }
    assert choose(DEV, NAME, "vae") == [
        "vae/config.json",
        "vae/diffusion_pytorch_model.bf16.safetensors",
    ]
    encoders = choose(DEV, NAME, "text encoders")
    assert {name.split("/")[0] for name in encoders} == {
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    }
    files = ["clip_l.safetensors", "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"]
    assert choose([*files, "README.md"], NAME, "text encoders") == files[:2]
    repacked = [f"split_files/text_encoders/{file}" for file in files]
    others = ["split_files/vae/clip_l.safetensors", "split_files/diffusion_models/x.safetensors"]
    assert choose([*others, *repacked], NAME, "text encoders") == repacked[:2]
    assert not [n for n in choose(DEV, NAME, "configuration") if "safetensors" in n]
    one = Name("owner/name", "main", "flux1-dev.safetensors")
    assert choose(DEV, one, "model") == ["flux1-dev.safetensors"]
    assert choose(["a/style.safetensors", "README.md"], NAME, "lora") == ["a/style.safetensors"]
    # A LoRA's repository as a training run leaves it; PEFT's, whose configuration counts.
    run = ["pytorch_lora_weights.safetensors", "checkpoint-9/pytorch_lora_weights.safetensors"]
    assert choose(run, NAME, "lora") == run[:1]
    peft = ["adapter_model.safetensors", "adapter_config.json"]
    for kind in ("lora", "checkpoint"):
        assert choose([*peft, "README.md"], NAME, kind) == peft
    one = Name("owner/name", "main", f"a/{peft[0]}")
    assert choose([f"a/{name}" for name in peft], one, "lora") == [f"a/{name}" for name in peft]
    # `convert` carries along what PyTorch's pipelines list in their index.
    assert set(choose(DEV, NAME, "checkpoint")) - chosen == {
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    }
    # As XL has another autoencoder, Stable Diffusion 3.5 the files of text encoders.
    others = ["vae_1_0/config.json", "vae_1_0/x.safetensors", "text_encoders/t5xxl.safetensors"]
    others += ["image_processor/preprocessor_config.json"]
    assert set(choose([*DEV, *others], NAME, "model")) - chosen == {others[-1]}
    # As Stable Diffusion 3 has its T5: shards of a variant.
    variant = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    variant += ["model.safetensors.index.fp16.json"]
    assert choose(["config.json", *variant, "x.bin"], NAME, "vae") == ["config.json", *variant]
    assert choose(["config.json", *variant, "x.safetensors"], NAME, "vae")[1:] == ["x.safetensors"]
    assert choose(["config.json", "x.safetensors", "x.bin"], NAME, "vae") == [
        "config.json",
        "x.safetensors",
    ]


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        (["a.safetensors", "b.safetensors"], "lora", "name one of its files: owner/name/a.safet"),
        (["a.safetensors", "b.safetensors"], "model", "is not a diffusers folder"),
        (["pytorch_model.bin"], "model", "it has no .safetensors or .gguf"),
        (["a.safetensors"], "text encoders", "has no text_encoder"),
        (["a.safetensors"], "configuration", "has no model_index.json"),
        (
            ["t5-xxl-Q3.gguf", "t5-xxl-Q8.gguf"],
            "text encoders",
            r"\(t5-xxl-Q3.gguf, .*: download on",
        ),
    ],
)
def test_a_repository_that_will_not_do_is_named(files, kind, words):
    with pytest.raises(ConfigError, match=f"owner/name.*{words}"):
        choose(files, NAME, kind)


def checked(folder: Path) -> dict[str, Path]:
    """A Stable Diffusion with a safety checker, of which nothing is read."""
    own = tiny_folder().with_name("tiny-sd")
    parts = [own, *(part for part in own.iterdir() if part.is_dir())]
    found = [file for part in parts for file in part.iterdir() if file.is_file()]
    files = {file.relative_to(own).as_posix(): file for file in found}
    index = json.loads(files["model_index.json"].read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    for name, text in (
        ("model_index.json", json.dumps(index)),
        ("safety_checker/config.json", "{}"),
        ("safety_checker/model.safetensors", "weights"),
        ("feature_extractor/preprocessor_config.json", '{"size": 224}'),  # no other's content
    ):
        files[name] = folder / name.replace("/", " ")
        files[name].write_text(text)
    return files


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repositories")
    tiny = {
        p.relative_to(tiny_folder()).as_posix(): p for p in tiny_folder().rglob("*") if p.is_file()
    }
    for name in ("pytorch_model.bin", "README.md", "flux1-tiny.safetensors"):
        (folder / name).write_bytes(b"not to be downloaded")
        tiny[name] = folder / name
    tiny["transformer/diffusion_pytorch_model.bin"] = folder / "pytorch_model.bin"
    weights = tiny["vae/diffusion_pytorch_model.safetensors"]
    loras = {"one.safetensors": weights, "two.safetensors": weights}
    (folder / "adapter_config.json").write_text("{}")
    loras["peft/adapter_model.safetensors"] = weights
    loras["peft/adapter_config.json"] = folder / "adapter_config.json"
    files = {"someone/tiny": tiny, "someone/loras": loras, "someone/gated": tiny}
    files["someone/sd"] = checked(folder)
    with serve(files, gated=("someone/gated",)) as running:
        yield running


@pytest.fixture
def ask(hub, tmp_path):
    return partial(run_python, hub, tmp_path)


def test_a_model_is_downloaded_once_and_found_without_a_network(ask, hub):
    code, folder, said = ask("-c", FIND, "someone/tiny")
    assert code == 0, said
    wanted = choose(hub.files["someone/tiny"], NAME, "model")
    assert sorted(hub.downloads) == sorted(wanted), "each needed file once, and no other"
    assert f"downloading someone/tiny: {len(wanted)} file(s)" in said and "%|" not in said
    for name in wanted:
        assert (Path(folder) / name).read_bytes() == hub.files["someone/tiny"][name].read_bytes()
    before = hub.requests
    assert ask("-c", FIND, "someone/tiny") == (0, folder, "")
    assert not hub.downloads and hub.requests <= before + 2, "asked whether it is the same"
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert ask("-c", FIND, "someone/tiny", **offline)[:2] == (0, folder)
    assert ask("-c", FIND, f"someone/tiny@{COMMIT}")[1] == folder


VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (VAE, lambda x: x[:-1] + b"?", f"{VAE} of someone/tiny came damaged (its hash is not"),
        (VAE, lambda x: x[:-5], "someone/tiny: {} sent another size than it had said: try again"),
        ("", lambda x: x[:-5], "{} does not answer about someone/tiny as a hub does (Expecting"),
        ("", lambda x: b'{"a": 1}', "{} does not answer about someone/tiny as a hub does"),
        ("", lambda x: x.replace(b"a" * 40, b"../../evil"), "{} does not answer about someone/tin"),
    ],
)
def test_what_comes_damaged_is_not_used(ask, hub, file, damage, words):
    hub.damaged[file] = damage
    code, _, said = ask("-c", MISTAKES, "someone/tiny", "vae")
    hub.damaged.clear()
    assert code == 2 and f"error: {words.format(hub.endpoint)}" in said
    assert not said.count("Traceback")
    code, folder, said = ask("-c", FIND, "someone/tiny", "vae")
    assert code == 0 and VAE in hub.downloads, said
    assert (Path(folder) / VAE).read_bytes() == hub.files["someone/tiny"][VAE].read_bytes()


def test_half_a_model_is_none_without_a_network(ask, hub):
    """Not even where only the file is missing that says with how many steps it is sampled."""
    hub.damaged["fluxjax.json"] = lambda content: content[:-1]
    assert ask("-c", MISTAKES, "someone/tiny")[0] == 2
    hub.damaged.clear()
    code, _, said = ask("-c", MISTAKES, "someone/tiny", HF_HUB_OFFLINE="1")
    assert code == 2 and "Traceback" not in said, said


def test_a_safety_checker_is_downloaded_for_convert_alone(ask, hub):
    """Which carries it along; it said that the folder, as downloaded, lacks it."""
    assert ask("-c", FIND, "someone/sd")[0] == 0
    assert not [name for name in hub.downloads if name.startswith(("safety", "feature"))]
    code, _, said = ask("-m", "fluxjax.convert", "someone/sd", "here")
    assert code == 0, said
    assert {name.split("/")[0] for name in hub.downloads} == {"safety_checker", "feature_extractor"}


def test_a_file_of_several(ask, hub):
    code, file, said = ask("-c", FIND, "someone/loras/two.safetensors", "lora")
    assert code == 0 and file.endswith("/two.safetensors"), said
    assert hub.downloads == ["two.safetensors"]
    code, file, said = ask("-c", FIND, "someone/loras/peft/adapter_model.safetensors", "lora")
    assert code == 0 and Path(file).with_name("adapter_config.json").is_file(), said


MISTAKES = """
import sys
from fluxjax import cli
from fluxjax.hub import find
cli.run(lambda: print(find(*sys.argv[1:])))
"""


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        (["someone/missing"], {}, ["there is no file or folder someone/missing here", "hf auth"]),
        (["someone/gated"], {}, ["someone/gated is gated: accept its terms at http", "HF_TO"]),
        (["someone/tiny@v9"], {}, ["someone/tiny has no revision v9"]),
        (["someone/tiny/x.safetensors"], {}, ["has no file x.safetensors"]),
        (["someone/loras", "lora"], {}, ["someone/loras/one.safetensors, someone/loras/peft/ada"]),
        (["someone/tiny"], {"HF_HUB_OFFLINE": "1"}, ["HF_HUB_OFFLINE is set", "cache"]),
        (["someone/tiny"], {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached", "cache"]),
    ],
)
def test_what_is_not_to_be_had_is_one_sentence(ask, arguments, changes, words):
    code, printed, said = ask("-c", MISTAKES, *arguments, **changes)
    said = [line for line in said.splitlines() if not line.startswith("downloading")]
    assert code == 2 and not printed and len(said) == 1, said
    assert said[0].startswith("error: ") and all(word in said[0] for word in words), said


def test_a_token_opens_a_gated_model(ask):
    assert ask("-c", FIND, "someone/gated", "vae", HF_TOKEN="good")[0] == 0


VERBS = """
import json, sys
from importlib import import_module
from fluxjax import cli
def verbs():
    for verb, *arguments in json.loads(sys.argv[1]):
        import_module(f"fluxjax.{verb}.__main__").main(arguments)
cli.run(verbs)
"""


@pytest.mark.slow
def test_every_verb_takes_a_name(ask, tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "someone/nothing"\n')
    tiny, flux = "someone/tiny", "flux-bfl/flux1-dev.safetensors"
    size = ("--width", "64", "--height", "64", "--steps", "2", "--seed", "1")
    others = ("--vae", tiny, "--text-encoders", tiny, "--out", "others")
    verbs = [
        ("sample", "a star", "--model", tiny, *size),
        ("sample", "--like", "out/a-star-1.png", "--out", "again"),
        ("convert", tiny, "flux-bfl", "--to", "bfl"),
        ("sample", "a star", "--model", flux, *others, *size),
        ("plan", tiny, "--chips", "H100"),
        ("train", "recipe.toml", "--data.source", "."),
    ]
    code, said, mistake = ask("-c", VERBS, json.dumps(verbs))
    assert code == 2 and "someone/nothing" in mistake.splitlines()[-1], mistake
    assert said.startswith("out/a-star-1.png") and "H100" in said, mistake
    drawn, again = (tmp_path / folder / "a-star-1.png" for folder in ("out", "again"))
    assert drawn.read_bytes() == again.read_bytes()
    assert (tmp_path / "others" / "a-star-1.png").is_file()
