"""The GPU session: types of a sharded step on one rank, and budget, errors and all phases of the session."""

import os

import pytest
import torch
import torch.distributed as dist
import training_methods
from conftest import ROOT
from torch.distributed.tensor import DTensor, Shard
from training_methods import OURS, OURS_CSM, STOCK

from llama_mimi.model.llama import FLAVORS


@pytest.mark.parametrize("method", [OURS, OURS_CSM, STOCK])
def test_one_rank_computes_in_the_types_of_several_ranks(tmp_path, monkeypatch, method):
    """Parameters are sharded float32, and the residual stream is bfloat16; autocast would keep float32 there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setitem(FLAVORS, "tiny", FLAVORS["tiny"])  # `job_config_of` replaces it
    monkeypatch.setattr(training_methods, "IS_SHARDED", True)
    training_methods.write_stand_ins("tiny", tmp_path)
    flags = "--training.mixed_precision_param bfloat16 --training.local_batch_size 2"
    job_config = training_methods.job_config_of("tiny", tmp_path, method, flags, num_layers=2)
    built = training_methods.build_trainer(job_config, method)
    try:
        (model,), types = built.model_parts, []
        for layer in model.layers.values():
            layer.register_forward_hook(lambda layer, inputs, output: types.append((inputs[0].dtype, output.dtype)))
        built.step = 1
        built.train_step(built.batch_generator(built.dataloader))
        assert types == [(torch.bfloat16, torch.bfloat16)] * 2
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor) and parameter.placements == (Shard(0),)
            assert parameter.dtype == parameter.grad.dtype == torch.float32
    finally:
        dist.destroy_process_group()
