"""SHA-256 of every file of a folder, because Orbax restores flipped bits without an error."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fluxjax.checkpoint.component_json import write_json
from fluxjax.json_input import read_json


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def manifest_path(folder: Path) -> Path:
    """Beside the folder, not in it: `params` has `params.sha256.json`."""
    return folder.with_name(f"{folder.name}.sha256.json")


def write_manifest(folder: Path) -> None:
    """Hash every file of `folder`. Call it once the writer has finished."""
    hashes = {name: _digest(path) for name, path in _files(Path(folder)).items()}
    write_json(manifest_path(Path(folder)), hashes)


def check_manifest(folder: Path) -> None:
    """Raises ValueError naming the files that changed, are missing or are new.

    A folder without a manifest passes: others write Orbax folders too.
    """
    folder = Path(folder)
    if not manifest_path(folder).is_file():
        return
    expected = read_json(manifest_path(folder))
    found = _files(folder)
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [n for n, p in found.items() if n in expected and _digest(p) != expected[n]]
    if wrong:
        raise ValueError(
            f"{folder} is damaged: {', '.join(wrong)} differ(s) from {manifest_path(folder).name}"
        )
