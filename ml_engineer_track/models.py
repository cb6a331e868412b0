"""Loading models: the one place that knows about dtypes, 4-bit storage and what can be wrong with a model path.

Sizes, templates and stop tokens always come from the model's own config and tokenizer; nothing here knows the bundled
model. Only safetensors are read and `trust_remote_code` stays off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.low_bits import is_low_bits, load_low_bits
from shared.errors import UserError
from shared.hardware import compute_dtype, device

# Every load would print a bar of its own.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def quantization(variant: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings of a variant: `nf4` (QLoRA's 4-bit normal float, double quantisation) or `int8`."""
    if variant == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return BitsAndBytesConfig(load_in_8bit=True) if variant == "int8" else None


def load_model(path: str, dtype: torch.dtype | None = None, variant: str = "") -> PreTrainedModel:
    """A causal LM in eval mode on this machine's device; `variant` quantises full-precision weights while loading.

    UserError when there are no weights, the files are damaged, or the memory does not suffice.
    """
    target = device()
    dtype = dtype or compute_dtype(target)
    if is_low_bits(path):
        with _clear_errors(path):
            return load_low_bits(path, dtype)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if config := quantization(variant, dtype):
        options["quantization_config"] = config
    with _clear_errors(path):
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    return model.eval() if getattr(model, "quantization_method", None) else model.to(target).eval()


def load_merged(path: str, adapter: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with a LoRA adapter merged in. It is merged in float32: merging into rounded weights would round twice.

    UserError as `load_model`, and when the adapter's matrices have other shapes than the model's.
    """
    from peft import PeftModel  # slow to import, and most of those who load a model merge nothing

    base = load_model(path, torch.float32)
    with _clear_errors(adapter):
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return merged.to(dtype or compute_dtype(device()))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left (generation continues at the right end). UserError without a chat template."""
    with _clear_errors(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template", path, "Use an instruct model, or add chat_template.jinja")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def check_model_path(path: str) -> None:
    """Fail early, before any work, when a local MODEL path holds no model. Hub ids are checked when they load."""
    folder = Path(path)
    if folder.exists() or path.startswith((".", "/", "~")):
        if not (folder / "config.json").exists():
            raise UserError("no model here (config.json is missing)", path, "MODEL takes a model folder or a hub id")
        if not list(folder.glob("*.safetensors")):
            raise UserError("no weights here (*.safetensors is missing)", path, "Only safetensors are read")


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, where: str) -> None:
    """UserError when the two number any token differently: then their probabilities belong to different words."""
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours == theirs and teacher.eos_token_id == student.eos_token_id:
        return
    other = sum(theirs.get(token) != number for token, number in ours.items())
    raise UserError(
        f"the tokenizers differ ({len(ours)} and {len(theirs)} tokens, {other} of them with another number)",
        where, "Teacher, student and draft must share one tokenizer",
    )  # fmt: skip


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: the model's own list and the tokenizer's end token."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Any) -> str:
    """A conversation as the model sees it, up to where its reply begins."""
    options = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared storage counted once, 4-bit statistics included."""
    seen: dict[int, int] = {}
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [t for t in state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)]
        scales = [getattr(getattr(module, part, None), "SCB", None) for part in ("state", "weight")]
        tensors += [s for s in scales if isinstance(s, torch.Tensor)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def without_cpu_fast_path(model: PreTrainedModel) -> PreTrainedModel:
    """Keep 4-bit weights unpacked on the CPU, so that training after an evaluation gets right gradients.

    bitsandbytes 0.50 repacks them for its AVX512-BF16 kernel at the first forward pass in eval mode, and a later backward
    pass then gives wrong LoRA gradients (cosine about 0.3 with the true ones) with only a warning.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def _clear_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise UserError("not enough memory to load the model", path, "Use a smaller MODEL or METHOD=qlora") from None
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise
        offline = " (the hub is switched off)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        first = str(error).strip().split("\n")[0][:160]
        raise UserError(f"cannot load the model{offline}: {first}", path, "Check the path or hub id") from None
    except Exception as error:
        if isinstance(error, RuntimeError) and "size" in str(error) and "mismatch" in str(error):
            raise UserError("weights do not fit config.json", path, "Fetch or publish the model again") from None
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"weights are damaged: {error}", path, "Fetch or publish them again") from None
        raise
