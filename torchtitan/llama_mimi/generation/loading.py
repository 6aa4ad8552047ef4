"""Load a checkpoint of either architecture from a Hugging Face folder or the hub."""

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, CsmForConditionalGeneration, LlamaForCausalLM

from llama_mimi.audio.mimi import MimiCodec, has_sliding_window, local_codec
from llama_mimi.common.choices import DEFAULT_CODEC, Architecture, GenerationPrecision
from llama_mimi.common.cpu import available_device
from llama_mimi.common.errors import UserError
from llama_mimi.common.hub import load_pretrained
from llama_mimi.generation.flattened import FlattenedModel
from llama_mimi.generation.hierarchical import CsmWithTextHead, HierarchicalModel
from llama_mimi.generation.speech_model import DECODER_DTYPES, SpeechModel
from llama_mimi.tokens.tokenizer import SpeechTokenizer
from llama_mimi.tokens.vocabulary import extend_tokenizer

# For each model_type of a config: the class in transformers, the class in this package, and the architecture.
MODELS: dict[str, tuple[Any, type[SpeechModel], Architecture]] = {
    "llama": (LlamaForCausalLM, FlattenedModel, "flattened"),
    "csm": (CsmForConditionalGeneration, HierarchicalModel, "hierarchical"),
}


def load_speech_model(
    model_name: str,
    *,
    codec_name: str | None = None,
    sliding_window: bool | None = None,
    device: str | None = None,
    dtype: GenerationPrecision | None = None,
) -> SpeechModel:
    """Load a checkpoint; raise a `UserError` if files are missing, or if decoder, tokenizer and codec do not match.

    The arguments are flags of inference.py. With the ``dtype`` "int8", the model reads prompts in bfloat16,
    and generates with int8 weights. The codec always runs in float32.
    """
    place = available_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_pretrained(AutoConfig, model_name, what="model")
    if (kind := config.model_type) not in MODELS:
        raise UserError(f"'{model_name}' is of type '{kind}'; choose a model of type {' or '.join(MODELS)}")
    stock_class, model_class, architecture = MODELS[kind]
    if getattr(config, "text_head", None) == "separate":
        stock_class = CsmWithTextHead
    dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if (is_int8 := dtype == "int8") and place.type != "cpu":
        raise UserError(f"--dtype is 'int8', but --device is '{place}'; set --device cpu, or choose another --dtype")
    decoder = load_pretrained(stock_class, model_name, what="model", dtype=DECODER_DTYPES[dtype])
    num_quantizers = getattr(decoder.config, "num_quantizers", None)
    if num_quantizers is None:
        problem = f"the config of '{model_name}' lacks num_quantizers, so the model is not a speech language model"
        raise UserError(f"{problem}; convert a training checkpoint with scripts/convert_dcp_to_hf.py")
    named = getattr(decoder.config, "codec", None) or DEFAULT_CODEC
    if sliding_window is None:
        sliding_window = has_sliding_window(decoder.config)
    codec_name = codec_name or local_codec(named, model_name) or named
    codec = MimiCodec(codec_name, num_quantizers, place, sliding_window=sliding_window)
    text_tokenizer = load_pretrained(AutoTokenizer, model_name, what="tokenizer")
    tokenizer = SpeechTokenizer(*extend_tokenizer(text_tokenizer, codec.codebook_size, num_quantizers), architecture)
    rows = getattr(decoder.config, "text_vocab_size", decoder.config.vocab_size)
    if rows != tokenizer.vocabulary.size:
        needed = f"{num_quantizers} quantizers of '{codec.name}' need {tokenizer.vocabulary.size}"
        raise UserError(f"'{model_name}' has {rows} vocabulary entries, but {needed}; set --codec to the model's codec")
    top_p = decoder.generation_config.top_p  # as in Llama-Mimi's first release; the caller sets all other options
    return model_class(decoder.to(place).eval(), tokenizer, codec, 1.0 if top_p is None else top_p, is_int8)
