"""Sources of training pictures: their formats, and what is wrong with pictures of strangers."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_files import ENCODERS, colour, encoded, picture_bytes, write_folder
from PIL import Image, ImageCms

from fluxjax.config import ConfigError
from fluxjax.picture_files import BadPicture, decode
from fluxjax.train.data.buckets import bucket, fit
from fluxjax.train.data.catalogue import pixels, read_catalogue
from fluxjax.train.data.dataset import open_dataset
from fluxjax.train.data.settings import DataSettings

GOOD = 6


def _read(source: Path, cache: Path, **settings):
    values = {"resolution": 32, "bucket_step": 8, "max_bad_share": 1.0} | settings
    return read_catalogue(DataSettings(source=str(source), **values), cache)


def _captions(catalogue) -> dict[tuple[int, int, int], str]:
    """The mean colour of each picture and its caption."""
    found = {}
    for entry in catalogue.entries:
        mean = (pixels(entry, 80.0).mean((0, 1)) + 1) * 127.5
        found[tuple(round(float(v)) for v in mean)] = entry.item.caption
    return found


EXPECTED = {colour(number): f"picture {number}" for number in range(GOOD)}


# Formats.


def test_folder_with_captions_beside_pictures(tmp_path):
    source = write_folder(tmp_path / "pictures", GOOD)
    (source / "notes.md").write_text("no picture")
    (source / ".hidden.png").write_bytes(b"")
    (source / "more").mkdir()
    (source / "000.png").rename(source / "more" / "UPPER.PNG")
    (source / "000.txt").rename(source / "more" / "UPPER.txt")
    catalogue = _read(source, tmp_path / "cache")
    assert _captions(catalogue) == EXPECTED and not catalogue.quarantined
    assert "more/UPPER.PNG" in {entry.item.name for entry in catalogue.entries}


def test_folder_with_metadata(tmp_path):
    source = write_folder(tmp_path / "pictures", GOOD)
    (tmp_path / "outside.png").write_bytes(picture_bytes(0))
    rows = [{"file_name": f"{n:03}.png", "text": f"picture {n}"} for n in range(GOOD)]
    lines = [json.dumps(row).encode() for row in rows] + [
        b"",
        b"{not json",
        b'{"file_name": "000.png", "text": "caf\xff"}',
        b'{"text": "no file"}',
        b'{"file_name": "../outside.png", "text": "a"}',
        json.dumps({"file_name": str(tmp_path / "outside.png"), "text": "a"}).encode(),
        b'{"file_name": "absent.png", "text": "a"}',
        b'{"file_name": "001.png", "text": 3}',
        b'{"file_name": "002.png", "text": "\\ud800"}',
        b'{"file_name": "a\\u0000b.png", "text": "a"}',
        b"[" * 100_000,
    ]
    (source / "metadata.jsonl").write_bytes(b"\n".join(lines))
    catalogue = _read(source, tmp_path / "cache")
    assert _captions(catalogue) == EXPECTED
    reasons = [f"{name}: {reason}" for name, reason in catalogue.quarantined]
    words = (
        "not JSON",
        "not JSON in UTF-8",
        "no file_name",
        "outside",
        "outside",
        "missing",
        "no text but 3",
        "lone surrogate",
        "cannot be opened",
        "not JSON",
    )
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason
    followed = _read(source, tmp_path / "cache", follow_links=True).quarantined
    assert sum("outside of the source" in reason for _, reason in followed) == 2


@pytest.mark.parametrize("form", ["struct", "bytes"])
def test_parquet(tmp_path, form):
    data = [picture_bytes(n) for n in range(GOOD)] + [None, b"no picture", picture_bytes(0)]
    texts = [f"picture {n}".encode() for n in range(GOOD)] + [b"a", b"b", b"caf\xff"]
    if form == "struct":
        images = pa.array([{"bytes": d, "path": None} for d in data])
    else:
        images = pa.array(data, pa.large_binary())
    # A text column with a row that is not UTF-8, as careless writers leave it.
    captions = pa.array(texts, pa.binary()).view(pa.string())
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "train-00000.parquet"
    pq.write_table(pa.table({"image": images, "text": captions}), file, row_group_size=4)
    catalogue = _read(tmp_path / "source", tmp_path / "cache")
    assert _captions(catalogue) == EXPECTED
    reasons = dict(catalogue.quarantined)
    name = "train-00000.parquet row group"
    assert reasons[f"{name} 1 row 2"] == "its row holds no bytes"
    assert "no picture in a known format" in reasons[f"{name} 1 row 3"]
    assert "not UTF-8" in reasons[f"{name} 2 row 0"]
    with pytest.raises(ConfigError, match="no column 'caption'; its columns are image, text"):
        _read(file, tmp_path / "cache", caption_key="caption")
    with pytest.raises(ConfigError, match="'text' holds string, not pictures' bytes"):
        _read(file, tmp_path / "cache", image_key="text")
    texts = pa.array(["a"] * GOOD)
    for column in (
        pa.array([{"bytes": "x"}] * GOOD),
        pa.array([{"bytes": {"bytes": b"x"}}] * GOOD),
    ):
        pq.write_table(pa.table({"image": column, "text": texts}), tmp_path / "wrong.parquet")
        with pytest.raises(ConfigError, match=r"'image' holds struct<bytes: .*, not pictures'"):
            _read(tmp_path / "wrong.parquet", tmp_path / "cache")
    twice = pa.Table.from_arrays([images[:GOOD], texts, texts], ["image", "text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match="2 columns 'text'; its columns are image, text, text"):
        _read(tmp_path / "twice.parquet", tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"train-00000.parquet: the rest of this parquet file"):
        _read(tmp_path / "source", tmp_path / "cache")


def _tar(path: Path, members: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member, io.BytesIO(picture_bytes(0)))
    return path


def test_webdataset_tars(tmp_path):
    source = tmp_path / "shards"
    source.mkdir()
    members = {}
    for n in range(GOOD):
        members[f"{n:05}.png"] = picture_bytes(n)
        if n % 2:
            members[f"{n:05}.txt"] = f"picture {n}".encode()
        else:
            members[f"{n:05}.json"] = json.dumps({"text": f"picture {n}"}).encode()
    members["lonely.png"] = picture_bytes(0)
    _tar(source / "a.tar", members)
    catalogue = _read(source, tmp_path / "cache")
    assert _captions(catalogue) == EXPECTED
    assert catalogue.quarantined == [("a.tar/lonely.png", "it has no caption")]

    whole = (source / "a.tar").read_bytes()
    middle = whole.index(b"00003.png")
    damaged = bytearray(whole)
    damaged[middle + 20] ^= 1  # a header whose checksum is wrong, which tarfile takes for the end
    for content in (whole[: middle + 600], bytes(damaged)):
        (source / "a.tar").write_bytes(content)
        catalogue = _read(source, tmp_path / "cache")
        assert set(_captions(catalogue).values()) == {"picture 0", "picture 1", "picture 2"}
        assert any("the rest of this tar is lost" in r for _, r in catalogue.quarantined)


def _member(name: str, kind: bytes = tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(picture_bytes(0)) * (kind == tarfile.REGTYPE)
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def test_what_a_tar_does_not_give_is_named(tmp_path):
    """Members twice, links and devices, a second tar behind the first, an end that is missing."""
    members = {}
    for n in range(GOOD):
        members |= {f"{n}.png": picture_bytes(n), f"{n}.txt": f"picture {n}".encode()}
    odd = [_member("0.PNG"), _member("1.txt")]
    odd += [_member(f"link{k}.png", k.encode(), linkname="2.png") for k in "123"]
    source = _tar(tmp_path / "a.tar", members, *odd)
    second = _tar(tmp_path / "b.tar", {"a.png": picture_bytes(0), "a.txt": b"more"})
    found = _read(source, tmp_path / "cache")
    assert set(_captions(found).values()) == {f"picture {n}" for n in range(2, GOOD)}
    link = "is a link, or no ordinary file"
    assert dict(found.quarantined) == {
        "a.tar/0.png": "its tar has several members 0.PNG",
        "a.tar/1.png": "its tar has several members 1.txt",
        **{f"a.tar/link{k}.png": f"its member link{k}.png {link}" for k in "123"},
    }
    whole = second.read_bytes()
    end = whole.rstrip(b"\0")
    end += bytes(-len(end) % 512)
    large = bytearray(whole)
    large[:512] = _member("n" * 99, b"L", size=2**60).tobuf(tarfile.GNU_FORMAT)
    for content, words in (
        (whole + source.read_bytes(), "behind its end stands more"),
        (end, "it has no end, as one that is cut short"),
        (end + bytes(large), "a header says that it is larger than memory"),
    ):
        second.write_bytes(content)
        found = _read(second, tmp_path / "cache")
        assert [entry.item.caption for entry in found.entries] == ["more"]
        ((name, reason),) = found.quarantined
        assert name == "b.tar" and f"the rest of this tar is lost: {words}" in reason


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_companions_lie_beside_pictures_in_archives(tmp_path, form):
    before = [picture_bytes(n + 100) for n in range(GOOD)]
    before[1] = b"<html>"
    masks = [picture_bytes(n + 200) for n in range(GOOD)]
    if form == "tar":
        members = {}
        for n in range(GOOD):
            members |= {f"{n:05}.jpg": picture_bytes(n), f"{n:05}.txt": f"picture {n}".encode()}
            members |= {f"{n:05}.before.png": before[n]} if n else {}
            members[f"{n:05}.where.png"] = masks[n]
        source = _tar(tmp_path / "a.tar", members)
        missing = "its reference: its sample needs one member .before.*: there is none"
    else:
        table = {
            "image": [picture_bytes(n) for n in range(GOOD)],
            "before": [None, *before[1:]],
            "where": masks,
            "text": [f"picture {n}" for n in range(GOOD)],
        }
        source = tmp_path / "a.parquet"
        pq.write_table(pa.table(table), source, row_group_size=4)
        missing = "its reference: its row holds no bytes"
    catalogue = _read(source, tmp_path / "cache", references="before")
    again = _read(source, tmp_path / "cache", references="before")
    masked = _read(source, tmp_path / "cache", references="before", masks="where")
    for found in (catalogue, again, masked):
        assert [reason for _, reason in found.quarantined] == [
            missing,
            "its reference: it is an HTML page, not a picture",
        ]
        assert len(found.entries) == GOOD - 2
        for entry in found.entries:
            number = int(entry.item.caption.split()[1])
            assert entry.reference.item.read() == picture_bytes(number + 100)
            assert entry.item.read() == picture_bytes(number)
            assert found is not masked or entry.mask.item.read() == masks[number]
    with pytest.raises(ConfigError if form == "parquet" else ValueError, match=r"after|bad"):
        _read(source, tmp_path / "cache", references="after", max_bad_share=0.5)


def test_tar_members_that_are_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"a\.tar/x\.png: its member x\.png is a link"):
        _read(tmp_path / "a.tar", tmp_path / "cache")


def test_sources_that_cannot_be_meant(tmp_path):
    source = write_folder(tmp_path / "both", 1)
    _tar(source / "backup.tar", {"0.png": picture_bytes(0)})
    with pytest.raises(ConfigError, match=r"holds pictures and \.tar: name a folder of one kind"):
        _read(source, tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="there is no data folder or file"):
        _read(tmp_path / "absent", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        _read(tmp_path / "empty", tmp_path / "cache")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.parquet nor a \.tar file"):
        _read(tmp_path / "a.tar.gz", tmp_path / "cache")


# Faults.


def _bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    rows = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _noise(kind: str, **options) -> bytes:
    pixels_ = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(pixels_), kind, **options)


def _animation() -> bytes:
    frames = [Image.new("RGB", (64, 64), name) for name in ("red", "green", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


BAD_BYTES = {
    "html.jpg": (b"\n<!DOCTYPE html><html>404</html>", "it is an HTML page, not a picture"),
    "empty.png": (b"", "the file is empty"),
    "cut.jpg": (_noise("JPEG")[:-900], "it cannot be decoded (image file is truncated"),
    "cut.png": (_noise("PNG")[:-900], "it cannot be decoded"),
    "header.png": (_noise("PNG")[:20], "it cannot be read"),
    "flipped.png": (_noise("PNG").replace(b"IDAT", b"ID\x00T"), "it is no picture"),
    "pixel.png": (encoded(Image.new("RGB", (1, 1))), "it has 1 x 1 pixels, and each side needs 8"),
    "moving.gif": (_animation(), "it has 3 frames, and only still pictures are used"),
    "bomb.png": (_bomb(20_000, 20_000), "it has more than 80 megapixels"),
    "big.png": (_bomb(10_000, 10_000), "it has 100 megapixels, more than 80"),
    "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(40), "convert it to PNG or JPEG"),
    "clip.jpg": (b"\0\0\0\x18ftypisom" + bytes(40), "it is a video, not a picture"),
    "clip.png": (b"\x1aE\xdf\xa3" + bytes(40), "it is a video, not a picture"),
    "float.tif": (encoded(Image.new("F", (64, 64)), "TIFF"), "it has 32-bit values"),
    "text.webp": (b"hello", "it is no picture in a known format (JPEG, PNG, WEBP"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known format"),
}


def test_bad_pictures_are_left_out_named_and_the_source_is_not_touched(tmp_path):
    source = write_folder(tmp_path / "pictures", GOOD)
    expected = {}
    for name, (content, reason) in BAD_BYTES.items():
        (source / name).write_bytes(content)
        (source / name).with_suffix(".txt").write_text(name)
        expected[name] = reason
    (tmp_path / "outside.png").write_bytes(picture_bytes(0))
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "album").mkdir()
    (source / "album").symlink_to(tmp_path / "album")
    expected["album/"] = "it is a link to a folder, see follow_links"
    (source / "link.png").symlink_to(tmp_path / "outside.png")
    (source / "link.txt").write_text("link")
    expected["link.png"] = "it is a link to a file outside of the source, see follow_links"
    (source / "quoting.png").write_bytes(picture_bytes(0))
    (source / "quoting.txt").symlink_to(tmp_path / "secret.txt")
    expected["quoting.png"] = "its caption: it is a link to a file outside"
    (source / "circle.png").symlink_to("circle.png")
    expected["circle.png"] = "it cannot be opened"
    os.mkfifo(source / "pipe.png")  # reading one would wait for ever
    expected["pipe.png"] = "it is no ordinary file"
    (source / "silent.png").write_bytes(picture_bytes(0))
    expected["silent.png"] = "it has no caption"
    (source / "latin.png").write_bytes(picture_bytes(0))
    (source / "latin.txt").write_bytes("a café".encode("latin-1"))
    expected["latin.png"] = "its caption is not UTF-8 (byte 6)"
    name = os.fsencode(source) + b"/caf\xff.png"
    Path(os.fsdecode(name)).write_bytes(b"")
    Path(os.fsdecode(name[:-4] + b".txt")).write_text("a name that is not UTF-8")
    expected["caf\\udcff.png"] = "the file is empty"
    before = _snapshot(source)
    for _ in range(2):  # the second time from what is remembered
        catalogue = _read(source, tmp_path / "cache")
        assert _captions(catalogue) == EXPECTED
        found = dict(catalogue.quarantined)
        assert found.keys() == expected.keys()
        for name, reason in expected.items():
            assert reason in found[name], name
            assert json.dumps(found[name], ensure_ascii=False).encode()  # can be printed
    assert _snapshot(source) == before
    followed = dict(_read(source, tmp_path / "cache", follow_links=True).quarantined)
    assert expected.keys() - followed.keys() == {"album/", "link.png", "quoting.png"}


def _snapshot(root: Path) -> dict[str, tuple]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size, path.lstat().st_mode)
        for path in [root, *sorted(root.rglob("*"))]
    }


def test_too_many_bad_pictures_stop_the_run_naming_them(tmp_path):
    source = write_folder(tmp_path / "pictures", 19)
    (source / "bad.jpg").write_bytes(b"<html>")
    (source / "bad.txt").write_text("bad")
    assert len(_read(source, tmp_path, max_bad_share=0.05).quarantined) == 1  # 1 of 20
    (source / "018.png").unlink()
    words = r"1 of 19 pictures of .* are bad, and at most 5% may be: bad\.jpg: it is an HTML page"
    with pytest.raises(ValueError, match=words):
        _read(source, tmp_path, max_bad_share=0.05)
    for number in range(18):
        (source / f"{number:03}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"all 19 .*; and 14 more"):
        open_dataset(
            DataSettings(source=str(source), max_bad_share=1.0, cache=str(tmp_path)),
            ENCODERS,
            batch=1,
            seed=0,
        )


def test_default_caption_stands_for_a_missing_one(tmp_path):
    source = write_folder(tmp_path / "pictures", GOOD)
    (source / "003.txt").unlink()
    catalogue = _read(source, tmp_path / "cache", default_caption="in the style of TOK")
    assert _captions(catalogue) == EXPECTED | {colour(3): "in the style of TOK"}


# Pictures as they are meant to be seen.


def _decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, 80.0)).astype(int)


def test_turned_pictures_are_set_upright():
    picture = Image.new("RGB", (60, 40), "red")
    picture.paste("blue", (0, 0, 30, 40))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise: left becomes top
    upright = _decoded(encoded(picture, "JPEG", exif=exif, quality=95))
    assert upright.shape == (60, 40, 3)
    assert upright[10, 20, 2] > 200 > upright[10, 20, 0] and upright[50, 20, 0] > 200


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        rgb = _decoded(encoded(Image.fromarray(values), kind))
        np.testing.assert_array_equal(rgb[..., 0], [[0, 100], [200, 255]])


def test_print_colours_become_red_green_blue():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = _decoded(encoded(ink, "JPEG"))[8, 8]
    assert red[0] > 230 and red[1] < 40 and red[2] < 40


def test_transparency_lies_over_white():
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    rgb = _decoded(encoded(picture))
    assert rgb[0, 0].tolist() == [0, 0, 255] and rgb[1, 1].tolist() == [255, 255, 255]
    palette = picture.convert("P")
    assert _decoded(encoded(palette, "PNG", transparency=palette.getpixel((1, 1))))[1, 1, 1] == 255


def test_colour_profiles_are_applied():
    """A profile whose red and blue are exchanged shows whether it is heeded."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    names = srgb.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    exchanged = names.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert _decoded(encoded(red, icc_profile=srgb))[0, 0].tolist() == [255, 0, 0]
    for picture in (red, red.convert("RGBA")):
        seen = _decoded(encoded(picture, icc_profile=exchanged))[0, 0]
        assert seen[2] > 250 and seen[0] < 5
    assert _decoded(encoded(red, icc_profile=b"no profile"))[0, 0].tolist() == [255, 0, 0]


