"""Merges the adapter into the base and stores the result in fewer bits.

Why an ML engineer does this: decoding is limited by how many bytes of weights move per token, and memory decides what
fits on the device at all. NF4 (4-bit normal floats, double quantisation; Dettmers et al. 2023) needs about a quarter of
bf16's bytes in every projection; embeddings and norms stay as they are. q8_0 and q4_0 are GGUF files (gguf_export.py), which the
CPU engine of the server reads and transformers does not: they are evaluated through that engine.

    python -m ml_engineer_track quantize [--preset tiny]

The adapter is merged into *full-precision* weights, also after QLoRA: merging into 4-bit weights rounds twice.
A quantised model is saved before its first forward pass, because bitsandbytes repacks weights for the CPU in place; then it
is loaded back, and both must give the same numbers.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.finetune import Tuned
from ml_engineer_track.gguf_export import FILE_NAME, write_gguf
from ml_engineer_track.models import load_merged, load_model, load_tokenizer, weight_bytes
from shared.errors import UserError
from shared.files import need_disk
from shared.settings import Settings

#: Variants that only the server's CPU engine reads.
SERVED_ONLY = ("q8_0", "q4_0")


@dataclass(frozen=True)
class Variants:
    """Model folders by variant name (`bf16` is the merged model), and their weights in memory, in bytes."""

    folders: dict[str, str]
    weight_bytes: dict[str, int]

    @property
    def loadable(self) -> dict[str, str]:
        """The folders that `from_pretrained` loads."""
        return {name: folder for name, folder in self.folders.items() if name not in SERVED_ONLY}

    @property
    def served(self) -> dict[str, str]:
        """The folders with a GGUF file, which the server's CPU engine loads."""
        return {name: folder for name, folder in self.folders.items() if name in SERVED_ONLY}


def quantize(settings: Settings, tuned: Tuned) -> Variants:
    """Write `bf16` and every variant of the settings below `settings.work/quantize`, each a complete model folder."""
    work = settings.work / "quantize"
    tokenizer = load_tokenizer(settings.model_path)
    merged = merge(tuned)
    need_disk(work, 2 * weight_bytes(merged))
    folders, sizes = {"bf16": work / "bf16"}, {}
    for name in [v for v in settings.quantize.variants if v in SERVED_ONLY]:  # from full precision, before it is rounded
        folders[name] = work / name
        sizes[name] = save_gguf(merged, tokenizer, folders[name], name)
    save(merged.to(torch.bfloat16), tokenizer, folders["bf16"])
    del merged
    sizes["bf16"] = weight_bytes(load_model(str(folders["bf16"]), torch.bfloat16))
    for name in [v for v in settings.quantize.variants if v not in SERVED_ONLY]:
        folders[name] = work / name
        model = load_model(str(folders["bf16"]), variant=name)
        save(model, tokenizer, folders[name])
        sizes[name] = weight_bytes(model)
        check_round_trip(model, load_model(str(folders[name])), name)
    order = ["bf16", *settings.quantize.variants]
    return Variants({name: str(folders[name]) for name in order}, {name: sizes[name] for name in order})


def merge(tuned: Tuned) -> PreTrainedModel:
    """The tuned model as one set of float32 weights."""
    return load_merged(tuned.base, tuned.adapter, torch.float32)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer aside and swap the folder in."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def save_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, kind: str) -> int:
    """Write the model as a GGUF file, with its config and tokenizer beside it; bytes of the file, which hold the weights."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.config.save_pretrained(aside)
    model.generation_config.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    write_gguf(model, tokenizer, aside / FILE_NAME, kind)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return (folder / FILE_NAME).stat().st_size


@torch.no_grad()
def check_round_trip(model: PreTrainedModel, loaded: PreTrainedModel, name: str) -> None:
    """Both must give identical logits, and tied embeddings must still be one matrix. UserError otherwise."""
    ids = torch.arange(3, 35, device=model.device)[None, :] % model.config.vocab_size
    if not torch.equal(model(ids).logits, loaded(ids).logits):
        raise UserError(f"variant {name} does not load back as it was saved", "quantize", "Check the bitsandbytes version")
    tied = model.config.tie_word_embeddings
    if tied and loaded.get_input_embeddings().weight.data_ptr() != loaded.get_output_embeddings().weight.data_ptr():
        raise UserError(f"variant {name} lost its tied embeddings", "quantize", "Check the transformers version")
