"""Other projects on the same model, in the same table: llama.cpp, `transformers serve`, TRL, optimum-benchmark, lm-eval.

Why: a figure of one's own means little until somebody else's tool has measured the same model on the same machine. Whatever
way it comes out, it is shown.

    python -m benchmarks peers [--only llama.cpp,trl] [--install] [--model FOLDER]

Each peer lives in a virtual environment of its own below artifacts/peers/, because their requirements clash with this
project's and with one another. `--install` makes the environments; without it, peers that have none are skipped with a line.
Servers get the load of benchmarks/load.py; libraries run a small program (below) inside their environment that prints one
JSON line. The project's own side of each comparison runs in the same session, before the peer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import results, runner, serving, training
from benchmarks.budget import REPEATS, Task
from benchmarks.load import Target
from benchmarks.results import Record, Result
from shared.errors import UserError
from shared.settings import ROOT

NAME = "peers"
HOME = results.PEERS
#: Seconds of load a server gets, and seconds a library's program may take.
SERVER_SECONDS, PROGRAM_SECONDS = 120.0, 1200
BATCH = 8


@dataclass(frozen=True)
class Peer:
    """A peer: what to install, the module whose presence shows that it is there, and how it is measured."""

    packages: tuple[str, ...]
    module: str
    measure: Callable[[Path, str], Iterator[Record]]


def run(only: Sequence[str], install: bool, model: str | None, out: Path | None) -> tuple[Result, Path]:
    """Measure the peers that are there. UserError for an unknown name; a peer that fails is skipped with its last line."""
    if unknown := [name for name in only if name not in PEERS]:
        raise UserError(f"unknown peer {unknown[0]!r}", "PEERS", f"Use some of: {', '.join(PEERS)}")
    models = runner.find_models(model)
    environment = results.environment()
    runner.warn_if_busy(environment)
    result = Result(
        test_time=results.now(), suites=[NAME], environment=environment,
        models={name: results.model_info(path) for name, path in models.items()},
    )  # fmt: skip
    path = out or results.RUNS / f"{result.test_time.replace(':', '').replace('+0000', 'Z')}-peers.json"
    folder = next(iter(models.values()))
    task = Task(NAME, models, float("inf"))
    measured = [(name, PEERS[name]) for name in only or PEERS]
    for name, peer in measured:
        try:
            python = environment_of(name, peer, install)
            print(f"{name}", flush=True)
            for record in peer.measure(python, folder):
                result.records.append(record)
                results.write(result, path)
                print(f"  {runner.line(record)}", flush=True)
        except UserError as error:
            task.skip(f"{name}: {error}")
    result.status, result.skipped = "complete", task.skipped
    results.write(result, path)
    return result, path


def environment_of(name: str, peer: Peer, install: bool) -> Path:
    """The Python of a peer's environment, made first when asked. UserError when it is not there or cannot be made."""
    if not peer.packages:
        return Path(sys.executable)
    folder = HOME / name
    python = folder / "bin" / "python"
    if install and not _has(python, peer.module):
        print(f"{name}: installing {' '.join(peer.packages)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        # torch first, from the CPU index where there is no GPU: left to the resolver, pip takes several GB of CUDA.
        index = [] if torch.cuda.is_available() else ["--index-url", "https://download.pytorch.org/whl/cpu"]
        pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "torch.txt")]
        for arguments in ([*index, "torch"], [*peer.packages]):
            done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"cannot be installed: {_last_line(done.stderr)}")
    if not _has(python, peer.module):
        raise UserError("not installed here", "", f"Run `make bench-peers PEERS={name} INSTALL=1`")
    return python


# --- servers: the same load as ours ----------------------------------------------------------------------------------


def llama_cpp(python: Path, model: str) -> Iterator[Record]:
    """llama-cpp-python's server on the model as GGUF (Q8_0), written by the project's own exporter."""
    from ml_engineer_track.gguf_export import write_gguf
    from ml_engineer_track.models import load_model, load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(load_model(model), load_tokenizer(model), path, "q8_0")
        yield from of_server("llama.cpp (llama-cpp-python), Q8_0", llama_cpp_command(python, path), "model")


