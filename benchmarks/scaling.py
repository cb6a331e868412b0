"""What a second worker brings on this machine, and whether arithmetic would have said so.

Why: scaling is promised by multiplication and lost in exchange. Here the same steps (8 rows of 256 tokens, the bundled model,
LoRA) are taken by one worker on one core, by one on all cores and by several on one share of the cores each; all-reduces of
several sizes are timed beside them, and the model of `interconnect.py`, fitted to these, predicts the several from the one.

    python -m benchmarks scaling [--workers 2] [--steps 40] [--out FILE]      quiet machine; the last line is one JSON document
    python -m benchmarks readme                                               docs/cluster.md from the published run

Strong scaling: the step stays the same, its rows are shared. Speed-up is against one worker with the threads that each of the
several has; the row with all threads says whether several workers are worth more than PyTorch's own threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.interconnect import Link, all_reduce, fitted, predicted_table
from benchmarks.results import Record, Result
from benchmarks.training import REPLY_TOKENS, ROW_TOKENS
from ml_engineer_track.distributed import is_first, joined, shard, spread, world_size
from ml_engineer_track.finetune import SILENT, Example, add_adapter, backward, collate, load_base
from ml_engineer_track.progress import watched
from shared.errors import UserError
from shared.files import write_json
from shared.hardware import device, synchronize
from shared.settings import ROOT, load_settings

NAME = "scaling"
PUBLISHED = ROOT / "benchmarks" / "results" / "scaling" / "cpu.json"
ROWS, WARM_UP = 8, 3
#: Bytes of the all-reduces that are timed beside that of the gradients, and how often each is.
SIZES, REPEATS = (4, 2**16, 2**20, 2**22), 30


def run(workers: int, steps: int, out: Path | None) -> tuple[Result, Path]:
    """Every group in turn, each in processes of its own. UserError when the cores do not go round, or a group fails."""
    cores = os.cpu_count() or 1
    if not 1 < workers <= cores or ROWS % workers:
        fix = f"Use a divisor of {ROWS} from 2 to {cores}"
        raise UserError(f"{workers} workers cannot be measured on {cores} cores with {ROWS} rows a step", "--workers", fix)
    started, threads = time.perf_counter(), cores // workers
    environment = results.environment()
    if environment["busy_share"] > results.BUSY:
        print(f"warning: other programs use {environment['busy_share']:.0%} of this machine; these figures will be worthless")
    path = out or results.RUNS / f"{results.now().replace(':', '')}-scaling.json"
    result = Result(test_time=results.now(), suites=[NAME], environment=environment)
    groups = [(1, "ddp", threads), (1, "ddp", cores), (workers, "ddp", threads), (workers, "fsdp", threads)]
    for size, strategy, own in watched(groups, "scaling"):
        result.records += [Record.model_validate(record) for record in measured(size, strategy, own, steps)]
        results.write(result, path)
    result.records.append(prediction(result.records, workers, threads))
    result.status, result.seconds = "complete", time.perf_counter() - started
    results.write(result, path)
    return result, path


def measured(workers: int, strategy: str, threads: int, steps: int) -> list[dict[str, Any]]:
    """What the first worker of such a group wrote. UserError when the group failed."""
    with tempfile.TemporaryDirectory() as folder:
        told = [strategy, str(steps), str(Path(folder) / "records.json")]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*launcher, "-m", "benchmarks.scaling", *told], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "no output")
            raise UserError(f"a group of {workers} failed: {last.strip()}", NAME, "Is there enough free memory?")
        return list(json.loads(Path(told[-1]).read_text(encoding="utf-8")))


def group(strategy: str, steps: int) -> list[Record]:
    """What every worker runs: steps of training, then all-reduces. Times are this worker's; all wait for each other."""
    settings = load_settings("tiny")
    torch.manual_seed(settings.seed)
    model = add_adapter(load_base(settings), settings.finetune).train()
    trained = spread(model, strategy)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.finetune.learning_rate, fused=True)
    numbers = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(3, int(model.config.vocab_size), (ROWS, ROW_TOKENS), generator=numbers).tolist()
    rows = [Example(row, [1.0] * REPLY_TOKENS) for row in ids]
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        backward(trained, collate(shard(rows, SILENT), 0), 1, float(ROWS * REPLY_TOKENS))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device())
        seconds.append(time.perf_counter() - started)
    taken = seconds[WARM_UP:]
    size = sum(4 * p.numel() for p in parameters)
    case: dict[str, str | int | float] = {"workers": world_size(), "strategy": strategy, "threads": torch.get_num_threads()}
    rate = ROWS * ROW_TOKENS * len(taken) / sum(taken)
    records = [
        Record(
            suite=NAME, model="bundled", case={"what": "steps", **case},
            metrics={"tokens_per_second": rate, "gradient_bytes": float(size)}, samples={"step_seconds": taken},
        )
    ]  # fmt: skip
    if world_size() > 1 and strategy == "ddp":
        for number in (*SIZES, size):
            samples = {"seconds": timed_all_reduce(number)}
            records.append(Record(suite=NAME, model="", case={"what": "all-reduce", **case, "bytes": number}, samples=samples))
    return records


