"""Writes a model folder as one GGUF file: weights in blocks of 4 or 8 bits, tokenizer and chat template inside.

Why an ML engineer does this: the engines that serve on CPUs (openvino-genai, llama.cpp) read this format, and decoding
is faster the fewer bytes a token moves. Q8_0 stores 32 weights of a row as 8-bit integers with one 16-bit scale
(8.5 bits a weight), Q4_0 as 4-bit ones (4.5 bits); matrices stay in row order, norms stay in 32 bits.

    python -m ml_engineer_track quantize        (variants q8_0 and q4_0 of the preset)

The tensor names come from the `gguf` package's own map. Two things are not in any map: Llama files hold the rows of the
query and key projections in the order of the original rotary embedding (pairs of neighbours; Hugging Face pairs a row with
the one half a head away), and a quantised row must be a multiple of 32 long, so other matrices stay in 16 bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shared.errors import UserError

FILE_NAME = "model.gguf"
BLOCK = 32
KINDS = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}

#: How a tokenizer cuts text into words before it merges bytes: the regex in tokenizer.json -> the name engines know it by.
PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": (
        "llama-bpe"
    ),
}


def write_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str) -> None:
    """Write `model` (full-precision weights) to `path` as `kind`: f16, q8_0 or q4_0.

    UserError for a model or tokenizer the format's readers do not know.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"no GGUF for models of type {config.model_type!r}", kind, f"Types: {known}; or leave the variant out")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"no GGUF for rope type {rope['rope_type']!r}", kind, "Leave the variant out of the preset")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _write_sizes(writer, config, float(rope.get("rope_theta", 10000.0)), kind)
        _write_tokenizer(writer, tokenizer, config.vocab_size)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored is None:
                raise UserError(f"tensor {name} has no place in a GGUF file", kind, "Leave the variant out of the preset")
            values = tensor.detach().to("cpu", torch.float32).numpy()
            if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
                values = rotary_order(values, heads)
            _write_tensor(writer, stored, values, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def rotary_order(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows (heads x head size, ...) from halves that rotate together to neighbours that rotate together."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any], kind: str) -> None:
    """Matrices in the wanted kind, vectors in 32 bits. Embeddings take 8 bits in a 4-bit file: they are also the output."""
    wanted = KINDS[kind]
    if values.ndim == 1:
        wanted = gguf.GGMLQuantizationType.F32
    elif values.shape[-1] % BLOCK:
        wanted = gguf.GGMLQuantizationType.F16
    elif kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        wanted = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), wanted), raw_dtype=wanted)


def _write_sizes(writer: gguf.GGUFWriter, config: Any, rope_theta: float, kind: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Byte-level BPE: tokens by id, their kinds, merges, special ids, template. UserError for other tokenizers."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise UserError("only byte-level BPE tokenizers can be written to GGUF", "", "Leave the GGUF variants out")
    added = {token["id"]: token for token in description["added_tokens"]}
    texts = {id_: text for text, id_ in model["vocab"].items()} | {id_: token["content"] for id_, token in added.items()}
    tokens, kinds = [], []
    for id_ in range(vocab_size):
        tokens.append(texts.get(id_, f"[UNUSED{id_}]"))
        if id_ in added:
            kinds.append(gguf.TokenType.CONTROL if added[id_]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if id_ in texts else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(description))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))


def pre_tokenizer(description: dict[str, Any]) -> str:
    """The name engines know this tokenizer's way of cutting words by; `default` where it has none.

    The server of this repository encodes with the model's own tokenizer and does not depend on it.
    """
    steps = description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    splits = [s["pattern"]["Regex"] for s in steps if s.get("type") == "Split" and "Regex" in s["pattern"]]
    if splits:
        return PRE_TOKENIZERS.get(splits[0], "default")
    return "smollm" if any(s.get("type") == "Digits" for s in steps) else "gpt-2"
