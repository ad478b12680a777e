"""Clips as mp4 and animated WebP: colours, speed, stills, the record, and what is refused."""

import json
import sys
import weakref

import numpy as np
import pytest
from PIL import Image

from fluxjax.config import ConfigError
from fluxjax.sample.clip_files import read_clip, read_clip_record, write_clip
from fluxjax.sample.picture_formats import read_record

RECORD = {"fluxjax": "x", "settings": {"prompt": "ein Würfel"}}
COLOURS = [(220, 40, 40), (40, 160, 60), (30, 60, 200), (250, 250, 240)]


def drawn(frames=7, height=48, width=64):
    """A dark square that moves right over four coloured quarters."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        rows = slice(i // 2 * height // 2, (i // 2 + 1) * height // 2)
        columns = slice(i % 2 * width // 2, (i % 2 + 1) * width // 2)
        clip[:, rows, columns] = colour
    for i in range(frames):
        clip[i, 8:16, 4 + 4 * i : 12 + 4 * i] = 10
    return clip


def groups(clip):
    yield clip[:3]
    yield clip[3:]


@pytest.mark.parametrize("suffix", [".mp4", ".webp"])
def test_there_and_back(tmp_path, suffix):
    if suffix == ".mp4":
        pytest.importorskip("av")
    clip, path = drawn(), tmp_path / f"clip{suffix}"
    written = write_clip(path, groups(clip), fps=24, frames=7, record=RECORD)
    stills = [f"clip-{which}.png" for which in ("first", "middle", "last")]
    assert [each.name for each in written] == [path.name, *stills]
    back = read_clip(path)
    assert back.frames.shape == clip.shape and abs(back.fps - 24) < 0.2
    # Edges of colours blur, areas keep theirs; the square is where it was.
    error = np.abs(back.frames.astype(int) - clip)
    assert np.median(error) <= 3 and error.mean() < 4
    assert read_clip(path, most=2).frames.shape[0] == 2
    assert read_clip_record(path) == RECORD
    for still, index in zip(written[1:], (0, 3, 6), strict=True):
        assert np.array_equal(np.asarray(Image.open(still)), clip[index])
        assert read_record(still) == RECORD


def test_frames_that_writers_join_are_read_again(tmp_path):
    """A WebP has equal ones once, which stays longer."""
    clip = drawn(9)
    clip[1:4], clip[5:7] = clip[0], clip[4]
    path, *_ = write_clip(tmp_path / "still.webp", [clip], fps=24, frames=9)
    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) == 4
    back = read_clip(path)
    assert back.fps == 24.0 and back.frames.shape == clip.shape
    error = np.abs(back.frames.astype(int) - clip)
    assert np.median(error) <= 3 and error.mean() < 4
    np.testing.assert_array_equal(read_clip(path, most=2, last=True).frames, back.frames[-2:])
    np.testing.assert_array_equal(read_clip(path, most=6).frames, back.frames[:6])


def test_what_is_transparent_is_white(tmp_path):
    frames = [Image.new("RGBA", (8, 8), (200 * i, 0, 0, 0)) for i in range(2)]
    frames[1].putpixel((0, 0), (0, 0, 255, 255))
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exact=True
    )
    back = read_clip(tmp_path / "a.webp").frames
    assert (back[0] == 255).all() and back[1, 0, 0].tolist() == [0, 0, 255]
    assert (back[1, 1:] == 255).all()


def test_of_the_end_of_a_long_video_no_more_is_held(tmp_path, monkeypatch):
    pytest.importorskip("av")
    alive: list[weakref.ref] = []
    most: list[int] = []

    class Frame(np.ndarray):
        pass

    def frames(container, stream):
        for i in range(40):
            frame = np.full((8, 8, 3), i, np.uint8).view(Frame)
            alive.append(weakref.ref(frame))
            most.append(sum(one() is not None for one in alive))
            yield frame

    path, *_ = write_clip(tmp_path / "long.mp4", [drawn()], fps=24, frames=7)
    monkeypatch.setattr("fluxjax.clip_reader._frames", frames)
    back = read_clip(path, most=5, last=True).frames
    assert back[:, 0, 0, 0].tolist() == [35, 36, 37, 38, 39] and max(most) <= 7


def test_of_few_frames_the_ends_are_kept(tmp_path):
    clip = drawn()
    for frames, names in ((1, ["first"]), (2, ["first", "last"])):
        path = tmp_path / f"{frames}.webp"
        _, *stills = write_clip(path, [clip[:frames]], fps=8, frames=frames)
        assert [still.stem for still in stills] == [f"{frames}-{name}" for name in names]


def test_a_turned_camera(tmp_path):
    """A phone held upright writes its frames lying, and how to turn them."""
    pytest.importorskip("av")
    clip, path = drawn(), tmp_path / "clip.mp4"
    write_clip(path, groups(clip), fps=24, frames=7)
    data = path.read_bytes()
    one, least = (1 << 16).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    straight = one + bytes(12) + one + bytes(12) + least
    turned = bytes(4) + one + bytes(4) + (-1 & 2**32 - 2**16).to_bytes(4, "big") + bytes(16) + least
    track = data.index(b"tkhd")
    at = data.index(straight, track)
    path.write_bytes(data[:at] + turned + data[at + 36 :])
    back = read_clip(path).frames
    assert back.shape == (7, 64, 48, 3)
    error = np.abs(back.astype(int) - np.rot90(clip, -1, axes=(1, 2)))
    assert np.median(error) <= 3 and error.mean() < 4


def test_what_cannot_be_written(tmp_path, monkeypatch):
    clip = drawn()
    with pytest.raises(ConfigError, match=r"written as \.mp4 or \.webp"):
        write_clip(tmp_path / "clip.avi", groups(clip), fps=24, frames=7)
    with pytest.raises(ConfigError, match="7 frames came, 9 were announced"):
        write_clip(tmp_path / "clip.webp", groups(clip), fps=24, frames=9)
    with pytest.raises(ConfigError, match="1 to 240 a second, not 7 and 0"):
        write_clip(tmp_path / "clip.webp", groups(clip), fps=0, frames=7)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'fluxjax\[video\]'.*\.webp"):
        write_clip(tmp_path / "clip.mp4", groups(clip), fps=24, frames=7)
    (tmp_path / "there.mp4").touch()
    with pytest.raises(ConfigError, match=r"^[^()]*there\.mp4: videos need PyAV: pip install"):
        read_clip_record(tmp_path / "there.mp4")
    (tmp_path / "there.mp4").unlink()
    monkeypatch.undo()
    pytest.importorskip("av")
    with pytest.raises(ConfigError, match="sides are even, not 63 x 48"):
        write_clip(tmp_path / "clip.mp4", groups(clip[:, :, :63]), fps=24, frames=7)
    assert not list(tmp_path.iterdir()), "something was left"


@pytest.mark.parametrize(("most", "named"), [(400, "clip.webp"), (4200, "clip-first.png")])
def test_a_full_disk(tmp_path, most, named):
    """No file is cut off, and the one that found no room is named. A limit on files' sizes stands
    in for the disk."""
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(256, size=(2, 48, 48, 3), dtype=np.uint8)
    noise[1] = 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_clip(tmp_path / "clip.webp", [noise], fps=8, frames=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / named)
    assert len([*tmp_path.iterdir()]) == (named != "clip.webp"), "something was left"


def test_what_cannot_be_read(tmp_path):
    pytest.importorskip("av")
    with pytest.raises(FileNotFoundError, match="no clip"):
        read_clip(tmp_path / "nowhere.mp4")
    for name in ("text.mp4", "text.webp"):
        (tmp_path / name).write_text("no clip at all")
        with pytest.raises(ConfigError, match=f"{name} is no clip that can be read"):
            read_clip(tmp_path / name)
        with pytest.raises(ConfigError, match=f"{name}"):
            read_clip_record(tmp_path / name)
    (tmp_path / "clip.txt").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"clips are read from \.mp4"):
        read_clip(tmp_path / "clip.txt")
    path = tmp_path / "clip.webp"
    write_clip(path, [drawn()], fps=24, frames=7)
    with pytest.raises(ConfigError, match=r"more than 0\.001 megapixels"):
        read_clip(path, max_megapixels=0.001)
    with pytest.raises(ConfigError, match="does not say how it was made"):
        read_clip_record(path)
