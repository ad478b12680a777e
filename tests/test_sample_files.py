"""What sampling reads and writes besides pixels: names, prompts files, formats and records."""

import hashlib
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxjax.checkpoint.lora.scaled_file import scaled_files
from fluxjax.config import TINY, ConfigError
from fluxjax.sample import prompts_file
from fluxjax.sample.file_names import check_pattern, file_name
from fluxjax.sample.given_options import check, destination
from fluxjax.sample.given_pictures import read_given
from fluxjax.sample.options import Options
from fluxjax.sample.parameters_line import parameters_text
from fluxjax.sample.picture_formats import encode_picture, read_record
from fluxjax.sample.picture_record import differences, find_all, record_of, remembered
from fluxjax.sample.prompts_file import read_prompts
from fluxjax.sample.redux import read_heard
from fluxjax.sample.settings import Settings
from fluxjax.sample.sources import Sources, changed, hashes_of

STAR = Settings(prompt="a star", seed=3, width=64, height=48, steps=4)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder, and a cache of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A  Red, Circle!", "a-red-circle-3.png"),
        ("Ein Kätzchen — größer", "ein-kätzchen-größer-3.png"),
        ("赤い丸 ٣", "赤い丸-٣-3.png"),
        ("नमस्ते दुनिया", "नमस्ते-दुनिया-3.png"),
        ("../../etc/passwd", "etc-passwd-3.png"),
        ("\x1b[2J\x7f\n\u202e", "2j-3.png"),
        ("!?", "picture-3.png"),
    ],
)
def test_names_stay_readable_in_every_script(prompt, name):
    assert file_name(replace(STAR, prompt=prompt)) == name


def test_names_follow_a_pattern_within_what_file_systems_take():
    pattern = "{model}_{number:03}-{width}x{height}-{steps}-{prompt}.JPG"
    check_pattern(pattern)
    made = file_name(STAR, pattern, number=7, model="flux dev")
    assert made == "flux-dev_007-64x48-4-a-star.JPG"
    assert file_name(STAR, "{date}")[:2] == "20"
    long = file_name(replace(STAR, prompt="赤" * 500), "{prompt}" * 9 + "-{seed:020}")
    assert len(long.encode()) < 240 and long.endswith("-00000000000000000003.png")


@pytest.mark.parametrize(
    "pattern",
    [
        "{x}",
        "{prompt!r}",
        "{seed:9999999999}",
        "{prompt.__class__}",
        "a/b",
        "\\a",
        "..",
        ".a",
        "",
        "{",
        "{0}",
        "{}",
        "a\x1b",
        "{prompt:05}",
        "{seed:>5}",
    ],
)
def test_patterns_that_name_no_file_in_the_folder_are_refused(pattern):
    with pytest.raises(ConfigError, match="--name"):
        check_pattern(pattern)


def prompts(content: bytes | str, name: str = "list.txt"):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(Path(name))


@pytest.mark.parametrize(
    "content",
    [
        "a star\n\n  a ring\u2028 \n",
        b"\xef\xbb\xbfa star\r\na ring\xe2\x80\xa8",
        "\ufeffa star\ra ring\u2028\r".encode("utf-16-le"),
        '"a star"\r\n\r\n{"prompt": "a ring"}',
        b'\xef\xbb\xbf{"prompt": "a star"}\n"a ring"',
    ],
)
def test_lists_of_prompts_as_every_editor_saves_them(content):
    found = [line.values["prompt"] for line in prompts(content)]
    assert [text.strip("\u2028 ") for text in found] == ["a star", "a ring"]


