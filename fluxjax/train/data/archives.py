"""Pictures in archives: webdataset tars and parquet files. Nothing is unpacked to the disk."""

from __future__ import annotations

import functools
import os
import tarfile
from collections.abc import Iterator
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
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size, problem = path.stat().st_size, ""
    try:
        with tarfile.open(path, "r:") as tar:
            last = -1
            for member in tar:
                # Sizes are a stranger's: a negative one would lead back to the same member.
                if member.size < 0 or tar.offset <= last:
                    raise tarfile.ReadError("a member has a negative size")
                if member.isreg() and member.offset_data + member.size > size:
                    raise tarfile.ReadError("it is cut short")
                last = tar.offset
                base = os.path.basename(member.name)
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                stem, _, extension = base.partition(".")
                key = os.path.join(os.path.dirname(member.name), stem)
                place = (member.offset_data, member.size)
                samples.setdefault(key, {})["." + extension.lower()] = place
            end = tar.offset
        # tarfile takes a damaged header for the end; a real end is a block of zeros, or the file's.
        if _read(path, end, 512).strip(b"\0"):
            raise tarfile.ReadError(f"it is damaged at byte {end}")
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
        RecursionError,
    ) as error:
        problem = f"the rest of this tar is lost: {error}"
    stamp = file_stamp(path)
    for key, members in sorted(samples.items()):
        extension = min((e for e in members if e.endswith(EXTENSIONS)), default=None)
        if extension is not None:
            offset, length = members[extension]
            caption = _tar_caption(path, members, settings)
            where = f"{name}/{key}{extension}"
            if problem_here := caption.problem or (
                "the member is more than a picture can be" if length > MAX_BYTES else ""
            ):
                yield bad_item(where, problem_here)
                continue
            read = functools.partial(_read, path, offset, length)
            yield Item(shown(where), f"{stamp}-{offset}-{length}", caption.text, "", read)
    if problem:
        yield bad_item(name, problem)


def _read(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _tar_caption(
    path: Path, members: dict[str, tuple[int, int]], settings: DataSettings
) -> Caption:
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
    import_parquet()
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, groups = file.schema_arrow, file.num_row_groups
            for key in (settings.image_key, settings.caption_key):
                if key not in schema.names:
                    raise ConfigError(
                        f"{path} has no column {key!r}; its columns are {', '.join(schema.names)}"
                    )
            kind = schema.field(settings.image_key).type
            if not _holds_bytes(kind):
                raise ConfigError(
                    f"{path}: the column {settings.image_key!r} holds {kind}, not pictures' bytes"
                )
            for group in range(groups):
                column = file.read_row_group(group, columns=[settings.caption_key]).column(0)
                if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                    column = column.cast(pa.large_binary())  # so that bad UTF-8 is one row's fault
                for row, value in enumerate(column.to_pylist()):
                    caption = read_caption(value, settings)
                    where = f"{name} row group {group} row {row}"
                    read = functools.partial(_parquet_picture, path, settings.image_key, group, row)
                    stamp = f"{file_stamp(path)}-{group}-{row}"
                    yield Item(shown(where), stamp, caption.text, caption.problem, read)
    except (pa.ArrowException, OSError, LookupError, ArithmeticError, UnicodeError) as error:
        yield bad_item(name, f"the rest of this parquet file is lost: {error}")


def import_parquet() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError("parquet files need pyarrow: pip install -e '.[train]'") from None


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
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
