"""Measures what a variant costs: loading, prefill, decode, memory, bytes on disk; and how fast fine-tuning runs.

Why an ML engineer does this beside quality: a variant that is 3 % worse and half the size is a decision, and a decision
needs both numbers from the same machine on the same day.

    python -m ml_engineer_track benchmark [--preset tiny] [--path MODEL_FOLDER]

How it is measured: fixed prompt and output lengths, greedy, one warm-up, at least five repeats, percentiles over the
repeats' raw samples. Names and formulas are vLLM's (`ttft`: time to first token; `tpot`: mean time per further token;
`itl`: each of these times) and optimum-benchmark's (`max_ram`, `max_process_vram`). Memory is read in a process of its own,
because an earlier model would otherwise be counted; it is forked from one that did nothing but import, so that of a library only
what the model touches is counted. What this device cannot tell is null.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ml_engineer_track.models import load_model
from ml_engineer_track.progress import progress, stream
from shared.errors import UserError
from shared.hardware import busy, device, fingerprint, synchronize
from shared.metrics import percentiles
from shared.settings import Benchmark, Settings


def benchmark(settings: Settings, folders: dict[str, str]) -> dict[str, Any]:
    """Figures of every model folder, by name, with the hardware they were read on."""
    load = busy()
    if load > 0.3:
        told = f"  benchmark: other programs use {load:.0%} of this machine; the times will be worse than it can do"
        print(told, file=stream(), flush=True)
    figures = {name: measure(path, settings.benchmark, name) for name, path in folders.items()}
    return {"hardware": fingerprint(), "busy_share": load, "settings": settings.benchmark.model_dump(), "models": figures}


def measure(path: str, options: Benchmark, name: str) -> dict[str, Any]:
    """Latency and memory of one model folder. Times in seconds, memory in bytes."""
    started = time.perf_counter()
    model = load_model(path)
    synchronize(model.device)
    load_seconds = time.perf_counter() - started
    batches = {}
    with progress(f"benchmark {name}", total=len(options.batch_sizes) * (options.repeats + 1)) as bar:
        for size in options.batch_sizes:
            runs = []
            for repeat in range(options.repeats + 1):
                run = one_run(model, size, options.prompt_tokens, options.new_tokens)
                if repeat:  # the first run warms up
                    runs.append(run)
                bar.update(1)
            batches[str(size)] = summarise(runs, size, options)
    del model
    folder = Path(path)
    disk = sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else None
    return {"load_seconds": load_seconds, "disk_bytes": disk, "memory": memory(path, options), "batch": batches}


@torch.no_grad()
def one_run(model: PreTrainedModel, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """One prefill and `new_tokens - 1` decode steps; returns `ttft` and the list `itl`, in seconds."""
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt_tokens), generator=generator).to(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    synchronize(model.device)
    now = time.perf_counter()
    ttft, gaps = now - start, []
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronize(model.device)
        before, now = now, time.perf_counter()
        gaps.append(now - before)
    return {"ttft": ttft, "itl": gaps}


def summarise(runs: list[dict[str, Any]], batch: int, options: Benchmark) -> dict[str, Any]:
    """Percentiles over the repeats. Throughputs are totals over totals, never means of rates."""
    ttft = [run["ttft"] for run in runs]
    itl = [gap for run in runs for gap in run["itl"]]
    tpot = [sum(run["itl"]) / len(run["itl"]) for run in runs]
    return {
        "repeats": len(runs),
        "ttft": percentiles(ttft),
        "tpot": percentiles(tpot),
        "itl": percentiles(itl),
        "prefill_throughput": batch * options.prompt_tokens * len(runs) / sum(ttft),
        "decode_throughput": batch * len(itl) / sum(itl),
        "raw": {"ttft": ttft, "tpot": tpot},
    }


def memory(path: str, options: Benchmark) -> dict[str, Any]:
    """Peak memory of a fresh process that loads the model and answers once, in bytes.

    `max_ram` is the process's peak resident set, `model_ram` what of it loading and running the model added;
    `max_process_vram` and `max_allocated` are null without a GPU.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    # Importing torch and transformers takes longer than the pass: the fork server does it once, for every fresh process.
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_memory_pass, path, options.prompt_tokens, options.new_tokens).result()
        except UserError:
            raise
        except Exception as error:  # whatever stops a model from loading or answering there, or the kernel from letting it
            raise UserError(f"the memory pass failed: {error}", path, "Is there enough free memory?") from None


def _memory_pass(path: str, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    process = psutil.Process()
    before = process.memory_info().rss
    model = load_model(path)
    one_run(model, 1, prompt_tokens, new_tokens)
    peak = peak_rss(process)
    cuda = device().type == "cuda"
    return {
        "max_ram": peak,
        "model_ram": peak - before,
        "max_process_vram": torch.cuda.max_memory_reserved() if cuda else None,
        "max_allocated": torch.cuda.max_memory_allocated() if cuda else None,
    }


def peak_rss(process: psutil.Process) -> int:
    """The kernel's own high-water mark where it keeps one (Linux), else the resident set now."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(process.memory_info().rss)
