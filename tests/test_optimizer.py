"""Steps that must not change weights, and an optimizer that keeps the settings of the current config."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked_ranks import ForkedRanks
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.config.job_config import LRScheduler, Optimizer

from llama_mimi.common.errors import UserError
from llama_mimi.training.config_file import parse_config
from llama_mimi.training.optimizer import SpeechSchedulers, StepGuard, build_speech_optimizers


def spoil_steps() -> None:
    """Remove the targets of step 2. In step 4, make one gradient on rank 1 infinite after clipping."""
    from torchtitan.distributed import utils

    from llama_mimi.data.packing import BatchPacker

    batches, steps = itertools.count(1), itertools.count(1)
    pop, clip = BatchPacker.pop, utils.clip_grad_norm_

    def pop_without_targets(self):
        inputs, labels = pop(self)
        if next(batches) == 2:
            labels.fill_(-100)
        return inputs, labels

    def clip_and_spoil(parameters, *args, **kwargs):
        norm = clip(parameters, *args, **kwargs)
        if next(steps) == 4 and torch.distributed.get_rank() == 1:
            parameters[-1].grad.to_local().view(-1)[0] = torch.inf
        return norm

    BatchPacker.pop, utils.clip_grad_norm_ = pop_without_targets, clip_and_spoil


def saved(step):
    """Return the weights and moments in a checkpoint."""
    entries = FileSystemReader(step).read_metadata().state_dict_metadata.items()
    state = {name: torch.empty(entry.size) for name, entry in entries if hasattr(entry, "size")}
    dcp.load(state, checkpoint_id=step, no_dist=True)
    return state


def test_spoilt_steps_change_nothing_and_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    flags = ["--job.config_file", "config/tiny_hierarchical.toml", "--job.dump_folder", tmp_path / "run"]
    flags += ["--validation.no-enable", "--training.steps", 6, "--metrics.log_freq", 1]
    flags += ["--checkpoint.interval", 1, "--checkpoint.keep_latest_k", 3]
    ranks = ForkedRanks(2, ["-m", "llama_mimi.train", *flags], tmp_path / "log", spoil_steps)
    assert ranks.wait() == 1
    checkpoint = tmp_path / "run" / "checkpoint"
    assert "step 2 does not contain targets, so the weights do not change" in ranks.output
    assert "loss: nan" not in ranks.output
    before, empty, after = (saved(checkpoint / f"step-{step}") for step in (1, 2, 3))
    assert len(before) > 100 and all(torch.equal(before[name], empty[name]) for name in before)
    assert not torch.equal(before["layers.0.feed_forward.w1.weight"], after["layers.0.feed_forward.w1.weight"])

    assert ranks.output.count("error: at step 4, the training loss is ") == ranks.output.count("error: ") == 1
    assert "and the gradients are not finite, so the run stops without saving" in ranks.output
    assert f"the last good checkpoint is '{checkpoint}/step-3'" in ranks.output
    assert sorted(path.name for path in checkpoint.iterdir()) == ["step-1", "step-2", "step-3"], "none is purged"


@pytest.mark.parametrize(("step", "value", "stops"), [(1, 1e30, True), (2, torch.nan, False), (4, torch.nan, True)])
def test_weights_are_checked_where_they_are_saved(tmp_path, step, value, stops):
    flags = ["--checkpoint.interval", "4", "--training.steps", "10", "--job.dump_folder", str(tmp_path)]
    job_config = parse_config(["--model.name", "llama_mimi", "--model.flavor", "tiny", *flags])
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, value)
    with pytest.raises(UserError, match=f"at step {step}, the norm .*; a good check") if stops else nullcontext():
        StepGuard().check(job_config, step, [model])


@pytest.mark.parametrize("name", ["for-loop", "foreach", "fused"])
def test_an_optimizer_keeps_its_own_settings_and_loads_moments(name):
    dims = SimpleNamespace(ep_enabled=False, pp_enabled=False)
    model, guard = nn.Linear(2, 2), SimpleNamespace(before_step=lambda *args: None)

    def build(**settings):
        optimizers = build_speech_optimizers([model], Optimizer(implementation=name, **settings), dims, guard=guard)
        return optimizers, SpeechSchedulers(optimizers, LRScheduler(warmup_steps=4), 100)

    first = build(lr=1.0)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        first[0].step()
        first[1].step()
    model.zero_grad()
    same, other = build(lr=1.0), build(lr=8.0, weight_decay=0.5, beta1=0.3)
    for optimizers, schedulers in (same, other):  # in the order in which DCP loads
        schedulers.load_state_dict(first[1].state_dict())
        optimizers.load_state_dict(first[0].state_dict())
    with pytest.raises(UserError, match="was made with optimizer.name = 'AdamW', but the current value is 'Adam'"):
        build(lr=1.0, name="Adam")[0].load_state_dict(first[0].state_dict())
    (a,), (b,), (c,) = (pair[0] for pair in (first, same, other))
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    (group,) = c.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (8.0 * 3 / 4, 0.5, (0.3, 0.95))
    other[1].step()
    assert group["lr"] == 8.0
    moments = [optimizer.state_dict()["state"][0]["exp_avg"] for optimizer in (a, b, c)]
    assert moments[0].any() and all(torch.equal(moments[0], moment) for moment in moments)
