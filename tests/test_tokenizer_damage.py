"""Damaged and swapped tokenizer folders are a sentence, also where the Rust library would panic."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest

from fluxjax.config import TINY as TINY_CONFIG
from fluxjax.sample.loading import load_pipeline
from fluxjax.text import tokenizers
from fluxjax.text.sentencepiece_file import check_charsmap, read_sentencepiece
from fluxjax.text.tokenizers import (
    _WHOLE_MAPS,
    load_clip_tokenizer,
    load_t5_tokenizer,
    undamaged,
)
from fluxjax.train.encoders import folder_encoders

TINY = Path(__file__).parents[1] / "fluxjax" / "assets" / "tiny"


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def double_array(units: list[int], texts: bytes) -> bytes:
    body = b"".join(unit.to_bytes(4, "little") for unit in units)
    return len(body).to_bytes(4, "little") + body + texts


def charsmaps() -> dict[str, bytes]:
    """Where the library's own search would look outside of the map, and panic."""
    root = [0] * 256
    leaf = [0] * 512
    leaf[0] = 1 << 10  # children at 1 ^ character
    leaf[1 ^ ord("a")] = ord("a") | 256 | ((1 ^ ord("a") ^ 300) << 10)  # its value at 300
    outside = [*leaf]
    outside[300] = 1 << 31 | 99
    inside_a_character = [*leaf]
    inside_a_character[300] = 1 << 31 | 1
    far = [*root]
    far[0] = 2**20 << 10
    return {
        "empty": b"",
        "cut": b"\x08\0\0\0",
        "odd": b"\x03\0\0\0abc",
        "one unit": double_array([0], b"a\0"),
        "leads away": double_array(far, b"a\0"),
        "value outside": double_array(outside, b"a\0"),
        "value inside a character": double_array(inside_a_character, "é\0".encode()),
        "texts not UTF-8": double_array(root, b"\xff\0"),
    }


@pytest.mark.parametrize("name", charsmaps())
def test_a_crafted_character_map_is_refused(name, capfd):
    with pytest.raises(ValueError, match=r"character map|utf-8"):
        check_charsmap(charsmaps()[name])
    assert not capfd.readouterr().err


def test_the_character_maps_of_t5_and_of_our_own_model_are_whole(shared):
    known = set()
    for folder in (shared / "tokenizers" / "t5-v1_1-xxl", TINY / "tokenizer_2"):
        _, charsmap = read_sentencepiece(folder / "spiece.model")
        assert len(charsmap) > 100_000
        check_charsmap(charsmap)
        known.add(hashlib.sha256(charsmap).hexdigest())
    assert known == _WHOLE_MAPS


