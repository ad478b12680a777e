"""The pictures that a run is given: read, checked, made ready; before any size is known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxjax.config import CONTROLS, IP_IMAGES, ConfigError
from fluxjax.file_hash import hash_file
from fluxjax.named_errors import naming
from fluxjax.picture_files import BadPicture, converted, decode, quiet, upright_holes, upright_rgb
from fluxjax.sample.clip_files import Clip, read_clip
from fluxjax.sample.masks import expanded
from fluxjax.sample.settings import ALPHA, PICTURES, TASK_PICTURES, Settings

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LONGEST_VIDEO = 65  # frames, of those from its beginning
MEGAPIXELS = 200.0  # more is refused before it is decoded
# Transparent parts of a mask are not painted: strokes on nothing are the strokes.
_READ: dict[str, Callable[[Picture], Picture]] = {"mask": partial(upright_rgb, ground="black")}


@dataclass(frozen=True)
class Given:
    """Upright RGB pictures, as `fluxjax.families.family.Task` names them."""

    reference: Picture | None = None
    image: Picture | None = None
    mask: Picture | None = None
    control: Picture | None = None
    control_2: Picture | None = None
    control_3: Picture | None = None
    ip_image: Picture | None = None
    ip_image_2: Picture | None = None
    ip_image_3: Picture | None = None
    negative_ip_image: Picture | None = None
    last: Picture | None = None
    video: Clip | None = None

    @property
    def controls(self) -> list[Picture]:
        """Those that there are, in their order."""
        return self._those_of(CONTROLS)

    @property
    def ip_images(self) -> list[Picture]:
        """Likewise, what an IP-Adapter sees."""
        return self._those_of(IP_IMAGES)

    def _those_of(self, names: Sequence[str]) -> list[Picture]:
        each = [getattr(self, name) for name in names]
        return [one for one in each if one is not None]

    @property
    def names(self) -> frozenset[str]:
        """Of those that decide about the task."""
        return frozenset(
            "control" if name in CONTROLS else name
            for name in TASK_PICTURES
            if getattr(self, name) is not None
        )


NO_PICTURES = Given()


def spread_over(names: Sequence[str], given: Any) -> dict[str, Any]:
    """One picture or a list of several, by their `names`, such as CONTROLS.

    Raises ConfigError for more than there can be."""
    each = list(given) if isinstance(given, list | tuple) else [given]
    if len(each) > len(names):
        raise ConfigError(f"at most {len(names)} {names[0]}s go together, got {len(each)}")
    return dict(zip(names, each, strict=False))


def apart(**given: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """(paths in full, pictures and clips) by name. Raises ConfigError for what is neither."""
    from PIL.Image import Image

    files: dict[str, str] = {}
    pictures: dict[str, Any] = {}
    for name, one in given.items():
        if (name, one) == ("mask", ALPHA):
            files[name] = ALPHA
        elif isinstance(one, str | Path):
            files[name] = str(Path(one).expanduser().absolute())
        elif isinstance(one, Clip if name == "video" else Image):
            pictures[name] = one
        elif one is not None:
            kind = type(one).__name__
            what = "a Clip" if name == "video" else "a picture of Pillow"
            raise ConfigError(f"{name} must be {what} or a file's path, got {kind}")
    return files, pictures


def read_picture(
    path: str | Path,
    what: str = "reference",
    sha256: str | None = None,
    convert: Callable[[Picture], Picture] | None = None,
) -> tuple[Picture, str]:
    """The picture in a file, upright sRGB, and the file's hash.

    Raises FileNotFoundError, or ConfigError for what is no picture or, if `sha256` is given,
    another file than that; `what` it was to be is in the message.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} picture {path}")
    with naming(path):
        data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if sha256 not in (None, found):
        raise ConfigError(
            f"{path} has changed since it was the {what}: its SHA-256 is {found}, not {sha256}"
        )
    try:
        with quiet():
            return decode(data, MEGAPIXELS, convert or _READ.get(what)), found
    except BadPicture as error:
        raise ConfigError(f"{path} cannot be the {what}: {error}") from None


