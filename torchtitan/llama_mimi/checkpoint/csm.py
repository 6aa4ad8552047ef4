"""Conversion of the hierarchical architecture to a Hugging Face `CsmForConditionalGeneration` with its codec.

``embed_text_tokens`` is the whole embedding table, so token ids are the same as in a flattened model. In texts for the
CSM of transformers, ``<0_0>`` stands for a frame and ``<0_1>`` for the end of the speech. ``</audio>`` does not stand
for the end, because transformers 5.x warns about the id of ``</audio>``. Codes are less than K. A frame with K at every
level is the end of the speech. K is also the padding code.
"""

from typing import Any

import torch
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter
from transformers import CsmConfig, CsmDepthDecoderConfig, MimiModel

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.huggingface import NETWORK_KEYS, hf_config, model_args
from llama_mimi.common.hub import load_pretrained
from llama_mimi.model.llama import LlamaMimiArgs

# Names of the two networks in CSM.
BACKBONE, DEPTH = "backbone_model", "depth_decoder.model"


def csm_config(args: LlamaMimiArgs, **extra: Any) -> CsmConfig:
    """Return the configuration of an equivalent CSM (equal logits). ``extra``: other entries, including ``codec``."""
    extra["eos_token_id"] = None  # ids are codes of one level, and none of them ends a sequence
    assert args.depth is not None
    codec = load_codec_config(extra["codec"], args.num_quantizers)
    codec.num_quantizers = args.num_quantizers  # transformers encodes prompts with all levels of this codec
    vocabulary = args.vocabulary
    if args.predicts_text:
        extra["text_head"] = "tied" if args.enable_weight_tying else "separate"
    network, depth = hf_config(args), hf_config(args.depth)
    levels = {"num_codebooks": args.num_quantizers, "vocab_size": args.codebook_size + 1}
    return CsmConfig(
        **{key: getattr(network, key) for key in NETWORK_KEYS},
        **levels,
        **extra,
        architectures=["CsmForConditionalGeneration"],
        max_position_embeddings=network.max_position_embeddings,
        text_vocab_size=vocabulary.size,
        codebook_eos_token_id=args.codebook_size,
        codebook_pad_token_id=args.codebook_size,
        audio_token_id=vocabulary.base,
        audio_eos_token_id=vocabulary.base + 1,
        tie_codebooks_embeddings=True,
        depth_decoder_config=CsmDepthDecoderConfig(
            **{key: getattr(depth, key) for key in NETWORK_KEYS},
            **levels,
            backbone_hidden_size=args.dim,
            max_position_embeddings=args.num_quantizers + 1,
        ),
        codec_config=codec,
    )


def csm_args(config: CsmConfig) -> LlamaMimiArgs:
    """Return the model arguments for a configuration (inverse of `csm_config`)."""
    args = model_args(config)
    text_head = getattr(config, "text_head", None)
    args.vocab_size, args.enable_weight_tying = config.text_vocab_size, text_head == "tied"
    args.predicts_text = text_head is not None
    args.architecture, args.depth = "hierarchical", model_args(config.depth_decoder_config)
    args.num_quantizers, args.codebook_size = config.num_codebooks, config.vocab_size - 1
    return args


def csm_state(state: dict[str, torch.Tensor], args: LlamaMimiArgs) -> dict[str, torch.Tensor]:
    """Convert a model's weights to the names and shapes of `CsmForConditionalGeneration`; omit the codec's weights."""
    theirs: dict[str, torch.Tensor] = {}
    for prefix, name, network in (("", BACKBONE, args), ("depth.", DEPTH, args.depth)):
        parts = (f"{prefix}layers.", f"{prefix}norm.")
        own = {key.removeprefix(prefix): weight for key, weight in state.items() if key.startswith(parts)}
        for key, weight in Llama3StateDictAdapter(network, None).to_hf(own).items():
            theirs[key.replace("model", name, 1)] = weight
    K, Q, vocabulary = args.codebook_size, args.num_quantizers, args.vocabulary
    # Rows are sorted by level. Each level has its K codes, then the end, which is `</audio>` at every level.
    ids_KQ = vocabulary.ids_from_codes(torch.arange(K)[:, None].expand(K, Q)).view(K, Q)
    rows = torch.cat([ids_KQ, torch.full((1, Q), vocabulary.audio_end_id)]).T.flatten()
    table_VD = state["tok_embeddings.weight"]
    codes_QD = table_VD[rows]
    output_VD = state.get("output.weight", table_VD)
    text_head = {"text_head.weight": output_VD} if args.predicts_text and not args.enable_weight_tying else {}
    heads_qVD = state["depth.heads.weight"].unflatten(0, (Q - 1, -1))
    return (
        theirs
        | text_head
        | {
            "embed_text_tokens.weight": table_VD,
            f"{BACKBONE}.embed_tokens.embed_audio_tokens.weight": codes_QD,
            f"{DEPTH}.embed_tokens.weight": codes_QD,
            "lm_head.weight": output_VD[rows[: K + 1]] if args.predicts_text else output_VD,
            f"{DEPTH}.inputs_embeds_projector.weight": state["depth.projection.weight"],
            "depth_decoder.codebooks_head.weight": heads_qVD.transpose(1, 2).contiguous(),
        }
    )


def codec_state(config: CsmConfig, codec: str) -> dict[str, torch.Tensor]:
    """Return the weights of the codec, without the quantizer levels that the model does not use."""
    weights = load_pretrained(MimiModel, codec, what="codec", dtype="auto").state_dict()
    with torch.device("meta"):
        names = MimiModel(config.codec_config).state_dict()
    return {f"codec_model.{name}": weights[name] for name in names}