def test_a_line_may_have_settings_loras_a_reference_and_a_number(here, tmp_path):
    line = {"prompt": "a", "number": 2, "lora": "x.safetensors:0.5", "reference": "../p.png"}
    lines = prompts(json.dumps(line) + '\n{"lora": ["a", "b:2"]}\n{"lora": []}', "l.jsonl")
    assert lines[0].number == 2 and lines[0].lora == (f"{here}/x.safetensors:0.5",)
    assert lines[0].values == {"prompt": "a", "reference": f"{here}/../p.png"}
    assert lines[1].lora == (f"{here}/a", f"{here}/b:2") and lines[2].lora == ()
    assert prompts('"x"')[0].lora is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('"a"\n\n{"prompt": 3}', "line 3: prompt must be a text, got 3"),
        ('"a"\nb', "line 2: not JSON"),
        ('a\n{"prompt": "b"}', "line 2: JSON, but the first line is plain text"),
        (b"a\r\nb\xff", "line 2: not UTF-8 (byte 0xff at 2)"),
        ("", "has no prompts"),
        (b"\xef\xbb\xbf\n\r\n", "has no prompts"),
        ('{"number": 0}', "line 1: number must be an integer of at least 1, got 0"),
        ('{"number": true}', "line 1: number must be an integer"),
        ('{"lora": 3}', "line 1: lora must be a text or a list of texts, got 3"),
        ('{"lora": ["~nosuchuser/a"]}', "line 1: there is no user of the name"),
        ('{"colour": "red"}', "line 1: 'colour' is no setting"),
        ('{"width": ' + "9" * 5000 + "}", "line 1: not JSON"),
        ('{"width": ' + "9" * 4000 + "}", "line 1: width must be from 1 to 16384, got 999"),
        ('{"guidance": ' + "9" * 400 + "}", "line 1: guidance must be a number, got inf"),
        ('{"prompt": ' + "[" * 100_000 + "}", "line 1: not JSON"),
        ('{"prompt": "\\ud800"}', "line 1: prompt is not Unicode text: U+D800 at character 1"),
        ('{"seed": 1e400}', "line 1: seed must be an integer, got inf"),
    ],
)
def test_every_mistake_in_a_prompts_file_names_its_line(content, words):
    name = "l.jsonl" if isinstance(content, str) and content.startswith(("{", '"')) else "l.txt"
    with pytest.raises(ConfigError) as mistake:
        prompts(content, name)
    assert words in str(mistake.value) and len(str(mistake.value)) < 900


def test_a_device_without_an_end_is_no_list_of_prompts(monkeypatch):
    """Of /dev/zero and `yes |` no more is read than prompts may have."""
    monkeypatch.setattr(prompts_file, "MAX_BYTES", 2**20)
    with pytest.raises(ConfigError, match="/dev/zero has more than the 1 MiB that prompts may"):
        read_prompts(Path("/dev/zero"))


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize((64, 48))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")],
)
def test_every_format_carries_the_record_and_the_parameters(name, kind):
    record = {"settings": {"prompt": "ü 中 \x7f \n \u2028"}}
    carried = picture()
    carried.info["comment"] = "of somebody else"
    Path(name).write_bytes(encode_picture(carried, Path(name).suffix, record, "ü 中\nSteps: 4"))
    assert read_record(Path(name)) == record
    with Image.open(name) as opened:
        assert opened.format == kind and "comment" not in opened.info
        off = np.abs(np.asarray(opened, float) - np.asarray(picture(), float)).mean()
        assert off == 0 if kind == "PNG" else 0 < off < 3
        comment = opened.getexif().get_ifd(0x8769).get(0x9286, b"")
        text = opened.info.get("parameters") or comment.removeprefix(b"UNICODE\0").decode(
            "utf-16-be"
        )
    assert text == "ü 中\nSteps: 4"
    Path(name).write_bytes(encode_picture(picture(), Path(name).suffix))
    assert b"fluxjax" not in Path(name).read_bytes()
    with pytest.raises(ConfigError, match=r"does not say how it was made.*save_picture"):
        read_record(Path(name))


def test_a_record_that_a_jpeg_cannot_hold_is_said_before_it_is_written():
    with pytest.raises(ConfigError, match="longer than such a file holds"):
        encode_picture(picture(), ".jpg", {"prompt": "word " * 20_000})
    assert len(encode_picture(picture(), ".png", {"prompt": "word " * 20_000})) > 100_000


def test_parameters_are_as_other_programs_read_them():
    settings = replace(STAR, prompt="a, b\nSteps: 9", negative_prompt="dark\x1b", true_cfg=2.5)
    text = parameters_text(settings, TINY, 'my "model", 2', "1.0", {"style": "0123456789abcdef"})
    assert text == (
        "a, b Steps: 9\n"
        "Negative prompt: dark\n"
        "Steps: 4, Sampler: Euler, Schedule type: Simple, CFG scale: 2.5, Distilled CFG Scale: "
        '3.5, Seed: 3, Size: 64x48, Model: "my \\"model\\", 2", Lora hashes: '
        '"style: 0123456789ab", Version: fluxjax 1.0'
    )


def saved(name: str, record: object) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_picture(picture(), path.suffix, record))  # pyright: ignore
    return path


