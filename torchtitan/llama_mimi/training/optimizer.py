"""TorchTitan's optimizer and schedule; a resumed run uses the settings of its config."""

from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.tools.logging import logger

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json
from llama_mimi.common.resume import require_same

# Settings of a parameter group that a checkpoint contains, under the names of the config.
SETTINGS = {
    "initial_lr": "optimizer.lr",
    "betas": "optimizer.beta1 and beta2",
    "eps": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay",
}


def build_speech_optimizers(*args: Any, **kwargs: Any) -> OptimizersContainer:
    """Build TorchTitan's optimizers; from a checkpoint they load moments, but no settings."""
    optimizers = build_optimizers(*args, **kwargs)
    for optimizer in optimizers:
        optimizer.register_load_state_dict_pre_hook(_with_own_settings)
    return optimizers


def _with_own_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the saved state with the settings of this run, and log those that differ.

    Raises:
        UserError: the moments are those of another optimizer.
    """
    own = optimizer.param_groups[0]
    saved = own | state["param_groups"][0]
    names = ("Adam", "AdamW")
    require_same(
        {"optimizer.name": names[saved["decoupled_weight_decay"]]},
        {"optimizer.name": names[own["decoupled_weight_decay"]]},
        "the checkpoint",
        "set it as before, or start with new moments by --checkpoint.exclude_from_loading optimizer",
    )
    differing = {name: (saved[key], own[key]) for key, name in SETTINGS.items() if saved[key] != own[key]}
    _log_changes(differing, "the checkpoint")
    groups = zip(optimizer.param_groups, state["param_groups"], strict=True)
    return {**state, "param_groups": [own | {"params": saved["params"]} for own, saved in groups]}


def _log_changes(differing: dict[str, tuple[Any, Any]], since: str) -> None:
    if differing and (not dist.is_initialized() or dist.get_rank() == 0):
        changes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in sorted(differing.items()))
        logger.warning(f"settings changed since {since}: {changes}")


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


def log_schedule_changes(job_config: Any) -> None:
    """Log the settings of a resumed run's schedule that differ from those of its last start."""
    with suppress(UserError):  # a config that cannot be read is written again
        name = job_config.job.save_config_file
        if name and (earlier := read_json(job_config.job.dump_folder, name)) is not None:
            now, before = _schedule(job_config.to_dict()), _schedule(earlier)
            differing = {key: (before.get(key), now[key]) for key in now if now[key] != before.get(key)}
            _log_changes(differing, "the last start")


def _schedule(config: dict[str, Any]) -> dict[str, Any]:
    schedule = {f"lr_scheduler.{key}": value for key, value in (config.get("lr_scheduler") or {}).items()}
    return schedule | {"training.steps": (config.get("training") or {}).get("steps")}  # the schedule depends on it