def timed_all_reduce(size: int) -> list[float]:
    tensor, taken = torch.zeros(max(1, size // 4), device=device()), []
    for _ in range(WARM_UP + REPEATS):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        synchronize(device())
        taken.append(time.perf_counter() - started)
    return taken[WARM_UP:]


def prediction(records: list[Record], workers: int, threads: int) -> Record:
    """The step of several workers from that of one: its compute shared out, plus the exchange the fitted link gives."""
    link = fitted_link(records, workers)
    one, several = steps_of(records, 1, "ddp", threads), steps_of(records, workers, "ddp", threads)
    size = several.metrics["gradient_bytes"] or 0.0
    exchange = all_reduce(workers, size, link)
    step = median(one) / workers + exchange
    metrics = {
        "predicted_step_seconds": step, "measured_step_seconds": median(several), "exchange_seconds": exchange,
        "bandwidth": link.bandwidth, "latency": link.latency,
    }  # fmt: skip
    return Record(suite=NAME, model="bundled", case={"what": "prediction", "workers": workers}, metrics=dict(metrics))


def fitted_link(records: list[Record], workers: int) -> Link:
    timed = [r for r in records if r.case["what"] == "all-reduce"]
    return fitted("this machine, Gloo", workers, {int(r.case["bytes"]): r.samples["seconds"] for r in timed})


def steps_of(records: list[Record], workers: int, strategy: str, threads: int) -> Record:
    wanted = {"what": "steps", "workers": workers, "strategy": strategy, "threads": threads}
    return next(record for record in records if record.case == wanted)


def median(record: Record) -> float:
    return float(torch.tensor(record.samples["step_seconds"], dtype=torch.float64).median())


# --- the page --------------------------------------------------------------------------------------------------------


def page_texts() -> dict[str, str]:
    """What stands between the marks of docs/cluster.md."""
    here = measured_table(results.read(PUBLISHED)) if PUBLISHED.exists() else "Not measured yet: `python -m benchmarks scaling`."
    return {"scaling measured": here, "scaling predicted": predicted_table()}


def measured_table(result: Result) -> str:
    foretold = next(r for r in result.records if r.case["what"] == "prediction")
    steps = [r for r in result.records if r.case["what"] == "steps"]
    alone = median(steps[0])
    lines = [
        "| workers | strategy | threads each | step, ms (median) | tokens/s | speed-up | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in steps:
        strategy = r.case["strategy"] if r.case["workers"] != 1 else "-"
        about = [
            r.case["workers"],
            strategy,
            r.case["threads"],
            f"{median(r) * 1e3:.0f}",
            f"{r.metrics['tokens_per_second']:,.0f}",
        ]
        lines.append("| " + " | ".join(map(str, [*about, f"{alone / median(r):.2f}", len(r.samples["step_seconds"])])) + " |")
    m = {name: value or 0.0 for name, value in foretold.metrics.items()}
    size = steps[-1].metrics["gradient_bytes"] or 0.0
    where = result.environment
    machine = f"{where['cpu_info']}, {where['cpu_cores']} cores, {where['memory_gib']:.0f} GiB, commit {where['build_commit']}"
    told = (
        f"{machine}, {result.test_time[:10]}. Gloo within the machine: {m['bandwidth'] / 1e9:.2f} GB/s and "
        f"{m['latency'] * 1e6:.0f} µs a message (fitted to {len(SIZES) + 1} sizes, {REPEATS} all-reduces each). For "
        f"{foretold.case['workers']} workers (ddp) it predicts steps of {m['predicted_step_seconds'] * 1e3:.0f} ms, "
        f"{m['exchange_seconds'] * 1e3:.1f} ms of them for exchanging {size / 1e6:.1f} MB of gradients; measured were "
        f"{m['measured_step_seconds'] * 1e3:.0f} ms."
    )
    return "\n".join([*lines, "", told])


if __name__ == "__main__":
    with joined():
        found = group(sys.argv[1], int(sys.argv[2]))
        if is_first():
            write_json(Path(sys.argv[3]), [record.model_dump() for record in found])
