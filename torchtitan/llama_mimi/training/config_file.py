"""Parser of job configs. A job config consists of a TOML file and of command-line flags that override the file."""

import dataclasses
import difflib
import os
import tomllib
from argparse import ArgumentParser
from datetime import date, time
from inspect import formatannotation
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from torchtitan.config import ConfigManager, JobConfig

import llama_mimi.job_config
from llama_mimi.common.errors import UserError
from llama_mimi.training.checks import check_settings

# Replacements of keys and sections of Llama-Mimi's first release.
OLD_KEYS = {
    "model.num_quantizers": "codec.num_quantizers",
    "model.pretrained": "checkpoint.initial_load_in_hf",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.compile": "compile.enable",
    "training.task": "data.tasks",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "validation.enabled": "validation.enable",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "float8": "quantize.linear.float8",
    "evaluation": "the scripts in eval/ after training",
}


def parse_config(args: list[str]) -> Any:
    """Parse command-line arguments; raise a `UserError` for unknown keys and for invalid settings."""
    config_class = ConfigManager._merge_configs(JobConfig, llama_mimi.job_config.JobConfig)
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--job.config_file", "--job.config-file", dest="paths", action="append", default=[])
    for path in parser.parse_known_args(args)[0].paths:
        try:
            values = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"the config file '{path}' cannot be read ({error}); correct its path or syntax") from error
        _check_section(config_class, values, path)
    try:
        job_config = ConfigManager(config_class).parse_args(args)
    except AssertionError as error:  # TorchTitan checks some settings itself
        raise UserError(f"TorchTitan does not accept a setting ({error}); change this setting") from error
    check_settings(job_config, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    return job_config


def _check_section(section: Any, values: dict[str, Any], path: str, prefix: str = "") -> None:
    """Raise a `UserError` for an unknown key or a value of the wrong type in a file; ``section`` is a dataclass."""
    types = {field.name: field.type for field in dataclasses.fields(section)}
    for key, value in values.items():
        name = prefix + key
        if key not in types:
            nearest = [prefix + valid for valid in difflib.get_close_matches(key, types, n=1)]
            hint = OLD_KEYS.get(name) or " ".join(nearest) or "--help to list all keys"
            raise UserError(f"'{path}' sets the unknown key '{name}'; use {hint}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"'{path}' sets '{name}' to {value!r}; expected a section [{name}]")
            _check_section(types[key], value, path, f"{name}.")
        elif not fits(value, types[key]):
            raise UserError(f"'{path}' sets '{name}' to {value!r}; expected {formatannotation(types[key])}")


def fits(value: Any, annotation: Any) -> bool:
    """Return True if a TOML value fits a type annotation."""
    if isinstance(value, date | time):  # JSON has no such type
        return False
    try:
        TypeAdapter(annotation).validate_json(to_json(value), strict=True)
    except ValidationError:
        return False
    return True
