"""Pictures in archives: webdataset tars and parquet files. Nothing is unpacked to the disk."""

from __future__ import annotations

import functools
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fluxjax.config import ConfigError
from fluxjax.json_input import parse_json
from fluxjax.picture_files import EXTENSIONS, BadPicture
from fluxjax.train.data.item import (
    MAX_BYTES,
    MAX_CAPTION_BYTES,
    Caption,
    Item,
    bad_item,
    file_stamp,
    read_caption,
    shown,
)
from fluxjax.train.data.settings import DataSettings


def tar_items(path: Path, name: str, settings: DataSettings) -> Iterator[Item]:
    """A webdataset: members with the same name up to the first dot are one sample."""
    samples, refused, problem = _tar_samples(path)
    for key, members in sorted(samples.items()):
        # `key.before.png` goes with a picture, and is none by itself.
        plain = [e for e in members if e in EXTENSIONS]
        extension = min(plain or (e for e in members if e.endswith(EXTENSIONS)), default=None)
        if extension is None:
            continue
        where, (offset, length) = f"{name}/{key}{extension}", members[extension]
        caption = _tar_caption(path, members, settings)
        large = "the member is more than a picture can be" if length > MAX_BYTES else ""
        if found := refused.get(key) or caption.problem or large:
            yield bad_item(where, found)
            continue
        beside = functools.partial(_tar_beside, path, f"{name}/{key}", members)
        yield _tar_item(path, where, (offset, length), caption.text)._replace(beside=beside)
    if problem:
        yield bad_item(name, f"the rest of this tar is lost: {problem}")


_Members = dict[str, tuple[int, int]]  # of one sample: extension -> (offset, length)


def _tar_samples(path: Path) -> tuple[dict[str, _Members], dict[str, str], str]:
    """The samples by name, why some of them are not used, and why what follows them is lost."""
    samples: dict[str, _Members] = {}
    refused: dict[str, str] = {}
    size, last = path.stat().st_size, -1
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Sizes are a stranger's: a negative one would lead back to the same member.
                if member.size < 0 or tar.offset <= last:
                    return samples, refused, "a member has a negative size"
                if member.isreg() and member.offset_data + member.size > size:
                    return samples, refused, "it is cut short"
                last = tar.offset
                base = os.path.basename(member.name)
                if member.isdir() or base.startswith("."):
                    continue
                stem, _, extension = base.partition(".")
                key, extension = os.path.join(os.path.dirname(member.name), stem), "." + extension
                sample = samples.setdefault(key, {})
                if not member.isreg() or member.issparse():
                    refused[key] = f"its member {base} is a link, or no ordinary file"
                elif extension.lower() in sample:
                    refused[key] = f"its tar has several members {base}"
                sample[extension.lower()] = member.offset_data, member.size
            return samples, refused, _after_end(path, tar.offset)
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
        MemoryError,
    ) as error:
        return samples, refused, str(error) or "a header says that it is larger than memory"


def _after_end(path: Path, end: int) -> str:
    """What is wrong with the bytes from where tarfile saw the end, which are zeros in a whole tar.

    It also takes a damaged header for the end, and a file that was cut between two members.
    """
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(512)
        if not block:
            return "it has no end, as one that is cut short"
        if block.strip(b"\0"):
            return f"it is damaged at byte {end}"
        while block := file.read(2**20):
            if block.strip(b"\0"):
                return "behind its end stands more, as where several tars are joined in one file"
    return ""


def _tar_item(path: Path, where: str, place: tuple[int, int], caption: str) -> Item:
    read = functools.partial(_read, path, *place)
    return Item(shown(where), f"{file_stamp(path)}-{place[0]}-{place[1]}", caption, "", read)


