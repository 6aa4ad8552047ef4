"""Checkpoints with damaged files, checkpoints on a full disk, and checkpoints with code in a pickle."""

import errno
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor as process_executor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from llama_mimi.checkpoint import storage
from llama_mimi.checkpoint.dcp import load_step, read_index
from llama_mimi.checkpoint.storage import METADATA, CheckedWriter, check_step, first_failure
from llama_mimi.common.errors import UserError

DATA = "__0_0.distcp"
STATE = {
    "weight": torch.arange(64.0),
    "optimizer": {"half": torch.ones(3, dtype=torch.bfloat16), "betas": (0.9, 0.95), "name": "AdamW"},
}


class Attack:
    """Object whose pickle runs code when it is loaded."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def save(step, **more):
    dcp.save(STATE | more, storage_writer=CheckedWriter(step), no_dist=True)
    return step


def load(step, verify=True, read=load_step):
    half = torch.zeros(3, dtype=torch.bfloat16)
    state = {"weight": torch.zeros(64), "optimizer": {"half": half, "betas": (), "name": ""}}
    read(state, step, verify)
    return state


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_checkpoint_is_read_with_and_without_our_reader(tmp_path):
    dcp.save(STATE, checkpoint_id=tmp_path / "stock", no_dist=True)
    stock = load(save(tmp_path / "ours"), read=lambda state, step, verify: dcp.load(state, checkpoint_id=step))
    for read in (stock, load(tmp_path / "ours"), load(tmp_path / "stock")):
        assert torch.equal(read["weight"], STATE["weight"]) and read["optimizer"]["betas"] == (0.9, 0.95)
        assert torch.equal(read["optimizer"]["half"], STATE["optimizer"]["half"])


@pytest.mark.parametrize("name", [DATA, METADATA])
def test_a_flipped_bit_is_found_wherever_it_is(name, tmp_path):
    path = save(tmp_path) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 23):
        flip(path, place)
        with pytest.raises(UserError, match=f"{name}' is .*damaged"):
            check_step(tmp_path, verify=True)
        path.write_bytes(whole)
    check_step(tmp_path, verify=True)


def test_a_flipped_bit_is_found_while_it_is_loaded(tmp_path):
    path = save(tmp_path) / DATA
    flip(path, path.read_bytes().index(STATE["weight"].numpy().tobytes()) + 100)
    with pytest.raises(UserError, match=f"{DATA}' is damaged: a checksum does not match"):
        load(tmp_path)
    assert not torch.equal(load(tmp_path, verify=False)["weight"], STATE["weight"]), "only --no-verify reads it"


def test_an_error_names_the_last_good_step(tmp_path):
    for number in (2, 4, 6, 8):
        save(tmp_path / f"step-{number}")
    flip(tmp_path / "step-6" / DATA, 1000)
    (tmp_path / "step-8" / DATA).unlink()
    with pytest.raises(UserError, match=r"step-8/.*' is missing .* to use the last good step '.*/step-4'"):
        read_index(tmp_path / "step-8")
    shutil.rmtree(tmp_path / "step-2")
    os.truncate(tmp_path / "step-4" / DATA, 100)
    with pytest.raises(UserError, match=r"step-4/.*' is .*truncated: it has 100 of .* contain another usable step"):
        read_index(tmp_path / "step-4")


def test_an_index_runs_no_code(tmp_path):
    index = save(tmp_path / "step-2") / METADATA
    metadata = pickle.loads(index.read_bytes())
    metadata.planner_data = {"weight": Attack(tmp_path / "attacked")}
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"\.metadata' is missing or damaged \(it refers to posix.mkdir"):
        read_index(tmp_path / "step-2")
    assert not (tmp_path / "attacked").exists()


def test_an_entry_runs_no_code(tmp_path):
    save(tmp_path / "step", attack=Attack(tmp_path / "attacked"))
    with pytest.raises(UserError, match="the entry 'attack' contains objects other than numbers"):
        load_step({"attack": None}, tmp_path / "step", verify=True)
    assert not (tmp_path / "attacked").exists()


def test_another_process_writes_checksums_and_reports_a_full_disk(tmp_path, monkeypatch):
    """In TorchTitan's mode async_with_pinned_mem, another process writes the checkpoint."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    settings = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
    try:
        dcp.async_save(STATE, storage_writer=CheckedWriter(tmp_path / "step"), **settings).result()
        flip(tmp_path / "step" / DATA, 1000)
        with pytest.raises(UserError, match="a checksum does not match"):
            load(tmp_path / "step")
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointException, match="Not a directory: '.*/file/step'"):
            dcp.async_save(STATE, storage_writer=CheckedWriter(tmp_path / "file" / "step"), **settings).result()
    finally:
        process_executor._CHECKPOINT_PROCESS = None  # ends the process
        dist.destroy_process_group()


@pytest.mark.parametrize(("stage", "method"), [("_ChecksumStream", "write"), ("_SealingFileSystem", "rename")])
def test_a_full_disk_is_named(stage, method, tmp_path, monkeypatch):
    def no_room(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path / "step")
    monkeypatch.setattr(getattr(storage, stage), method, no_room)
    with pytest.raises(CheckpointException) as error:
        save(tmp_path / "step")
    assert isinstance(failure := first_failure(error.value), OSError) and failure.errno == errno.ENOSPC
    assert not (tmp_path / "step" / METADATA).exists(), "a step that was saved again in part is not complete"
