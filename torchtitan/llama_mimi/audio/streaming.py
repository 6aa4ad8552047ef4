"""Chunked decoding with the same result as decoding all codes at once."""

from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiConvTranspose1d

from llama_mimi.audio.mimi import MimiCodec

CHUNK_FRAMES = 250  # 20 s, the longest clip of the paper's training


def decode_long(codec: MimiCodec, codes_TQ: torch.Tensor) -> torch.Tensor:
    """Decode codes (T, Q) as `MimiCodec.decode` does, but in chunks, so that long audio needs less memory."""
    stream = DecodingStream(codec)
    return torch.cat([stream.decode(chunk_TQ) for chunk_TQ in codes_TQ.split(CHUNK_FRAMES)])


class DecodingStream:
    """Decoder that decodes a clip chunk by chunk. It returns the audio of `MimiCodec.decode`, up to rounding.

    Mimi's decoder is causal. Its Transformer has a key-value cache. Each convolution reads its last inputs again, and
    the output for these inputs is discarded. With the codec's sliding window, the memory does not grow over time.
    """

    def __init__(self, codec: MimiCodec) -> None:
        self._codec = codec
        self._cache = DynamicCache(config=codec.model.config)
        self._inputs: dict[torch.nn.Module, torch.Tensor] = {}  # last inputs of each convolution
        decoder = [module for name, module in codec.model.named_modules() if not name.startswith(("encoder", "down"))]
        self._convolutions = [module for module in decoder if isinstance(module, MimiConv1d | MimiConvTranspose1d)]

    def decode(self, codes_TQ: torch.Tensor) -> torch.Tensor:
        """Decode the next codes (T, Q), T >= 1, to mono float32 samples (T * frame_size,) on the CPU."""
        with ExitStack() as hooks:  # for this call only, because other code may use the codec between two calls
            for module in self._convolutions:
                hooks.callback(module.register_forward_pre_hook(self._prepend).remove)
                hooks.callback(module.register_forward_hook(self._drop).remove)
            return self._codec.decode(codes_TQ, decoder_past_key_values=self._cache)

    def _prepend(self, module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        earlier_1CT = self._inputs.get(module)
        return args if earlier_1CT is None else (torch.cat([earlier_1CT, args[0]], dim=2),)

    def _drop(self, module: Any, args: tuple[torch.Tensor], outputs_1CT: torch.Tensor) -> torch.Tensor:
        conv, (inputs_1CT,) = module.conv, args
        if isinstance(module, MimiConv1d):  # has stride 1 in Mimi's decoder
            reach, made = conv.dilation[0] * (conv.kernel_size[0] - 1), 1
        else:
            reach, made = -(-conv.kernel_size[0] // conv.stride[0]) - 1, conv.stride[0]
        num_earlier = self._inputs[module].shape[2] if module in self._inputs else 0
        self._inputs[module] = inputs_1CT[..., max(inputs_1CT.shape[2] - reach, 0) :].clone()
        return outputs_1CT[..., num_earlier * made :]