def llama_cpp_command(python: Path, gguf: Path) -> list[str]:
    # Left to its defaults it decodes on half of the cores.
    threads = str(os.cpu_count() or 1)
    command = [str(python), "-m", "llama_cpp.server", "--model", str(gguf), "--port", "{port}", "--n_ctx", "2048"]
    # Left to its defaults it breaks off the reply it is writing whenever another request comes.
    return [*command, "--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false"]


def transformers_serve(python: Path, model: str) -> Iterator[Record]:
    """`transformers serve` with continuous batching, from this project's own environment."""
    yield from of_server("transformers serve, continuous batching", transformers_command(python, model), model)


def transformers_command(python: Path, model: str) -> list[str]:
    command = [str(python.parent / "transformers"), "serve", model, "--continuous-batching", "--port", "{port}"]
    # Left to its defaults it reserves many gigabytes for the cache.
    return [*command, "--cb-block-size", "32", "--cb-num-blocks", "1024", "--cb-max-batch-tokens", "2048"]


def ours(python: Path, model: str) -> Iterator[Record]:
    """The project's own server and its training loop: the side the others stand beside."""
    del python
    yield from of_server("this project's server", None, None, model)
    trainer = training.Trainer(model, "lora")
    trainer.step(BATCH)
    steps = [trainer.step(BATCH) for _ in range(REPEATS)]
    record = training.describe("this project's loop", "lora", BATCH, steps, trainer.flops_per_token, None)
    yield record.model_copy(update={"suite": NAME})


def of_server(name: str, command: list[str] | None, served: str | None, model: str = "") -> Iterator[Record]:
    """The closed-loop sweep of the serving suite, against a server started by `command`."""
    task = Task(NAME, {}, SERVER_SECONDS)
    with serving.server(model, command) as (url, process):
        target, words, note = serving.calibrate(Target(url, served or serving.first_model(url)))
        for record in serving.closed_sweep(task, target, name, words, 0.8 * SERVER_SECONDS):
            metrics = {**record.metrics, "max_ram": serving.peak_memory(process)}
            yield record.model_copy(
                update={"suite": NAME, "metrics": metrics, "note": "; ".join([note, *task.skipped]).strip("; ")}
            )


# --- libraries: a program inside their environment -------------------------------------------------------------------

TRL = """
import json, sys, time, torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
model, batch, row, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(model)
ids = torch.randint(3, len(tokenizer), (batch * (steps + 1), row), generator=torch.Generator().manual_seed(0)).tolist()
seconds = []
class Clock(TrainerCallback):
    def on_step_begin(self, *a, **k): self.start = time.perf_counter()
    def on_step_end(self, *a, **k):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        seconds.append(time.perf_counter() - self.start)
cuda = torch.cuda.is_available()
config = SFTConfig(output_dir=sys.argv[5], per_device_train_batch_size=batch, max_steps=steps + 1, max_length=row, bf16=True,
                   use_cpu=not cuda, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
                   gradient_checkpointing=False)
trainer = SFTTrainer(model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), args=config,
                     train_dataset=Dataset.from_dict({"input_ids": ids}), processing_class=tokenizer,
                     peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
                     callbacks=[Clock()])
trainer.train()
print(json.dumps({"tokens_per_second": [batch * row / s for s in seconds[1:]]}))
"""
LM_EVAL = """
import json, sys, time, torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model, batch, row, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
lm = HFLM(pretrained=model, batch_size=batch, device="cuda" if torch.cuda.is_available() else "cpu")
tokens = torch.randint(3, len(lm.tokenizer), (batch * (rounds + 1), row), generator=torch.Generator().manual_seed(0)).tolist()
rates = []
for n in range(rounds + 1):
    rows = tokens[n * batch:(n + 1) * batch]
    start = time.perf_counter()
    lm._loglikelihood_tokens([(("", ""), r[: row // 2], r[row // 2 :]) for r in rows], disable_tqdm=True)
    rates.append(batch * row / (time.perf_counter() - start))
print(json.dumps({"tokens_per_second": rates[1:]}))
"""
OPTIMUM = """
import json, sys, torch
from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, PyTorchConfig
model, batch, prompt, new, repeats = sys.argv[1], *map(int, sys.argv[2:6])
inference = InferenceConfig(latency=True, memory=False, warmup_runs=1, iterations=repeats, duration=0,
                            input_shapes={"batch_size": batch, "sequence_length": prompt},
                            generate_kwargs={"max_new_tokens": new, "min_new_tokens": new})
device = "cuda" if torch.cuda.is_available() else "cpu"
backend = PyTorchConfig(model=model, device=device, no_weights=False, task="text-generation")
report = Benchmark.launch(BenchmarkConfig(name="peer", scenario=inference, launcher=InlineConfig(), backend=backend))
prefill, decode = report.prefill.latency.values, report.decode.latency.values
print(json.dumps({"ttft_ms": [1e3 * s for s in prefill], "tpot_ms": [1e3 * s / (new - 1) for s in decode],
                  "output_throughput": [batch * (new - 1) / s for s in decode]}))
"""


