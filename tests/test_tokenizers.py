"""Our tokenizers give transformers' ids."""

import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
import transformers

from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer

CLIP, T5 = "clip-vit-large-patch14", "t5-v1_1-xxl"
LOADERS = {CLIP: load_clip_tokenizer, T5: load_t5_tokenizer}


def prompts() -> list[str]:
    fixed = [
        "",
        " ",
        "\n",
        "a",
        "A red Circle.",
        "  two   spaces\t\ttab ",
        "line\nbreak\r\nand more\n\n",
        "café naïve Ångström façade",
        unicodedata.normalize("NFD", "café naïve Ångström"),
        "猫が窓辺で眠っている",
        "一只红色的狐狸在雪地里",
        "고양이 사진",
        "кошка на окне",
        "قطة على النافذة",
        "😀 👩‍👩‍👧‍👦 🏳️‍🌈 ✨",
        "don't I'll we've they're she'd it's I'm DON'T",
        "$9.99 #1 50% (a:1.2) [b] {c} <d> e_f g-h i/j \\k |l| ~ ^ `",
        "ﬁ ﬀ ½ ① Ａ Ｂ … – — ’",
        "<|endoftext|> inside <|startoftext|> text <|ENDOFTEXT|><|STARTOFTEXT|>",
        "</s> <pad> <unk> <extra_id_0>x<extra_id_99> <extra_id_100>",
        "\u200b\u00a0\u3000\ufeff",
        "İstanbul ǅ ß ΑΣ",
        "a" * 600,
        "word " * 700,
        "long " + "红 " * 400,
        "\x00\x01 control",
        "1234567890 3.14159 1e-5",
        "a▁b ▁ c",
        "x\u0301\u0302\u0303",
    ]
    rng = random.Random(0)
    pieces = [
        *fixed[3:20],
        "a photo of",
        "studio",
        "lighting,",
        "4k",
        "ultra-detailed",
        "\n",
        "🎨",
        "绘画",
    ]
    mixed = [
        "".join(rng.choice(pieces) + rng.choice([" ", "", ", "]) for _ in range(rng.randint(1, 40)))
        for _ in range(200 - len(fixed))
    ]
    return fixed + mixed


def reference(name, folder):
    kind = transformers.CLIPTokenizer if name == CLIP else transformers.T5TokenizerFast
    return kind.from_pretrained(folder)


def same_ids(name, folder, lengths):
    theirs, ours = reference(name, folder), LOADERS[name](folder)
    texts = prompts()
    assert len(texts) == 200
    for length in lengths:
        expected = theirs(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        got = ours(texts, length)
        np.testing.assert_array_equal(got.input_ids, expected.input_ids)
        np.testing.assert_array_equal(got.attention_mask, expected.attention_mask)


@pytest.mark.parametrize(("name", "lengths"), [(CLIP, (77,)), (T5, (256, 512))])
def test_ids_equal_transformers(shared, name, lengths):
    same_ids(name, shared / "tokenizers" / name, lengths)


def test_t5_from_spiece_alone(shared, tmp_path):
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(shared / "tokenizers" / T5 / name, tmp_path)
    same_ids(T5, tmp_path, (512,))


def test_clip_from_tokenizer_json_alone(shared, tmp_path):
    reference(CLIP, shared / "tokenizers" / CLIP).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "vocab.json").exists()
    same_ids(CLIP, tmp_path, (77,))


def test_garment_prompt(shared):
    golden = json.loads((shared / "tokenizers" / "garment_prompt_token_ids.json").read_text())
    clip = load_clip_tokenizer(shared / "tokenizers" / CLIP)([golden["prompt"]])
    t5 = load_t5_tokenizer(shared / "tokenizers" / T5)([golden["prompt"]], 512)
    assert clip.input_ids[0].tolist() == golden["clip_input_ids"]
    assert t5.input_ids[0].tolist() == golden["t5_input_ids"]
    assert t5.removed == ("",)
    assert golden["prompt"].endswith(clip.removed[0]) and "commercial-grade" in clip.removed[0]


@pytest.mark.parametrize("name", [CLIP, T5])
def test_removed_text_is_the_prompts_own(shared, name):
    tokenizer = LOADERS[name](shared / "tokenizers" / name)
    ids = tokenizer(["one Two three Four", "one"], 4)
    assert ids.removed == (("three Four" if name == CLIP else "Four"), "")
    assert ids.input_ids.shape == (2, 4)


def test_bad_folders_are_refused(tmp_path):
    for load in LOADERS.values():
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="it needs"):
            load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff\xff not a model")
    with pytest.raises(ValueError, match="damaged"):
        load_t5_tokenizer(tmp_path)
