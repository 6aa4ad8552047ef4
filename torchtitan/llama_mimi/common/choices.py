"""Default and allowed values of settings. This module does not import PyTorch."""

from typing import Literal

DEFAULT_CODEC = "kyutai/mimi"
# Encoding of a partial last frame: "pad" fills the frame with zeros, as in training; "codec" lets each convolution pad
# the frame, as in the first release of Llama-Mimi.
LastFrame = Literal["codec", "pad"]
Precision = Literal["float32", "bfloat16"]
DecoderPrecision = Literal["float32", "bfloat16", "float16"]  # Llama-Mimi's first release is evaluated in float16
GenerationPrecision = DecoderPrecision | Literal["int8"]
VocabularyKind = Literal["llama", "audio"]
Architecture = Literal["flattened", "hierarchical"]
# Training tasks. tokens/tokenizer.py shows the sequences and the targets.
Task = Literal["audio", "tts", "asr", "interleaved", "text"]
TEXT_TARGETS = ("asr", "interleaved", "text")
AUDIO_TARGETS: tuple[Task, ...] = ("audio", "tts", "interleaved")
# Layers that LoRA can change: their names in PEFT and transformers, and in TorchTitan.
LORA_TARGETS = {
    **{"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"},
    **{"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
}