DEEP: object = []
for _ in range(900):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"settings": {"width": 65536, "height": 65536}}, "width must be from 1 to 16384"),
        ({"settings": {"steps": 10**400}}, "steps must be from 1 to 1000"),
        ({"settings": {"guidance": 10**400}}, "guidance must be a number, got inf"),
        ({"settings": {"seed": -1}}, "seed must be from 0"),
        ({"settings": {"prompt": DEEP}}, "prompt must be a text"),
        ({"settings": {"\x1b[2J" * 1000: 1}}, "is no setting"),
        ({"settings": "x"}, "its settings must be an object"),
        ({"settings": {}, "model": 3}, "its model must be a text, got 3"),
        ({"settings": {}, "lora": "x"}, "its lora must be a list of texts"),
        ({"settings": {}, "lora": ["a"] * 1000}, "its lora must be a list of texts"),
        ({"settings": {}, "sha256": {"model": 3}}, "its sha256 must be an object of texts"),
        ({"settings": {}, "unrepeatable": "a\x1bb"}, "cannot be repeated: 'a\\x1bb'"),
        ({}, "its settings must be an object"),
    ],
)
def test_hostile_records_are_refused_at_once_in_a_sentence(record, words):
    path = saved("x.png", record)
    begun = time.process_time()
    with pytest.raises(ConfigError) as mistake:
        check(Options(like=path))
    assert time.process_time() - begun < 2
    assert words in str(mistake.value) and len(str(mistake.value)) < 900


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' + "9" * 5000 + "}", '"\\ud800', "NaN"])
def test_records_that_are_no_json_are_refused_at_once(text):
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("fluxjax", text)
    picture().save("x.png", pnginfo=texts)
    with pytest.raises(ConfigError, match=r"x\.png: what it says .* is damaged"):
        read_record(Path("x.png"))


def test_surrogates_and_other_kinds_of_picture_are_refused():
    data = encode_picture(picture(), ".png", {"settings": {"prompt": "a", "prompt_2": "b"}})
    with pytest.raises(ConfigError, match="not a picture"):
        Path("x.png").write_bytes(data[:20])
        read_record(Path("x.png"))
    picture().save("x.gif")
    with pytest.raises(ConfigError, match="not a picture"):
        read_record(Path("x.gif"))
    text = '{"settings": {"prompt": "\\ud800"}}'
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_itxt("fluxjax", text)
    picture().save("y.png", pnginfo=texts)
    with pytest.raises(ConfigError, match=r"prompt is not Unicode text: U\+D800"):
        remembered(Path("y.png"))


def made_with(*loras: Path, out: str = "out/a.png", reference: Path | None = None) -> Path:
    settings = replace(STAR, reference=None if reference is None else str(reference))
    sources = Sources(lora=tuple(f"{path.absolute()}:0.5" for path in loras))
    return saved(out, record_of(settings, sources, sources.hashes(), "float32", Path(out).parent))