def trl(python: Path, model: str) -> Iterator[Record]:
    """TRL's SFTTrainer: LoRA on rows of one length, as the training suite takes them; loss over whole rows."""
    case: dict[str, str | int | float] = {"what": "steps", "method": "lora", "batch": BATCH, "row_tokens": training.ROW_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        found = program(python, TRL, model, BATCH, training.ROW_TOKENS, REPEATS, folder)
    note = "loss over whole rows: SFTTrainer computes logits for the prompt too"
    yield of_samples("TRL SFTTrainer", case, found, note)


def lm_eval(python: Path, model: str) -> Iterator[Record]:
    """lm-eval's log-likelihood scoring: half of each row given, half scored."""
    case: dict[str, str | int | float] = {"what": "scoring", "batch": BATCH, "row_tokens": training.ROW_TOKENS}
    yield of_samples("lm-eval, log-likelihood", case, program(python, LM_EVAL, model, BATCH, training.ROW_TOKENS, REPEATS))


def optimum_benchmark(python: Path, model: str) -> Iterator[Record]:
    """optimum-benchmark's own measurement of the latency suite's first case."""
    from benchmarks.latency import NEW_TOKENS, PROMPT_TOKENS

    case: dict[str, str | int | float] = {"what": "run", "batch": 1, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    found = program(python, OPTIMUM, model, 1, PROMPT_TOKENS, NEW_TOKENS, REPEATS)
    yield of_samples("optimum-benchmark, PyTorch", case, found)


def of_samples(name: str, case: dict[str, str | int | float], samples: dict[str, list[float]], note: str = "") -> Record:
    """Percentiles of times; rates over repeats of equal work are harmonic means (total work over total time)."""
    metrics: dict[str, float | None] = {}
    for key, values in samples.items():
        if key.endswith("_ms"):
            metrics |= results.spread(key.removesuffix("_ms"), values)
        else:
            metrics[key] = len(values) / sum(1 / value for value in values)
    return Record(suite=NAME, model=name, case=case, metrics=metrics, samples=samples, note=note)


def program(python: Path, source: str, *arguments: object) -> dict[str, list[float]]:
    """Run a program in a peer's environment and read the JSON line it ends with. UserError with its last line otherwise."""
    command = [str(python), "-c", source, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROGRAM_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"took longer than {PROGRAM_SECONDS} s") from None
    if done.returncode:
        raise UserError(f"failed: {_last_line(done.stderr)}")
    try:
        return dict(json.loads(_last_line(done.stdout)))
    except (ValueError, TypeError):
        raise UserError(f"printed no figures: {_last_line(done.stdout)}") from None


def _has(python: Path, module: str) -> bool:
    if not python.exists():
        return False
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:200]


#: The project's own side first; what has no packages runs in this environment.
PEERS: dict[str, Peer] = {
    "ours": Peer((), "ml_engineer_track", ours),
    "transformers": Peer((), "transformers", transformers_serve),
    "llama.cpp": Peer(("llama-cpp-python[server]",), "llama_cpp", llama_cpp),
    "trl": Peer(("trl", "peft"), "trl", trl),
    "optimum-benchmark": Peer(("optimum-benchmark", "transformers<4.58"), "optimum_benchmark", optimum_benchmark),
    "lm-eval": Peer(("lm-eval[hf]",), "lm_eval", lm_eval),
}