def test_first_frame_of_a_phones_picture_with_previews_is_taken():
    frames = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 32), "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert _decoded(data)[0, 0, 0] > 250


# Sizes.


def test_sizes_keep_most_of_the_picture_and_never_enlarge_it():
    sides = {"resolution": 512, "step": 64, "max_aspect": 2.0}
    assert bucket(2000, 2000, **sides) == (512, 512)
    assert bucket(4000, 3000, **sides) == (576, 448)
    assert bucket(3000, 4000, **sides) == (448, 576)
    assert bucket(10_000, 1000, **sides) == (640, 320)
    assert bucket(300, 200, **sides) == (256, 192)
    assert bucket(64, 64, **sides) == (64, 64)
    with pytest.raises(BadPicture, match="64 x 63 pixels, and each side needs 64"):
        bucket(64, 63, **sides)
    rng = np.random.default_rng(0)
    for _ in range(200):
        w, h = (int(v) for v in rng.integers(64, 3000, 2))
        width, height = bucket(w, h, **sides)
        assert width <= w and height <= h and width * height <= 512**2
        assert width % 64 == height % 64 == 0 and max(width, height) <= 2 * min(width, height)
        if min(w, h) >= 512 and max(w, h) < 1.9 * min(w, h):
            assert width * height > 0.75 * 512**2
            shape = (width / height) / (w / h)
            assert 0.8 < shape < 1.25


def test_fitting_scales_alike_in_both_directions_and_cuts_the_middle():
    """A disc stays a disc."""
    y, x = np.mgrid[:300, :500]
    disc = ((x - 250) ** 2 + (y - 150) ** 2 < 120**2).astype(np.uint8) * 255
    values = fit(Image.fromarray(disc).convert("RGB"), 128, 96)
    assert values.shape == (96, 128, 3) and values.dtype == np.float32
    inside = values[..., 0] > 0
    width, height = inside.any(0).sum(), inside.any(1).sum()
    assert abs(int(width) - int(height)) <= 1 and width == pytest.approx(240 * 96 / 300, abs=2)
    assert np.argwhere(inside).mean(0) == pytest.approx([47.5, 63.5], abs=0.5)
    same = fit(Image.new("RGB", (16, 16), (0, 255, 0)), 16, 16)
    assert same.min() == -1 and same.max() == 1
