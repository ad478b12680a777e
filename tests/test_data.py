"""Training data: pairing, order, sizes, the cache, processes, resume, precomputing."""

import hashlib
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_files import (
    ENCODERS,
    SIZES,
    colour,
    encode_text,
    encoded,
    number_of,
    picture_bytes,
    write_folder,
)
from PIL import Image

from fluxjax.config import ConfigError
from fluxjax.families import Conditioning
from fluxjax.models.latents import unpack
from fluxjax.train.data.cache_file import read_arrays, usable_folder, write_arrays
from fluxjax.train.data.catalogue import pixels
from fluxjax.train.data.dataset import open_dataset, precompute
from fluxjax.train.data.random_masks import RandomMasks, Shape, draw_mask
from fluxjax.train.data.settings import DataSettings
from fluxjax.train.encoders import Encoders, folder_encoders

COUNT = 37
TINY = Path(__file__).parents[1] / "fluxjax" / "assets" / "tiny"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> DataSettings:
    root = tmp_path_factory.mktemp("data")
    source = write_folder(root / "pictures", COUNT)
    return DataSettings(source=str(source), resolution=48, bucket_step=8, cache=str(root / "cache"))


def _refuse(_):
    raise AssertionError("everything should have been in the cache")


def _assert_pairs(batch) -> list[int]:
    """Every latent meets its own caption; returns which pictures they are."""
    numbers = [number_of(latents) for latents in batch.latents]
    heard = encode_text([f"picture {number}" for number in numbers])
    np.testing.assert_array_equal(batch.conditioning.sequence, heard.sequence)
    np.testing.assert_array_equal(batch.conditioning.vector, heard.vector)
    assert batch.latents.shape[1] == batch.width * batch.height // 16
    return numbers