def test_pictures_name_files_without_telling_where_they_lie(here, tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    near, far, photo = here / "in" / "near.st", tmp_path / "secret" / "far.st", tmp_path / "p.png"
    for path in (near, far, photo):
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
    drawn = made_with(near, far, reference=photo)
    assert str(tmp_path).encode() not in drawn.read_bytes() and b"secret" not in drawn.read_bytes()
    record = read_record(drawn)
    assert record["lora"] == ["../in/near.st:0.5", "far.st:0.5"]
    assert record["settings"]["reference"] == "p.png"
    assert record["sha256"]["lora 2"] == hashlib.sha256(b"far.st").hexdigest()
    # The one who drew it finds them again; so does one who has them beside the picture.
    sources, pictures = find_all(remembered(drawn), {}, every=False)
    assert sources.lora == (f"{near}:0.5", f"{far}:0.5")
    assert pictures == {"reference": str(photo)}
    stranger = tmp_path / "elsewhere"
    stranger.mkdir()
    (stranger / "a.png").write_bytes(drawn.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(stranger / "cache"))
    for name in ("near.st", "far.st", "p.png"):
        (stranger / name).write_text(name)
    sources, pictures = find_all(remembered(stranger / "a.png"), {}, every=False)
    assert [one.split("/")[-1] for one in sources.lora] == ["near.st:0.5", "far.st:0.5"]
    assert pictures == {"reference": str(stranger / "p.png")}
    (stranger / "far.st").unlink()
    with pytest.raises(ConfigError, match=r"made with the LoRA 'far\.st', which is not .* --lora"):
        find_all(remembered(stranger / "a.png"), {}, every=False)
    assert find_all(remembered(stranger / "a.png"), {"lora": ("x",)}, every=False)[0].lora == ()


@pytest.mark.parametrize(
    "where", ["/etc/hostname", "../../secret.st", "../../../../../etc/hostname"]
)
def test_a_strangers_picture_opens_only_the_usual_places_unless_told_to(here, tmp_path, where):
    (tmp_path / "secret.st").write_text("secret")
    drawn = saved("out/a.png", {"settings": {"reference": where}, "model": "tiny"})
    with pytest.raises(ConfigError, match=r"usual places.*--reference.*--like-paths"):
        find_all(remembered(drawn), {}, every=False)
    if (here / "out" / where).exists():
        opened = find_all(remembered(drawn), {}, every=True)[1]
        assert opened["reference"] == os.path.normpath(here / "out" / where)
    for bad in ("x" * 5000, "a\0b", "~nosuchuser/x"):
        drawn = saved("out/b.png", {"settings": {}, "lora": [bad]})
        with pytest.raises(ConfigError):
            find_all(remembered(drawn), {}, every=True)


def test_what_has_changed_is_named(here):
    lora = here / "style.st"
    lora.write_text("one")
    said = remembered(made_with(lora))
    sources, _ = find_all(said, {}, every=False)
    assert differences(said, sources.hashes(), ["model", "lora 1"]) == []
    before = lora.stat()
    lora.write_text("two")
    os.utime(lora, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert differences(said, sources.hashes(), ["model", "lora 1"]) == ["lora 1"]
    assert differences(said, sources.hashes(), ["model"]) == []
    # Of two that bear the name, the one with the hash.
    (here / "out" / "style.st").write_text("one")
    assert find_all(said, {}, every=False)[0].lora == (f"{here}/out/style.st:0.5",)


def test_an_adapters_folder_is_its_weights_and_its_alpha(here):
    folder = here / "adapter"
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        (folder / name).write_text(name)
    said = remembered(made_with(folder))
    sources, _ = find_all(said, {}, every=False)
    (folder / "README.md").write_text("of no account")
    assert differences(said, sources.hashes(), ["lora 1"]) == []
    (folder / "adapter_config.json").write_text("another alpha")
    assert differences(said, sources.hashes(), ["lora 1"]) == ["lora 1"]


def test_every_part_of_a_model_has_its_hash(here):
    model = here / "model"
    for name in ("transformer/w.safetensors", "tokenizer/vocab.json", "scheduler/s.json"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_text(name)
    index = {
        "_class_name": "F",
        "transformer": ["a", "b"],
        "tokenizer": ["a", "b"],
        "scheduler": ["a", "b"],
        "image_encoder": [None, None],
    }
    (model / "model_index.json").write_text(json.dumps(index))
    before = hashes_of(str(model), "model")
    assert set(before) == {"transformer", "tokenizer", "scheduler", "index"}
    for name in ("transformer/w.safetensors", "tokenizer/vocab.json", "scheduler/s.json"):
        (model / name).write_text("changed")
        now = hashes_of(str(model), "model")
        part = name.split("/")[0]
        assert [key for key in now if now[key] != before[key]] == [part]
        (model / name).write_text(name)
    # What a folder is given for alone counts, also for pictures that remember all of it.
    assert set(hashes_of(str(model), "text_encoders")) == {"tokenizer"}
    then = {f"text_encoders {name}": digest for name, digest in before.items()}
    now = {f"text_encoders {name}": digest for name, digest in before.items()}
    assert not changed(then, {**now, "text_encoders transformer": "another"}, "text_encoders")
    assert changed(then, {**now, "text_encoders tokenizer": "another"}, "text_encoders")


def test_of_comfyuis_folder_text_encoders_have_hashes(here):
    """Those in 16 bits, where there are some; nothing else that lies there."""
    folder = here / "text_encoders"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    counted = ("clip_l.safetensors", "t5xxl_fp16.safetensors", "llava_llama3_Q4_K_M.gguf")
    others = ("t5xxl_fp8_e4m3fn.safetensors", "umt5_xxl.gguf", "qwen.safetensors", "notes.txt")
    for name in counted + others:
        (folder / name).write_text(name)

    def hashes():
        return hashes_of(str(folder), "text_encoders")

    before = hashes()
    assert set(before) == {"tokenizer", "files"}
    for name in others:
        (folder / name).write_text("changed")
    assert hashes() == before
    for name in counted:
        (folder / name).write_text("changed")
        assert hashes()["files"] != before["files"]
        (folder / name).write_text(name)


def test_a_file_beside_the_folders_counts(here):
    """As `convert --to bfl` leaves weights; the folders have the configurations."""
    model = here / "model"
    for name in ("transformer/config.json", "vae/config.json", "flux1-dev.safetensors"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_text("vae")
    (model / "ae.safetensors").write_text("not read")
    index = {"_class_name": "F", "transformer": ["a", "b"], "vae": ["a", "b"]}
    (model / "model_index.json").write_text(json.dumps(index))
    before = hashes_of(str(model), "model")
    assert set(before) == {"transformer", "vae", "files", "index"}
    (model / "flux1-dev.safetensors").write_text("changed")
    (model / "ae.safetensors").write_text("changed")
    now = hashes_of(str(model), "model")
    assert [key for key in now if now[key] != before[key]] == ["files"]
    assert set(hashes_of(str(model), "vae")) == {"vae"}


def test_where_pictures_go(here, tmp_path):
    assert destination(Options(out=Path("a/b"))) == (Path("a/b"), None)
    assert destination(Options(out=Path("a/b.JPG"))) == (Path("a"), Path("a/b.JPG"))
    (here / "album.png").mkdir()
    assert destination(Options(out=Path("album.png"))) == (Path("album.png"), None)
    with pytest.raises(ConfigError, match="so does --name"):
        destination(Options(out=Path("b.png"), name="{seed}"))
    (here / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        destination(Options(out=Path("file/x")))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tinny", "there is no model folder .*tinny; did you mean tiny?"),
        ("flux1-def.safetensors", r"no model file .*; did you mean flux1-dev\.safetensors?"),
        ("x/y/z", "there is no model folder .*z$"),
        ("x/y/my_FLUX.1-dev", "there is no model folder .*my_FLUX.1-dev$"),
    ],
)
def test_a_misspelt_model_is_told_what_may_be_meant(here, model, words):
    (here / "flux1-dev.safetensors").write_text("")
    with pytest.raises(FileNotFoundError, match=words):
        check(Options(prompt=("a",), model=model))


@pytest.mark.parametrize("name", ["image", "mask", "control", "reference", "ip_image", "Redux"])
def test_pictures_of_python_that_cannot_be_used_are_named(name):
    whole = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(whole, "BMP")
    cut = io.BytesIO(whole.getvalue()[:2000])
    for picture, why in (
        (Image.new("F", (40, 30)), "32-bit values"),
        (Image.open(cut), "cannot be decoded"),
    ):
        with pytest.raises(ConfigError, match=f"this picture cannot be the .*{name}: it .*{why}"):
            read_heard(picture) if name == "Redux" else read_given(Settings(), {name: picture})


def test_scales_of_python_are_numbers(tmp_path):
    picture = Image.new("RGB", (4, 4))
    for given in ((picture, float("nan")), [(picture, "a")], [(str(tmp_path), None)]):
        with pytest.raises(
            ConfigError, match=r"its scale must be a number within 1e\+30, got (nan|'a'|None)"
        ):
            read_heard(given)
    for given in ((tmp_path, float("inf")), [(tmp_path, "much")], ["a:0.5", f"{tmp_path}:nan"]):
        with pytest.raises(
            ConfigError, match=r"must be a number within 1e\+30, got (inf|'much'|nan)"
        ):
            scaled_files(given)
    for given in (3, [(tmp_path,)], [(tmp_path, 1.0, 2.0)]):
        with pytest.raises(ConfigError, match="or a list of these"):
            scaled_files(given)
        with pytest.raises(ConfigError, match="or a list of these"):
            read_heard(given)


def test_the_record_has_the_hash_of_what_says_how_much_an_adapter_counts(here):
    folder = here / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    alone = hashes_of(str(folder / "adapter_model.safetensors"), "lora 1")
    found = []
    for alpha in (8, 16):
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.append(hashes_of(str(folder / "adapter_model.safetensors"), "lora 1"))
    assert found[0].keys() == {"", "config"} != alone.keys() == {""}
    assert found[0][""] == found[1][""] and found[0]["config"] != found[1]["config"]
