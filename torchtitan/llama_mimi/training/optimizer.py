"""TorchTitan's optimizer and schedule, with the settings of the config in a resumed run, too."""

import json
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.tools.logging import logger

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json, write_atomically

RECORD = "optimizer.json"  # in the run's folder: the settings of its last start
# Checkpoints have moments of one optimizer only.
FIXED = ("optimizer.name", "optimizer.early_step_in_backward")


def build_speech_optimizers(*args: Any, **kwargs: Any) -> OptimizersContainer:
    """Build TorchTitan's optimizers; from a checkpoint they load moments, but no settings."""
    optimizers = build_optimizers(*args, **kwargs)
    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(_with_own_settings)
    return optimizers


def _with_own_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [own | {"params": saved["params"]} for own, saved in groups]}


class SpeechSchedulers(LRSchedulersContainer):
    """TorchTitan's schedulers; from a checkpoint they load the number of steps, but no learning rate."""

    def __init__(self, *args: Any) -> None:
        self.schedulers = build_lr_schedulers(*args).schedulers

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self.schedulers:
            factors = (factor(state_dict["last_epoch"]) for factor in scheduler.lr_lambdas)
            lrs = [base_lr * factor for base_lr, factor in zip(scheduler.base_lrs, factors, strict=True)]
            scheduler.load_state_dict({**state_dict, "base_lrs": scheduler.base_lrs, "_last_lr": lrs})
            for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr


def check_changes(job_config: Any) -> None:
    """Log the settings of a resumed run's optimizer that differ from those of its last start.

    Raises:
        UserError: one of them cannot change.
    """
    folder = job_config.job.dump_folder
    now, earlier = _settings(job_config), read_json(folder, RECORD)
    if earlier is None:
        logger.warning(f"'{folder}' has no {RECORD}, so the optimizer takes this config's settings without comparison")
        return
    changed = {key: (earlier[key], now[key]) for key in now.keys() & earlier.keys() if earlier[key] != now[key]}
    for key in FIXED:
        if key in changed and "optimizer" not in job_config.checkpoint.exclude_from_loading:
            raise UserError(
                f"{key} is {now[key]!r}, but the run in '{folder}' has {earlier[key]!r}; set that, or start with new "
                "moments by --checkpoint.exclude_from_loading optimizer"
            )
    if changed:
        logger.warning("changed settings: " + ", ".join(f"{key} {a} -> {b}" for key, (a, b) in sorted(changed.items())))


def save_settings(job_config: Any) -> None:
    """Write the settings that `check_changes` compares; call it on one rank."""
    write_atomically(job_config.job.dump_folder, RECORD, json.dumps(_settings(job_config), indent=1).encode())


def _settings(job_config: Any) -> dict[str, Any]:
    config = job_config.to_dict()
    sections = {f"{name}.{key}": v for name in ("optimizer", "lr_scheduler") for key, v in config[name].items()}
    return sections | {"training.steps": job_config.training.steps}  # the schedule depends on it
