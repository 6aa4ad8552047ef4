"""LoRA, compared with PEFT, with other numbers of ranks, and with a run that was not interrupted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from peft import PeftModel
from test_training import flags_of, loss_of_clips, plain_step, settings_of, train
from torch.optim import AdamW
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import build_model_converters
from transformers import LlamaForCausalLM

from llama_mimi.checkpoint.conversion import convert_checkpoint
from llama_mimi.checkpoint.dcp import load_step, read_index
from llama_mimi.checkpoint.huggingface import LlamaMimiStateDictAdapter, hf_config, model_args
from llama_mimi.checkpoint.lora import adapter_config, merge_lora, save_adapter
from llama_mimi.common.errors import UserError
from llama_mimi.data.build import build_dataloader
from llama_mimi.model.architectures import build_model
from llama_mimi.model.llama import FLAVORS, LlamaMimiArgs, forward_flops
from llama_mimi.model.lora import LORA_WEIGHTS
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, load_speech_tokenizer
from llama_mimi.training.checks import check_files
from llama_mimi.training.config_file import parse_config
from llama_mimi.training.loss import LevelMeter, SpeechLoss

LORA = {"model.converters": "lora", "checkpoint.initial_load_in_hf": True, "lora.rank": 4, "optimizer.lr": 1e-2}


def initial_model(folder: Path, settings: dict[str, Any]):
    """Return a config, the arguments, and a model with LoRA as at the start of a run."""
    job_config = parse_config(flags_of(folder, settings | {"model.hf_assets_path": folder}))
    stock = LlamaForCausalLM.from_pretrained(folder)
    args = model_args(stock.config)
    args.num_quantizers, args.codebook_size = 4, 256
    with torch.device("meta"):
        model = build_model(args)
    build_model_converters(job_config, ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)).convert(model)
    model.to_empty(device="cpu")
    torch.manual_seed(job_config.debug.seed)
    with torch.no_grad():
        model.init_weights()
    weights = stock.state_dict()
    if args.enable_weight_tying:
        del weights["lm_head.weight"]
    model.load_state_dict(LlamaMimiStateDictAdapter(args, None).from_hf(weights), strict=False)
    return job_config, args, model


def as_peft(base: Path, folder: Path, state: dict[str, torch.Tensor], args: LlamaMimiArgs, config: dict[str, Any]):
    """Return a PEFT model with the weights of a model with LoRA."""
    _, adapter = merge_lora({name: weight.clone() for name, weight in state.items()}, args, config)
    save_adapter(folder, adapter, config)
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder, is_trainable=True)


def random_lora(folder: Path, is_tied: bool, targets: str):
    """Return the result of `initial_model`, with random LoRA weights; write its base model to ``folder``."""
    torch.manual_seed(0)
    args = LlamaMimiArgs(**vars(FLAVORS["tiny"]) | {"vocab_size": 1538, "enable_weight_tying": is_tied})
    LlamaForCausalLM(hf_config(args)).save_pretrained(folder)
    job_config, args, model = initial_model(folder, LORA | {"lora.train_audio_tokens": True, "lora.targets": targets})
    for name, weight in model.named_parameters():
        if name.endswith(LORA_WEIGHTS):
            torch.nn.init.normal_(weight, std=0.05)
    return job_config, args, model


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_a_step_equals_peft(tmp_path, is_tied):
    """The loss, all gradients, and the logits of the adapter and of the merged model are equal to 1e-5."""
    job_config, args, model = random_lora(tmp_path, is_tied, "q_proj,k_proj,o_proj,down_proj")
    config = adapter_config(job_config, args)
    peft = as_peft(tmp_path, tmp_path / "adapter", model.state_dict(), args, config)
    ids_BL = torch.randint(512, 1538, (2, 40))
    labels_BL = torch.roll(ids_BL, -1, 1)
    labels_BL[:, -7:] = IGNORE_INDEX
    loss = SpeechLoss(args.vocabulary, LevelMeter(), [1.0] * 5)(model(ids_BL), labels_BL)
    logits_BLV = peft(ids_BL).logits
    wanted = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    loss.backward()
    wanted.backward()

    # The gradients take the way of the weights to PEFT's names and order of rows.
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(name.endswith(LORA_WEIGHTS) for name in trained)
    zeros = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    _, gradients = merge_lora(zeros | {name: weight.grad for name, weight in trained.items()}, args, config)
    assert len(gradients) == len(trained)
    for name, weight in peft.named_parameters():
        if weight.requires_grad:
            own = gradients.pop(name.replace(".default", ""))
            torch.testing.assert_close(own, weight.grad, atol=1e-5 * weight.grad.abs().max().item(), rtol=1e-5)
    assert not gradients


def test_compiled_blocks_and_flops(tmp_path):
    """A compiled block has the same output, and frozen weights need a third less FLOPs."""
    _, args, model = random_lora(tmp_path, True, "v_proj")
    x_BLD = torch.randn(2, 12, args.dim)
    block = model.layers["0"]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_BLD, model.freqs_cis, None), block(x_BLD, model.freqs_cis, None))
    inside = sum(p.numel() for part in (model.layers, model.norm, model.tok_embeddings) for p in part.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    rows = model.tok_embeddings.audio_rows.numel()  # the output matrix has as many weights as without LoRA
    trained = inside - frozen - rows
    assert model.flops_per_target(64) == 4 * (frozen - rows) + 6 * (trained + rows) + 3 * forward_flops(0, args, 64)


def test_packed_ranks_equal_peft(model_folder, tmp_path):
    """Two ranks equal a plain loop over PEFT, clip by clip; one rank goes on from their checkpoint as PEFT does."""
    settings = settings_of(model_folder) | LORA | {"data.packing": "pack", "lora.train_audio_tokens": True}
    settings |= {"optimizer.lr": 5e-4, "checkpoint.interval": 3, "checkpoint.keep_latest_k": 0}
    whole = train(2, tmp_path / "run", settings | {"training.steps": 6})
    job_config, args, model = initial_model(model_folder, settings)
    peft = as_peft(model_folder, tmp_path / "adapter", model.state_dict(), args, adapter_config(job_config, args))
    trained = [weight for weight in peft.parameters() if weight.requires_grad]
    optimizer = AdamW(trained, lr=5e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tokenizer = load_speech_tokenizer(str(model_folder), str(TINY / "mimi"), 4)
    loaders = [build_dataloader(2, rank, tokenizer, job_config) for rank in range(2)]
    ranks = [iter(loader) for loader in loaders]
    for step in range(1, 4):
        loss = loss_of_clips(peft, [next(batches) for batches in ranks])
        assert whole[step] == pytest.approx(loss.item(), abs=1e-4), step
        plain_step(peft, optimizer, loss)
    assert whole[6] < whole[1]

    last = tmp_path / "run/checkpoint/step-3"
    moments = [name for name in read_index(last).state_dict_metadata if name.endswith(".exp_avg")]
    assert moments and all(name.removesuffix(".exp_avg").endswith(LORA_WEIGHTS) for name in moments)
    for old in ("checkpoint/step-6", "tb"):
        shutil.rmtree(tmp_path / "run" / old)
    resumed = train(1, tmp_path / "run", settings | {"training.steps": 5})
    state = {"dataloader": {"position": ""}}
    load_step(state, last, verify=True)
    loader = build_dataloader(1, 0, tokenizer, job_config)
    loader.load_state_dict(state["dataloader"])
    for step, batch in zip((4, 5), loader, strict=False):
        loss = loss_of_clips(peft, [batch])
        assert resumed[step] == pytest.approx(loss.item(), abs=1e-4), step
        plain_step(peft, optimizer, loss)

    convert_checkpoint(tmp_path / "run/checkpoint", tmp_path / "converted")
    ids_BL = torch.randint(0, 1538, (2, 30))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "converted")
    torch.testing.assert_close(merged(ids_BL).logits, peft(ids_BL).logits, atol=1e-3, rtol=0)
    stock = LlamaForCausalLM.from_pretrained(model_folder)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "converted/adapter")
    torch.testing.assert_close(adapted(ids_BL).logits, merged(ids_BL).logits, atol=1e-5, rtol=1e-5)


def test_lora_weights_are_not_dropped(model_folder, tmp_path):
    """Runs without LoRA, or with another LoRA, do not load a step. A moved base model does not matter."""
    settings = LORA | {"model.hf_assets_path": model_folder, "training.steps": 1, "checkpoint.interval": 1}
    train(1, tmp_path / "run", settings)

    def check(name: str, **changes: Any) -> None:
        check_files(parse_config(flags_of(tmp_path / name, settings | changes)))

    check("run", **{"model.hf_assets_path": shutil.copytree(model_folder, tmp_path / "moved")})
    with pytest.raises(UserError, match="was made with r = 4, but the current value is 8"):
        check("run", **{"lora.rank": 8})
    del settings["model.converters"]
    with pytest.raises(UserError, match=r"model.converters = \['lora'\], but the current value is \[\]; set the old"):
        check("run")
    step = {"checkpoint.initial_load_in_hf": False, "checkpoint.initial_load_path": tmp_path / "run/checkpoint/step-1"}
    with pytest.raises(UserError, match="step-1' contains LoRA weights; convert it with"):
        check("another", **step)
    shutil.rmtree(tmp_path / "run/checkpoint")
    train(1, tmp_path / "run", settings)
    check("run")


def test_dropout_is_the_same_after_resuming(model_folder, tmp_path):
    settings = LORA | {"model.hf_assets_path": model_folder, "lora.dropout": 0.5, "checkpoint.interval": 2}
    whole = train(2, tmp_path / "run", settings | {"training.steps": 4})
    shutil.rmtree(tmp_path / "run/checkpoint/step-4")
    shutil.rmtree(tmp_path / "run/tb")
    assert train(2, tmp_path / "run", settings | {"training.steps": 4}) == {step: whole[step] for step in (3, 4)}
    without = train(2, tmp_path / "without", settings | {"training.steps": 4, "lora.dropout": 0.0})
    assert without[4] != whole[4]
