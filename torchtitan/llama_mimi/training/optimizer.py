"""TorchTitan's optimizer and schedule, with the settings of the config in a resumed run, too."""

from typing import Any

from torch.optim import Optimizer
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.tools.logging import logger

from llama_mimi.common.errors import UserError
from llama_mimi.common.files import read_json


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
        UserError: the optimizer is another, whose moments the checkpoint does not have.
    """
    folder = job_config.job.dump_folder
    earlier = read_json(folder, job_config.job.save_config_file) if job_config.job.save_config_file else None
    if earlier is None:
        logger.warning(f"'{folder}' has no config, so the optimizer takes this config's settings without comparison")
        return
    now, before = _settings(job_config.to_dict()), _settings(earlier)
    changed = [key for key in sorted(now) if now[key] != before.get(key)]
    if "optimizer.name" in changed and "optimizer" not in job_config.checkpoint.exclude_from_loading:
        raise UserError(
            f"optimizer.name is {now['optimizer.name']!r}, but the run in '{folder}' has "
            f"{before.get('optimizer.name')!r}; set that, or start with new moments by "
            "--checkpoint.exclude_from_loading optimizer"
        )
    if changed:
        logger.warning("changed settings: " + ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed))


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    sections = {f"{name}.{key}": v for name in ("optimizer", "lr_scheduler") for key, v in config.get(name, {}).items()}
    return sections | {"training.steps": config.get("training", {}).get("steps")}  # the schedule depends on it