def test_a_character_map_with_one_bit_changed_is_looked_through(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(tokenizers, "check_charsmap", looked.append)
    shutil.copytree(TINY / "tokenizer_2", tmp_path / "tokenizer_2")
    load_t5_tokenizer(tmp_path / "tokenizer_2")
    assert not looked
    path = tmp_path / "tokenizer_2" / "tokenizer.json"
    values = json.loads(path.read_text())
    (part,) = [
        p
        for p in values["normalizer"].get("normalizers", [values["normalizer"]])
        if p["type"] == "Precompiled"
    ]
    charsmap = bytearray(base64.b64decode(part["precompiled_charsmap"]))
    charsmap[-2] ^= 1
    part["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    path.write_text(json.dumps(values))
    load_t5_tokenizer(tmp_path / "tokenizer_2")
    assert looked == [bytes(charsmap)]


def test_a_panic_of_the_library_is_a_sentence():
    class PanicException(BaseException):
        pass

    words = "tokenizer_2 is damaged: index out of"
    with pytest.raises(ValueError, match=words), undamaged("tokenizer_2"):
        raise PanicException("index out of bounds")
    for other in (KeyboardInterrupt, SystemExit):
        with pytest.raises(other), undamaged("tokenizer_2"):
            raise other


def test_a_number_without_end_in_a_sentencepiece_model(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(b"\xff" * 3_000_000)
    begun = time.process_time()
    with pytest.raises(ValueError, match="damaged"):
        read_sentencepiece(path)
    path.write_bytes(b"\x0a" + varint(2**40) + b"a")
    with pytest.raises(ValueError, match="damaged"):
        read_sentencepiece(path)
    assert time.process_time() - begun < 3


def test_a_list_of_merges_that_is_cut_short_is_not_a_shorter_one(tmp_path):
    """What is left would read prompts as other tokens, and draw other pictures without a word."""
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "merges.txt"
    lines = file.read_text().splitlines(keepends=True)
    load_clip_tokenizer(tmp_path / "tokenizer")
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"tokenizer is damaged: no merge makes 1 .* as 'beside<"):
        load_clip_tokenizer(tmp_path / "tokenizer")


def test_pieces_that_are_cut_short_are_not_fewer_ones(tmp_path):
    """Where the file ends between two of them, what is left is well formed."""
    whole = (TINY / "tokenizer_2" / "spiece.model").read_bytes()
    path = tmp_path / "spiece.model"
    ends, position = [], 0
    while whole[position] == 0x0A:  # pieces of less than 128 bytes
        position += 2 + whole[position + 1]
        ends.append(position)
    for end in (ends[10], ends[-1]):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="it is damaged"):
            read_sentencepiece(path)


def test_an_id_of_two_tokens_is_damaged(tmp_path):
    """A digit that has changed: prompts were read as other tokens."""
    shutil.copytree(TINY / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "vocab.json"
    values = json.loads(file.read_text())
    values["circle</w>"] = values["square</w>"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"it gives 'circle</w>' and 'square</w>' the same id"):
        load_clip_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("forms", [("tokenizer.json",), ()])
def test_swapped_folders_are_told(tmp_path, forms):
    for name, load in (("tokenizer", load_t5_tokenizer), ("tokenizer_2", load_clip_tokenizer)):
        shutil.copytree(TINY / name, tmp_path / name)
        for form in forms:
            (tmp_path / name / form).unlink(missing_ok=True)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.* (swapped|is not a)"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer_config.json", '{"model_max_length": "512"}'),
        ("tokenizer_config.json", '{"model_max_length": 0}'),
        ("tokenizer_config.json", '{"extra_ids": 1000000000}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("special_tokens_map.json", '{"eos_token": {"no": 1}}'),
        ("tokenizer_config.json", "[" * 100000),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", "b"]]}}'),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 1e400]]}}'),
        ("tokenizer.json", "null"),
    ],
)
def test_damaged_settings_are_a_sentence(tmp_path, file, text):
    shutil.copytree(TINY / "tokenizer_2", tmp_path / "tokenizer_2")
    (tmp_path / "tokenizer_2" / file).write_text(text)
    with pytest.raises(ValueError, match="tokenizer_2"):
        load_t5_tokenizer(tmp_path / "tokenizer_2")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, name):
    """A tokenizer of another model, here of one that has learnt a word more."""
    encoder = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}[name]
    size = getattr(TINY_CONFIG, encoder).vocab_size
    shutil.copytree(TINY, tmp_path / "model")
    settings = tmp_path / "model" / name / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    words = {"content": "<mine>", "special": True}
    values.setdefault("added_tokens_decoder", {})[str(size)] = words
    settings.write_text(json.dumps(values))
    file = {"tokenizer": "tokenizer/vocab.json", "tokenizer_2": "tokenizer_2/tokenizer.json"}[name]
    expected = f"{file} is another model's: it gives '<mine>' the id {size}, .* is {size}$"
    with pytest.raises(ValueError, match=expected):
        load_pipeline(tmp_path / "model")("a star")
    with pytest.raises(ValueError, match=expected):
        folder_encoders(tmp_path / "model").encode_text(["a star"])
