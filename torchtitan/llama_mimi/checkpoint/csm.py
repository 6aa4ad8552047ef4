"""Conversion of the hierarchical architecture to a Hugging Face `CsmForConditionalGeneration` with its codec.

``embed_text_tokens`` is the whole embedding table, so token ids are the same as in a flattened model. In texts for the
CSM of transformers, ``<0_0>`` stands for a frame and ``<0_1>`` for the end of the speech. ``</audio>`` does not stand
for the end, because transformers 5.x warns about the id of ``</audio>``. Codes are less than K. A frame with K at every
level is the end of the speech. K is also the padding code.
"""

from typing import Any

import torch
from transformers import CsmConfig, CsmDepthDecoderConfig, MimiModel

from llama_mimi.audio.mimi import load_codec_config
from llama_mimi.checkpoint.huggingface import NETWORK_KEYS, LlamaMimiStateDictAdapter, hf_config, model_args, on_whole
from llama_mimi.common.hub import load_pretrained
from llama_mimi.model.llama import LlamaMimiArgs

# Names of the two networks in CSM.
BACKBONE, DEPTH = "backbone_model", "depth_decoder.model"
# Names of the output matrices of levels 1 to Q - 1, and of the embeddings of codes.
HEADS = "depth_decoder.codebooks_head.weight"
AUDIO_TABLES = (f"{BACKBONE}.embed_tokens.embed_audio_tokens.weight", f"{DEPTH}.embed_tokens.weight")


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


class CsmStateDictAdapter(LlamaMimiStateDictAdapter):
    """TorchTitan's adapter for initial weights from a converted folder, without the copies that `csm_state` adds."""

    def __init__(self, args: LlamaMimiArgs, hf_assets_path: str | None) -> None:
        super().__init__(args, hf_assets_path)
        networks = ("", BACKBONE, args), ("depth.", DEPTH, args.depth)
        self._networks = [(prefix, name, LlamaMimiStateDictAdapter(own, None)) for prefix, name, own in networks]
        names = {"tok_embeddings": "embed_text_tokens", "depth.projection": f"{DEPTH}.inputs_embeds_projector"}
        if not (args.predicts_text and args.enable_weight_tying):
            names["output"] = "text_head" if args.predicts_text else "lm_head"
        self._names = {f"{key}.weight": f"{name}.weight" for key, name in names.items()}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        theirs = {name: state_dict[key] for key, name in self._names.items()}
        for prefix, name, adapter in self._networks:
            parts = (f"{prefix}layers.", f"{prefix}norm.")
            own = {key.removeprefix(prefix): weight for key, weight in state_dict.items() if key.startswith(parts)}
            theirs |= {key.replace("model", name, 1): weight for key, weight in adapter.to_hf(own).items()}
        heads, by_level = state_dict["depth.heads.weight"], (self.model_args.num_quantizers - 1, -1)
        theirs[HEADS] = on_whole(lambda weight: weight.unflatten(0, by_level).mT.contiguous(), heads)
        return theirs

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: hf_state_dict[name] for key, name in self._names.items()}
        for prefix, name, adapter in self._networks:
            parts = (f"{name}.layers.", f"{name}.norm.")
            own = {key.replace(name, "model", 1): w for key, w in hf_state_dict.items() if key.startswith(parts)}
            state |= {prefix + key: weight for key, weight in adapter.from_hf(own).items()}
        state["depth.heads.weight"] = on_whole(lambda heads: heads.mT.flatten(0, 1), hf_state_dict[HEADS])
        return state


def csm_state(state: dict[str, torch.Tensor], args: LlamaMimiArgs) -> dict[str, torch.Tensor]:
    """Convert a model's weights to the names and shapes of `CsmForConditionalGeneration`; omit the codec's weights."""
    theirs = CsmStateDictAdapter(args, None).to_hf(state)
    K, Q, vocabulary = args.codebook_size, args.num_quantizers, args.vocabulary
    # Rows are sorted by level. Each level has its K codes, then the end, which is `</audio>` at every level.
    ids_KQ = vocabulary.ids_from_codes(torch.arange(K)[:, None].expand(K, Q)).view(K, Q)
    rows = torch.cat([ids_KQ, torch.full((1, Q), vocabulary.audio_end_id)]).T.flatten()
    table_VD = state["tok_embeddings.weight"]
    theirs |= dict.fromkeys(AUDIO_TABLES, table_VD[rows])
    if args.predicts_text:
        theirs["lm_head.weight"] = state.get("output.weight", table_VD)[rows[: K + 1]]
    return theirs


def codec_state(config: CsmConfig, codec: str) -> dict[str, torch.Tensor]:
    """Return the weights of the codec, without the quantizer levels that the model does not use."""
    weights = load_pretrained(MimiModel, codec, what="codec", dtype="auto").state_dict()
    with torch.device("meta"):
        names = MimiModel(config.codec_config).state_dict()
    return {f"codec_model.{name}": weights[name] for name in names}
