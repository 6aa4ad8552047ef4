"""Reading a job config: a TOML file and what the command line overrides."""

import dataclasses
import difflib
import os
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torchtitan.config import ConfigManager, JobConfig

import llama_mimi.job_config
from llama_mimi.common.errors import UserError
from llama_mimi.training.checks import check_settings

# Keys and sections of the first release's config files, and their names here; None has no counterpart.
RELEASED_KEYS = {
    "model.num_quantizers": "codec.num_quantizers",
    "model.pretrained": "checkpoint.initial_load_in_hf",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.compile": "compile.enable",
    "training.task": "data.task",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "validation.enabled": "validation.enable",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "float8": "quantize.linear.float8",
    "evaluation": None,
}


def parse_config(args: list[str]) -> Any:
    """Parse the arguments of the command line, and check the settings without reading other files.

    Raises:
        UserError: the config file is not readable, a key is unknown, or the settings cannot run.
    """
    config_class = ConfigManager._merge_configs(JobConfig, llama_mimi.job_config.JobConfig)
    path = _config_file(args)
    if path is not None:
        values = _read_toml(path)
        _check_release(values, path)
        _check_keys(config_class, values, prefix="", path=path)
    try:
        job_config = ConfigManager(config_class).parse_args(args)
    except AssertionError as error:  # some of TorchTitan's settings check themselves
        raise UserError(f"TorchTitan refuses a setting: {error}") from error
    check_settings(job_config, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    return job_config


def _config_file(args: list[str]) -> Path | None:
    for flag, following in zip(args, [*args[1:], ""], strict=False):
        key, has_value, value = flag.partition("=")
        if key.replace("-", "_") == "__job.config_file":
            return Path(value if has_value else following)
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the config file '{path}' cannot be read ({error}); name a TOML file") from error


def _check_release(values: dict[str, Any], path: Path) -> None:
    """Name all keys of the first release at once, with what they are called here."""
    found = {*values, *(f"{name}.{key}" for name, keys in values.items() if isinstance(keys, dict) for key in keys)}
    if old := [key for key in RELEASED_KEYS if key in found]:
        changes = [f"rename '{key}' to '{new}'" if (new := RELEASED_KEYS[key]) else f"remove '{key}'" for key in old]
        raise UserError(f"'{path}' has keys of the first release; {', '.join(changes)}")


def _check_keys(config_class: Any, values: dict[str, Any], prefix: str, path: Path) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1)
            hint = f"the nearest valid key is '{prefix}{nearest[0]}'" if nearest else "--help lists all keys"
            raise UserError(f"'{path}' sets the unknown key '{prefix}{key}'; {hint}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UserError(f"'{path}' sets '{prefix}{key}' to {value!r}; it is a section, written [{prefix}{key}]")
            _check_keys(fields[key], value, f"{prefix}{key}.", path)
        elif not fits(value, fields[key]):
            wanted = str(fields[key]) if get_origin(fields[key]) else getattr(fields[key], "__name__", "")
            wanted = ", ".join(map(repr, get_args(fields[key]))) if get_origin(fields[key]) is Literal else wanted
            raise UserError(f"'{path}' sets '{prefix}{key}' to {value!r}; it takes {wanted}")


def fits(value: Any, annotation: Any) -> bool:
    """Return True if a TOML value has the annotated type; TorchTitan checks other types."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation in (int, str, bool):
        return type(value) is annotation
    return annotation is not type(None)
