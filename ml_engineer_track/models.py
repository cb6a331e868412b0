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
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

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


def check_model_path(path: str, where: str = "", wanted: str = "MODEL takes a model folder or a hub id") -> None:
    """Fail early, before any work, when a local path holds no model. Hub ids are checked when they load."""
    folder = Path(path)
    if folder.exists() or path.startswith((".", "/", "~")):
        if not (folder / "config.json").exists():
            raise UserError("no model here (config.json is missing)", where or path, wanted)
        if not list(folder.glob("*.safetensors")):
            raise UserError("no weights here (*.safetensors is missing)", where or path, "Only safetensors are read")


def local_model(given: str, option: str) -> Path:
    """The folder of a model that was named on the command line: itself, or the snapshot of a hub id, fetched if need be.

    What can only be a folder is never looked for on the hub. UserError when there is no model; `option` is where it was named.
    """
    folder, parent = Path(given).expanduser(), Path(given).parent
    looks_local = given.startswith((".", "/", "~", "\\")) or given.endswith("/") or given.count("/") > 1 or not given.strip()
    if folder.exists() or looks_local or (parent != Path() and parent.is_dir()):
        check_model_path(str(folder.absolute()), f"{option} {given}", f"{option} takes a model folder or a hub id")
        return folder
    with _clear_errors(f"{option} {given}"):
        kinds = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        folder = Path(snapshot_download(given, allow_patterns=kinds, ignore_patterns=["*/*"]))
    check_model_path(str(folder), f"{option} {given}", f"{option} takes a model folder or a hub id")
    return folder


def check_same_tokenizer(teacher: str, student: str, where: str) -> None:
    """UserError when the models in two folders number any token differently: their probabilities belong to different words.

    Equal tokenizers are not enough: a model's matrices may have more rows than its tokenizer has tokens.
    """
    tokenizers = load_tokenizer(teacher), load_tokenizer(student)
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    advice = "Teacher, student and draft must share one tokenizer"
    if ours != theirs or tokenizers[0].eos_token_id != tokenizers[1].eos_token_id:
        other = sum(theirs.get(token) != number for token, number in ours.items())
        what = f"the tokenizers differ ({len(ours)} and {len(theirs)} tokens, {other} of them with another number)"
        raise UserError(what, where, advice)
    sizes = [vocabulary_size(path) for path in (teacher, student)]
    if sizes[0] != sizes[1]:
        what = f"the tokenizers are the same, but vocab_size differs ({sizes[0]} and {sizes[1]} tokens in config.json)"
        raise UserError(what, where, f"{advice} and one vocab_size")


def vocabulary_size(path: str) -> int:
    """Rows of the model's embedding, as its config says."""
    with _clear_errors(path):
        return int(AutoConfig.from_pretrained(path).get_text_config().vocab_size)


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
