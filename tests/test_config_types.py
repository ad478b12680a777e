"""Every value of every configuration file: of a wrong type it is named, with its file and key."""

import dataclasses
import json
from pathlib import Path

import pytest

from fluxjax.checkpoint.component_json import config_json, read_config_json
from fluxjax.checkpoint.pipeline_folder import read_config, write_config
from fluxjax.config import TINY, ConfigError, SchedulerConfig
from fluxjax.networks import NETWORKS

pytestmark = pytest.mark.usefixtures("no_type_checks")
CONFIGS = (*NETWORKS, SchedulerConfig)
# As JSON has it, and as a sentence shows it.
WRONG = {
    '"seven"': "'seven'",
    "[1.5]": "(1.5,)",
    '{"a": 1}': "{'a': 1}",
    "true": "True",
    "2.5": "2.5",
    "7": "7",
}
# A number for all levels is diffusers' older form; pixels need another patch_size, which is said.
ANOTHER_FORM = {
    ("UNetConfig", "transformer_layers_per_block", "7"),
    ("UNetConfig", "layers_per_block", "[1.5]"),
    ("DCAutoencoderConfig", "scaling_factor", "2.5"),  # None where there is none
    *(("ControlNetConfig", "conditioning_embedding_channels", given) for given in WRONG),
}


def fits(given: str, right: object) -> bool:
    value = json.loads(given)
    if right is None:  # a size that not every model has
        return type(value) is int
    if isinstance(right, float):
        return type(value) in (int, float)
    return type(value) is type(right) and not isinstance(value, str)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_a_value_of_a_wrong_type_is_named_with_its_file_and_key(tmp_path, cls):
    path, written = tmp_path / "config.json", config_json(cls())
    fields = {field.name for field in dataclasses.fields(cls)} & written.keys()
    if cls in NETWORKS:
        fields |= NETWORKS[cls].json.unread.keys()
    assert len(fields) >= 2
    for key in fields:
        for given, shown in WRONG.items():
            right = written[key]
            if (cls.__name__, key, given) in ANOTHER_FORM:
                continue
            if fits(given, right) and not isinstance(right, list):
                continue
            path.write_text(json.dumps(written | {key: json.loads(given)}))
            with pytest.raises(ConfigError) as told:
                read_config_json(cls, path)
            said = str(told.value)
            assert said.startswith(f"{path}: ") and key in said and len(said.splitlines()) == 1
            assert shown in said or given in said, said


def test_our_own_defaults_file_likewise(tmp_path):
    write_config(tmp_path, TINY)
    path: Path = tmp_path / "fluxjax.json"
    written = json.loads(path.read_text())
    assert len(written) == 6
    for key, right in written.items():
        for given, shown in WRONG.items():
            if fits(given, right):
                continue
            path.write_text(json.dumps(written | {key: json.loads(given)}))
            with pytest.raises(ConfigError) as told:
                read_config(tmp_path)
            said = str(told.value)
            assert str(path) in said and key in said
            assert shown in said or given in said, said