def test_every_latent_meets_its_own_caption_in_three_shuffled_epochs_of_buckets(settings, tmp_path):
    cold = replace(settings, cache=str(tmp_path / "cache"))
    steps = -(-3 * COUNT // 4)
    orders = []
    for encoders in (ENCODERS, ENCODERS._replace(encode_image=_refuse, encode_text=_refuse)):
        data = open_dataset(cold, encoders, batch=4, seed=5)
        batches = list(islice(data.iterate(), steps))
        seen = [_assert_pairs(batch) for batch in batches]
        assert len(data.sizes) >= 4 and len({(b.width, b.height) for b in batches}) >= 4
        assert [b.index.tolist() for b in batches] == [
            list(range(4 * step, 4 * step + 4)) for step in range(steps)
        ]
        counts = Counter(number for numbers in seen for number in numbers)
        assert set(counts) == set(range(COUNT))
        orders.append(seen)
    assert orders[0] == orders[1]


def test_over_a_cycle_every_picture_comes_equally_often(settings):
    data = open_dataset(settings, ENCODERS, batch=4, seed=5)
    cycle = [[number_of(row) for row in data(step).latents] for step in range(2 * COUNT)]
    for part in (cycle[:COUNT], cycle[COUNT:]):
        assert Counter(n for numbers in part for n in numbers) == dict.fromkeys(range(COUNT), 4)
    assert cycle[:COUNT] != cycle[COUNT:]  # shuffled anew
    other = open_dataset(settings, ENCODERS, batch=4, seed=6)
    assert [number_of(row) for row in other(0).latents] != cycle[0]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(settings, processes):
    whole = open_dataset(settings, ENCODERS, batch=8, seed=1)
    parts = [
        open_dataset(settings, ENCODERS, batch=8, seed=1, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    for step in (0, 1, 17, 1000):
        one = whole(step)
        several = [part(step) for part in parts]
        rows = [(b.latents, *b.conditioning[::2], b.index) for b in (*several, one)]
        for *parts_of_one, whole_one in zip(*rows, strict=True):
            np.testing.assert_array_equal(np.concatenate(parts_of_one), whole_one)
        assert {(b.width, b.height) for b in several} == {(one.width, one.height)}


def test_reading_goes_on_at_any_step(settings):
    straight = list(islice(open_dataset(settings, ENCODERS, batch=4, seed=2).iterate(), 14))
    resumed = open_dataset(settings, ENCODERS, batch=4, seed=2)
    for before, after in zip(straight[9:], resumed.iterate(9), strict=False):
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(resumed(3).latents, straight[3].latents)


def test_fingerprint_follows_pictures_captions_sizes_and_encoders(settings, tmp_path):
    source = Path(shutil.copytree(settings.source, tmp_path / "pictures"))

    def fingerprint(encoders: Encoders = ENCODERS, **changes) -> str:
        changed = replace(settings, source=str(source), **changes)
        return open_dataset(changed, encoders, batch=4, seed=0).fingerprint

    first = fingerprint()
    assert (
        first == open_dataset(settings, ENCODERS, batch=2, seed=1).fingerprint
    )  # not of the place
    seen = {first, fingerprint(resolution=32), fingerprint(ENCODERS._replace(text_hash="other"))}
    seen.add(fingerprint(ENCODERS._replace(image_hash="other")))
    (source / "004.txt").write_text("another caption")
    seen.add(fingerprint())
    (source / "004.png").write_bytes(picture_bytes(150))
    seen.add(fingerprint())
    assert len(seen) == 6


@pytest.mark.slow
def test_companions_are_found_by_name_and_cut_as_their_pictures(settings, tmp_path):
    for folder in ("before", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(COUNT):
        before = encoded(Image.new("RGB", (50, 70), colour(number + 100)), "BMP")
        (tmp_path / f"before/{number:03}.bmp").write_bytes(before)
        width, height = SIZES[number % len(SIZES)]
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 2, height))
        (tmp_path / f"masks/{number:03}.PNG").write_bytes(encoded(mask))
    beside = {"references": str(tmp_path / "before"), "masks": str(tmp_path / "masks")}
    cold = replace(settings, cache=str(tmp_path / "cache"), **beside)
    data = open_dataset(cold, ENCODERS, batch=4, seed=0)
    assert data.fingerprint != open_dataset(settings, ENCODERS, batch=4, seed=0).fingerprint
    data.fill()
    data = open_dataset(cold, ENCODERS._replace(encode_image=_refuse), batch=4, seed=0)
    for batch in islice(data.iterate(), COUNT):
        numbers = _assert_pairs(batch)
        assert [number_of(row) - 100 for row in batch.reference] == numbers
        assert batch.reference.shape == batch.latents.shape
        # Latents of 2 x 2 pixels; the left half counts, up to what scaling blurs at its edge.
        columns = batch.width // 2
        for counted in unpack(jnp.asarray(batch.mask), batch.height // 2, columns)[:, 0]:
            assert counted[:, : columns // 2 - 2].min() > 0.97
            assert counted[:, columns // 2 + 2 :].max() < 0.03


def test_what_is_filled_is_cut_out_and_has_its_mask_beside(settings, tmp_path):
    rule = RandomMasks(shapes=("rectangle",), each=2, least=0.3, most=0.3)
    cold = replace(settings, fill_masks="random", random_masks=rule, cache=str(tmp_path / "cache"))
    options = {"batch": 4, "seed": 0, "channels": ("masked", "mask")}
    data = open_dataset(cold, ENCODERS, **options)
    assert len(data) == 2 * COUNT and len({e.fill_mask.digest for e in data.entries}) == 2 * COUNT
    data.fill()
    data = open_dataset(cold, ENCODERS._replace(encode_image=_refuse), **options)
    for batch in islice(data.iterate(), COUNT):
        masked, mask = np.split(batch.channels, [12], axis=-1)
        assert np.isin(mask, (0, 1)).all() and mask.shape[-1] == 16
        np.testing.assert_allclose(mask.mean((1, 2)), 0.3, atol=0.06)
        # One colour, of which as much is left as is not cut out: grey is 0.
        kept = 1 - mask.mean((1, 2))
        np.testing.assert_allclose(masked[:, 0, 0], batch.latents[:, 0, 0] * kept, atol=2e-3)
    masks = tmp_path / "masks"
    shutil.copytree(settings.source, masks)
    own = open_dataset(replace(cold, fill_masks=str(masks)), ENCODERS, **options)
    assert len(own) == COUNT
    for row in own(0).channels[..., 12:]:
        assert len(np.unique(row)) == 1, "pictures of one colour are white or black"


def test_a_mask_of_strokes_on_nothing_is_the_strokes(settings, tmp_path):
    """As what is given to draw: transparent parts of a mask are not painted, nor do they count."""
    source, masks = write_folder(tmp_path / "pictures", 4), tmp_path / "masks"
    masks.mkdir()
    for number in range(4):
        mask = Image.new("RGBA", SIZES[number % len(SIZES)])
        mask.paste("white", (0, 0, mask.width // 2, mask.height))
        (masks / f"{number:03}.png").write_bytes(encoded(mask))
    cold = replace(settings, source=str(source), cache=str(tmp_path / "cache"))
    for kind, channels in (("masks", ()), ("fill_masks", ("masked", "mask"))):
        chosen = replace(cold, **{kind: str(masks)})
        data = open_dataset(chosen, ENCODERS, batch=4, seed=0, channels=channels)(0)
        painted = data.mask if kind == "masks" else data.channels[..., 12:]
        np.testing.assert_allclose(painted.mean(), 0.5, atol=0.1)


def test_names_are_the_same_however_their_accents_are_written(settings, tmp_path):
    """A disk or an archive of macOS writes them apart from their letters."""
    folders = {form: tmp_path / form for form in ("NFC", "NFD")}
    for form, folder in folders.items():
        folder.mkdir()
        (folder / unicodedata.normalize(form, "é.png")).write_bytes(picture_bytes(7, (40, 40)))
    beside = {"source": str(folders["NFC"]), "references": str(folders["NFD"])}
    cold = replace(settings, cache=str(tmp_path / "cache"), default_caption="", **beside)
    assert len(open_dataset(cold, ENCODERS, batch=1, seed=0)) == 1


def test_controls_are_edges_or_a_folders_pictures(settings, tmp_path):
    folder = Path(shutil.copytree(settings.source, tmp_path / "controls"))
    halves = Image.new("RGB", (64, 64))
    halves.paste("white", (0, 0, 32, 64))
    (folder / "000.png").write_bytes(encoded(halves))
    cold = replace(settings, source=str(folder), cache=str(tmp_path / "cache"))
    options = {"batch": 4, "seed": 0, "channels": ("control",)}
    data = open_dataset(replace(cold, controls="canny"), ENCODERS, **options)
    edges = [np.asarray(pixels(entry.control, 1.0)) for entry in data.entries]
    assert (edges[0].max((0, 2)) > 0.9).sum() == 1, "one line down the middle"
    assert all((one < -0.9).all() for one in edges[1:]), "one colour has no edges"
    named = replace(settings, controls=settings.source)
    for batch in islice(open_dataset(named, ENCODERS, **options).iterate(), COUNT):
        assert [number_of(row) for row in batch.channels] == _assert_pairs(batch)


def test_random_masks_have_the_share_of_their_rule():
    for shape in get_args(Shape):
        rule = RandomMasks(shapes=(shape,), least=0.2, most=0.4)
        digests = [rule.digest("picture", number) for number in range(20)]
        masks = [draw_mask(rule, digest, 64, 48)[..., 0] / 255 for digest in digests]
        assert all(np.isin(mask, (0, 1)).all() and 0.12 < mask.mean() < 0.5 for mask in masks)
        assert len({mask.tobytes() for mask in masks}) > 15
        assert (draw_mask(rule, digests[0], 64, 48)[..., 0] / 255 == masks[0]).all()


@pytest.mark.slow
def test_companions_that_do_not_fit_are_named(settings, tmp_path):
    before = Path(shutil.copytree(settings.source, tmp_path / "before"))
    lax = replace(settings, max_bad_share=1.0)
    (before / "000.png").unlink()
    (before / "001.png").write_text("<html>")
    shutil.copy(before / "002.png", before / "002.jpg")
    (before / "003.png").write_bytes(picture_bytes(3, (20, 20)))
    kinds = {"references": "reference", "masks": "mask", "fill_masks": "fill mask"}
    said = {
        name: dict(
            open_dataset(replace(lax, **{name: str(before)}), ENCODERS, batch=4, seed=0).quarantined
        )
        for name in kinds
    }
    for name, kind in kinds.items():
        assert (
            said[name].pop("000.png")
            == f"it needs one {kind} of its name in {before}: there is none"
        )
        assert said[name].pop("001.png") == f"its {kind}: it is an HTML page, not a picture"
        assert said[name].pop("002.png").endswith("there are 002.jpg and 002.png")
    for name in ("masks", "fill_masks"):
        reason = f"its {kinds[name]} has 20 x 20 pixels, and the picture 90 x 30"
        assert said[name].pop("003.png") == reason
    assert not any(said.values())
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=rf"all {COUNT} pictures of .* are bad: 000\.png: it needs"
    ):
        open_dataset(replace(lax, references=str(tmp_path / "empty")), ENCODERS, batch=4, seed=0)
    with pytest.raises(FileNotFoundError, match="there is no folder of masks"):
        open_dataset(replace(lax, masks=str(tmp_path / "none")), ENCODERS, batch=4, seed=0)
    with pytest.raises(ConfigError, match="the source scenes is no folder"):
        open_dataset(replace(lax, source="scenes", masks=str(before)), ENCODERS, batch=4, seed=0)


def test_changed_pictures_and_encoders_are_encoded_anew(settings, tmp_path):
    source = Path(shutil.copytree(settings.source, tmp_path / "pictures"))
    changed = replace(settings, source=str(source))
    open_dataset(changed, ENCODERS, batch=4, seed=0).fill()
    (source / "007.png").write_bytes(picture_bytes(152))  # of the same size
    data = open_dataset(changed, ENCODERS, batch=4, seed=0)
    numbers = {number_of(row) for step in range(COUNT) for row in data(step).latents}
    assert numbers == set(range(COUNT)) - {7} | {152}
    smaller = open_dataset(replace(changed, resolution=32), ENCODERS, batch=4, seed=0)(0)
    assert smaller.latents.shape[1] == smaller.width * smaller.height // 16 <= 64
    darker = ENCODERS._replace(encode_image=lambda x: ENCODERS.encode_image(x) * 0, image_hash="2")
    assert not open_dataset(changed, darker, batch=4, seed=0)(0).latents.any()


def test_picture_that_changes_while_it_is_used_is_an_error(settings, tmp_path):
    source = Path(shutil.copytree(settings.source, tmp_path / "pictures"))
    fresh = replace(settings, source=str(source), cache=str(tmp_path / "cache"))
    data = open_dataset(fresh, ENCODERS, batch=4, seed=0)
    for number in range(COUNT):
        (source / f"{number:03}.png").write_bytes(picture_bytes(number + 100))
    with pytest.raises(ValueError, match=r"\d{3}\.png has changed while it was used"):
        data(0)


def test_damaged_cache_files_are_made_again(settings, tmp_path):
    own = replace(settings, cache=str(tmp_path / "cache"))
    data = open_dataset(own, ENCODERS, batch=4, seed=0)
    data.fill()
    good = data(0)
    files = sorted((tmp_path / "cache").glob("*/*/*.safetensors"))
    assert len(files) == 2 * COUNT + 1  # the empty caption too
    for i, file in enumerate(files):
        content = bytearray(file.read_bytes())
        content[len(content) * (i + 1) // (len(files) + 1)] ^= 16
        file.write_bytes(content if i % 3 else content[: len(content) // 2])
    again = data(0)
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_entries_that_were_swapped_do_not_pair_wrongly(settings, tmp_path, kind):
    own = replace(settings, cache=str(tmp_path / "cache"))
    data = open_dataset(own, ENCODERS, batch=4, seed=0)
    data.fill()
    good = data(0)
    files = sorted((tmp_path / "cache" / kind).glob("*/*.safetensors"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    said: list[str] = []
    data.train(said.append)
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(data(0)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(said) == 4 and all("holds what belongs elsewhere" in line for line in said)


def test_entries_that_the_disk_refuses_are_encoded_anew_and_training_goes_on(
    settings, tmp_path, monkeypatch
):
    own = replace(settings, cache=str(tmp_path / "cache"))
    data = open_dataset(own, ENCODERS, batch=4, seed=0)
    data.fill()
    good = data(0)
    for file in (tmp_path / "cache").glob("*/*/*.safetensors"):
        file.unlink()
        file.mkdir()  # can be neither read nor replaced

    with pytest.raises(OSError):
        data(0)  # before training has begun it is the user's to repair
    said: list[str] = []
    data.train(said.append)
    for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(data(0)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any("Is a directory" in line and "encoded anew" in line for line in said)


def test_a_catalogue_with_any_bit_changed_is_named_and_made_anew(settings, tmp_path):
    own = replace(settings, cache=str(tmp_path / "cache"))
    good = open_dataset(own, ENCODERS, batch=4, seed=0)
    assert not good.notes
    (file,) = (tmp_path / "cache" / "catalogues").iterdir()
    before = file.read_bytes()
    for place in range(0, len(before), len(before) // 40):
        content = bytearray(before)
        content[place] ^= 1
        file.write_bytes(content)
        again = open_dataset(own, ENCODERS, batch=4, seed=0)
        assert again.fingerprint == good.fingerprint
        assert again.notes == [f"{file} is damaged; all pictures are checked again"]
        assert file.read_bytes() == before
    other = replace(own, source=str(write_folder(tmp_path / "other", 3)))
    open_dataset(other, ENCODERS, batch=1, seed=0)
    (second,) = set(file.parent.iterdir()) - {file}
    second.write_bytes(before)  # that of another source
    assert "is damaged" in open_dataset(other, ENCODERS, batch=1, seed=0).notes[0]


def test_sizes_that_the_model_cannot_have_are_refused(settings):
    pixels = ENCODERS._replace(unit=16)
    for step, near in ((1, 16), (8, 16), (40, 32)):
        words = f"bucket_step must be a multiple of 16, .* got {step}; {near} would do"
        with pytest.raises(ConfigError, match=words):
            open_dataset(replace(settings, bucket_step=step), pixels, batch=4, seed=0)
    assert folder_encoders(TINY).unit == 16


def test_a_home_that_cannot_be_written_is_said_and_replaced(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    folder, note = usable_folder(tmp_path / "run")
    assert folder == tmp_path / "run"
    assert f"kept in {tmp_path / 'run'}: {tmp_path}/home" in note
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "good"))
    assert usable_folder(tmp_path / "run") == (tmp_path / "good/fluxjax/data", "")


@pytest.mark.parametrize("one_disk", [True, False])
def test_processes_fill_one_cache_together_and_caches_of_their_own_wholly(
    settings, tmp_path, one_disk
):
    made: list[list[str]] = [[], []]

    def process(index: int):
        def encode(texts: list[str]):
            made[index] += texts
            return encode_text(texts)

        cache = tmp_path / ("one" if one_disk else str(index))
        return open_dataset(
            replace(settings, cache=str(cache)),
            ENCODERS._replace(encode_text=encode),
            batch=2,
            seed=0,
            process_index=index,
            process_count=2,
        )

    for index in (0, 1):
        # What the second one finds is as if the first had been faster.
        process(index).fill()
        files = list(tmp_path.glob("*/latents/*/*"))
        assert len(files) == (COUNT if one_disk or index == 0 else 2 * COUNT)
    assert sorted(made[0]) == sorted({"", *(f"picture {n}" for n in range(COUNT))})
    assert set(made[0][: len(made[0]) // 2]).isdisjoint(made[1][: len(made[1]) // 2])
    assert len(made[1]) == (0 if one_disk else COUNT + 1)


def test_values_that_float16_cannot_hold_are_kept(tmp_path):
    large = np.array([[1e6, -2.0]], np.float32)
    write_arrays(tmp_path / "a", {"large": large, "small": large[:, 1:] / 3}, "key")
    arrays = read_arrays(tmp_path / "a", "key")
    assert arrays is not None
    np.testing.assert_array_equal(arrays["large"], large)
    np.testing.assert_allclose(arrays["small"], [[-2 / 3]], rtol=5e-4)


def test_encoder_that_gives_nan_is_named(settings, tmp_path):
    broken = ENCODERS._replace(
        encode_text=lambda t: Conditioning(np.full((1, 4, 8), np.nan), None, np.zeros((1, 8)))
    )
    data = open_dataset(replace(settings, cache=str(tmp_path)), broken, batch=4, seed=0)
    with pytest.raises(ValueError, match="the caption 'a dog' is encoded to values"):
        data.captions(["a dog"])


def test_impossible_shares_are_refused(settings):
    for words, values in {
        "batch of 6 does not divide by 4": {"batch": 6, "process_count": 4},
        "no process 2 of 2": {"batch": 4, "process_index": 2, "process_count": 2},
        "seed=-1": {"batch": 4, "seed": -1},
    }.items():
        with pytest.raises(ConfigError, match=words):
            open_dataset(settings, ENCODERS, **{"seed": 0} | values)
    for words, values in {
        "resolution must be above 0 and at most 32768, got 0": {"resolution": 0},
        "smaller than bucket_step": {"resolution": 32},
        "max_bad_share must be in \\[0, 1\\], got 5": {"max_bad_share": 5.0},
        "max_aspect must be at least 1, got 0.5": {"max_aspect": 0.5},
    }.items():
        with pytest.raises(ConfigError, match=words):
            DataSettings(**values)


def _snapshot(root: Path) -> dict[str, tuple[int, str]]:
    return {
        path.relative_to(root).as_posix(): (
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [root, *root.rglob("*")]
    }


@pytest.mark.slow
def test_embedded_model_precomputes_and_the_files_of_the_user_stay_as_they_are(tmp_path):
    """Latents are the autoencoder's, text the encoders'; the second time nothing is loaded."""
    source = tmp_path / "pictures"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.png").write_bytes(picture_bytes(number, (36, 40)))
        (source / f"{number}.txt").write_text("a red circle")
    (source / "bad.png").write_bytes(b"")
    (source / "bad.txt").write_text("nothing")
    before = _snapshot(source)
    settings = DataSettings(
        source=str(source),
        resolution=32,
        bucket_step=16,
        cache=str(tmp_path / "cache"),
        max_bad_share=0.2,
    )
    seen = []
    text = precompute(settings, TINY, dtype="float32", report=lambda *told: seen.append(told))
    assert "4 pictures" in text and "4 of 32x32" in text and "bad.png: the file is empty" in text
    assert seen == [
        *(("pictures checked", done, 5) for done in (1, 2, 3, 4, 5)),
        *(("captions encoded", done, 2) for done in (1, 2)),  # their one and the empty one
        *(("pictures encoded", done, 4) for done in (1, 2, 3, 4)),
    ]
    assert _snapshot(source) == before

    encoders = folder_encoders(TINY, "float32")
    stored = encoders._replace(encode_image=_refuse, encode_text=_refuse)
    batch = open_dataset(settings, stored, batch=2, seed=0)(0)
    heard, read = encoders.encode_text(["a red circle"]), batch.conditioning
    np.testing.assert_allclose(read.sequence[1], heard.sequence[0], rtol=5e-4, atol=1e-6)
    np.testing.assert_allclose(read.vector[1], heard.vector[0], rtol=5e-4, atol=1e-6)
    # Packed when they are read: an entry is any family's.
    for file in (Path(settings.cache) / "latents").rglob("*.safetensors"):
        assert read_arrays(file, file.stem)["latents"].shape == (16, 4, 4)
    assert batch.latents.shape == (2, 4, 64) and 0.1 < batch.latents.std() < 10
    assert encoders.image_hash != encoders.text_hash != folder_encoders(TINY).text_hash


@pytest.mark.slow
def test_scenes_have_the_sizes_and_captions_that_were_drawn(tmp_path):
    settings = DataSettings(
        resolution=96,
        bucket_step=16,
        scenes=100,
        scene_sizes=((96, 96), (112, 80)),
        cache=str(tmp_path),
    )
    data = open_dataset(settings, ENCODERS, batch=4, seed=0)
    assert data.sizes == {(96, 96): 64, (112, 80): 36} and not data.quarantined
    batch = data(0)
    assert batch.latents.shape == (4, batch.width * batch.height // 16, 12)
    again = open_dataset(replace(settings, scenes=80), ENCODERS, batch=4, seed=0)
    assert [e.item.caption for e in again.entries] == [e.item.caption for e in data.entries[:80]]
    with pytest.raises(ConfigError, match="100 x 90"):
        open_dataset(replace(settings, scene_sizes=((100, 90),)), ENCODERS, batch=4, seed=0)


def test_threads_that_begin_together_find_edges():
    """OpenCV is not itself while it is imported, which the first pictures of a training may ask for
    at once."""
    pytest.importorskip("cv2")
    begun = """
import threading
from PIL import Image
from fluxjax.sample.edges import canny_edges
found = []
def find():
    found.append(canny_edges(Image.new("RGB", (32, 32)), 32, 32, (50, 200)).size)
threads = [threading.Thread(target=find) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert found == [(32, 32)] * 8, found
"""
    ended = subprocess.run([sys.executable, "-c", begun], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