def _tar_beside(path: Path, sample: str, members: _Members, companion: str) -> Item:
    """The member `key.COMPANION.png`, whatever its format."""
    found = [e for end in EXTENSIONS if (e := f".{companion.lower()}{end}") in members]
    where = f"{sample}.{companion}"
    if len(found) != 1:
        listed = f"there are {' and '.join(found)}" if found else "there is none"
        return bad_item(where, f"its sample needs one member .{companion}.*: {listed}")
    if members[found[0]][1] > MAX_BYTES:
        return bad_item(where, "the member is more than a picture can be")
    return _tar_item(path, f"{sample}{found[0]}", members[found[0]], "")


def _read(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _tar_caption(path: Path, members: _Members, settings: DataSettings) -> Caption:
    for extension in (settings.caption_extension, ".json"):
        if extension not in members:
            continue
        offset, length = members[extension]
        if length > MAX_CAPTION_BYTES:
            return Caption("", f"its caption has {length} bytes")
        value: Any = _read(path, offset, length)
        if extension == ".json":
            try:
                row = parse_json(value.decode("utf-8-sig"))
            except ValueError as error:
                return Caption("", f"its caption is not JSON in UTF-8 ({error})")
            value = row.get(settings.caption_key) if isinstance(row, dict) else None
        return read_caption(value, settings)
    return read_caption(None, settings)


def parquet_items(path: Path, name: str, settings: DataSettings) -> Iterator[Item]:
    """Rows with a picture (bytes, or Hugging Face's {bytes, path}) and a caption."""
    _import_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.num_row_groups
            _require_column(path, schema, settings.caption_key)
            _require_pictures(path, schema, settings.image_key)
            for group in range(groups):
                column = file.read_row_group(group, columns=[settings.caption_key]).column(0)
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    column = column.cast(pa.large_binary())  # so that bad UTF-8 is one row's fault
                for row, value in enumerate(column.to_pylist()):
                    caption = read_caption(value, settings)
                    item = functools.partial(_parquet_item, path, name, (group, row))
                    beside = functools.partial(_parquet_beside, path, schema, item)
                    made = item(settings.image_key)._replace(beside=beside)
                    yield made._replace(caption=caption.text, problem=caption.problem)
    except (pa.ArrowException, OSError, LookupError, ArithmeticError, UnicodeError) as error:
        yield bad_item(name, f"the rest of this parquet file is lost: {error}")


def _require_column(path: Path, schema: Any, key: str) -> None:
    count = schema.names.count(key)
    if count != 1:
        found = f"{count} columns" if count else "no column"
        raise ConfigError(f"{path} has {found} {key!r}; its columns are {', '.join(schema.names)}")


def _require_pictures(path: Path, schema: Any, key: str) -> None:
    _require_column(path, schema, key)
    kind = schema.field(key).type
    if not _holds_bytes(kind):
        raise ConfigError(f"{path}: the column {key!r} holds {kind}, not pictures' bytes")


def _parquet_item(path: Path, name: str, place: tuple[int, int], column: str) -> Item:
    read = functools.partial(_parquet_picture, path, column, *place)
    where = f"{name} row group {place[0]} row {place[1]}"
    return Item(shown(where), f"{file_stamp(path)}-{place[0]}-{place[1]}", "", "", read)


def _parquet_beside(path: Path, schema: Any, item: Callable[[str], Item], column: str) -> Item:
    """The same row's picture in another column."""
    _require_pictures(path, schema, column)
    return item(column)


def _import_parquet() -> None:
    """Raises ConfigError where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError("parquet files need pyarrow: pip install -e '.[train]'") from None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0:
        kind = kind.field(index).type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, column: str, group: int, stamp: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _parquet_picture(path: Path, column: str, group: int, row: int) -> bytes:
    import pyarrow as pa

    try:
        value = _row_group(path, column, group, file_stamp(path))[row].as_py()
    except (pa.ArrowException, LookupError, ArithmeticError) as error:
        raise BadPicture(f"its row cannot be read ({error})") from None
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None:
        raise BadPicture("its row holds no bytes")
    return value