def shown_picture(picture: Picture, what: str) -> Picture:
    """A picture of Pillow's, upright sRGB. Raises ConfigError where it cannot be the `what`."""
    try:
        return converted(picture, _READ.get(what, upright_rgb))
    except BadPicture as error:
        raise ConfigError(f"this picture cannot be the {what}: {error}") from None


def read_video(path: str | Path, kind: str, sha256: str | None = None) -> tuple[Clip, str]:
    """The clip in a file, as much of it as a `video_kind` may take, and the file's hash.

    Errors are those of `read_picture`.
    """
    path = Path(path).expanduser()
    clip = read_clip(path, most=LONGEST_VIDEO, last="tail" in kind)
    found = hash_file(path)
    if sha256 not in (None, found):
        raise ConfigError(
            f"{path} has changed since it was the video: its SHA-256 is {found}, not {sha256}"
        )
    return clip, found


def read_given(
    settings: Settings, pictures: Mapping[str, Any] | None = None
) -> tuple[Given, Settings]:
    """What a run is given, and its settings with the hashes of the files.

    `pictures` stand in for files. Raises FileNotFoundError, ConfigError.
    """
    found: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    objects = pictures or {}
    for name in PICTURES:
        path = getattr(settings, name)
        if name in objects and name == "video":
            found[name] = objects[name]
        elif path is not None and name == "video":
            digest = getattr(settings, f"{name}_sha256")
            found[name], hashes[f"{name}_sha256"] = read_video(path, settings.video_kind, digest)
        elif name in objects:
            found[name] = shown_picture(objects[name], name)
        elif path is not None and (name, path) != ("mask", ALPHA):
            digest = getattr(settings, f"{name}_sha256")
            found[name], hashes[f"{name}_sha256"] = read_picture(path, name, digest)
    if settings.mask == ALPHA and "mask" not in objects:
        found["mask"] = _alpha(settings, objects.get("image"))
    return _ready(Given(**found), settings), replace(settings, **hashes)


def _alpha(settings: Settings, image: Picture | None) -> Picture:
    """The image's holes as its mask."""
    try:
        if image is not None:
            return upright_holes(image).convert("RGB")
        if settings.image is not None:
            return read_picture(settings.image, "mask", convert=upright_holes)[0].convert("RGB")
    except BadPicture as error:
        raise ConfigError(f"the image cannot be its own mask: {error}") from None
    raise ConfigError("a mask that is the alpha of an image needs an image")


def _ready(given: Given, settings: Settings) -> Given:
    """Bordered, and with a reference that is to be painted as its own image."""
    for names in (CONTROLS, IP_IMAGES):
        for first, second in pairwise(names):
            if getattr(given, first) is None and getattr(given, second) is not None:
                raise ConfigError(f"{second} is given without {first}: give that too")
    if settings.loop:
        if given.reference is None or given.last is not None:
            raise ConfigError("loop ends a clip with its reference: give a reference and no last")
        given = replace(given, last=given.reference)
    if given.video is None and settings.video_kind != Settings.video_kind:
        raise ConfigError("video_kind says which part of a clip a video is: give a video")
    if given.video is not None and (given.reference or given.last):
        raise ConfigError("a clip goes on from a video or from pictures: give one of the two")
    if given.mask is not None and given.image is None and given.reference is not None:
        given = replace(given, image=given.reference)
    if given.mask is not None and given.image is not None and given.mask.size != given.image.size:
        (w, h), (width, height) = given.mask.size, given.image.size
        raise ConfigError(
            f"a mask is as large as its image: this one has {w} x {h} pixels, the image "
            f"{width} x {height}"
        )
    if settings.expand is not None:
        if given.image is None:
            raise ConfigError("expand draws a border round an image: give an image")
        # What is kept is seen beside it: next to black the autoencoder would see a shadow.
        stretched = settings.noise_mask
        image, mask = expanded(given.image, given.mask, settings.expand, stretched=stretched)
        given = replace(given, image=image, mask=mask)
    for name, needed in (("mask_crop", "mask"), ("soft_mask", "mask"), ("canny", "control")):
        value = getattr(settings, name)
        if value is not None and value is not False and getattr(given, needed) is None:
            raise ConfigError(f"{name} says how a {needed} is taken: give a {needed}")
    if settings.mask_crop is not None and given.control is not None:
        raise ConfigError("mask_crop draws a part of an image, which a control does not follow")
    return given
