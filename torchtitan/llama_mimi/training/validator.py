"""TorchTitan's validator: the mean loss over a held-out corpus."""

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.components.validate import Validator
from torchtitan.tools.utils import device_type

from llama_mimi.common.errors import UserError
from llama_mimi.data.build import build_validation_dataloader
from llama_mimi.data.packing import Batch
from llama_mimi.tokens.tokenizer import IGNORE_INDEX, SpeechTokenizer
from llama_mimi.training.loss import reduce_sums
from llama_mimi.training.metrics import SpeechMetrics


class SpeechValidator(Validator):
    """Validation on the same tokens each time: the corpus is encoded once, and its ids are kept.

    The loss is the mean over all targets, not over batches. Ranks with fewer batches continue with padding, so that
    the collectives of a sharded model match.
    """

    metrics_processor: SpeechMetrics

    def __init__(
        self, *, job_config: Any, dp_world_size: int, dp_rank: int, tokenizer: SpeechTokenizer, **parts: Any
    ) -> None:
        self.__dict__.update(parts, job_config=job_config, tokenizer=tokenizer)  # Validator's own opens a text corpus
        self._loader = build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config)
        self._batches: list[Batch] | None = None

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        (model,) = model_parts
        model.eval()
        start = time.perf_counter()
        num_targets = torch.zeros((), device=device_type, dtype=torch.int64)
        for input_dict, labels in self._padded_batches():
            labels = labels.to(device_type)
            input_dict = {key: value.to(device_type) for key, value in input_dict.items()}
            inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(input_dict, labels, model_parts)
            num_targets += (labels != IGNORE_INDEX).sum()
            with self.validation_context(), self.maybe_enable_amp:
                self.loss_fn(model(inputs, **extra_inputs, **extra_kwargs), labels)  # its meter is read below
        if not reduce_sums(num_targets, self.parallel_dims.get_optional_mesh("loss")):
            raise UserError(f"no clip of validation.dataset '{self._loader.dataset}' can be used; name another")
        self.metrics_processor.log_validation(step, seconds=time.perf_counter() - start)
        model.train()

    def _padded_batches(self) -> Iterator[Batch]:
        """Yield this rank's batches, then padding until the last rank is done."""
        if self._batches is None:
            self._batches = list(self._loader)
        num_batches = torch.tensor(len(self._batches), device=device_type)
        dist.all_reduce(num_batches, op=dist.ReduceOp.MAX)
        yield from self._batches
        for _ in range(int(num_batches) - len(self._batches)):
            yield self._loader.empty_batch()
