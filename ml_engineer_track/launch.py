"""Has the fine-tuning done: by this process, or by workers that torchrun or Ray Train starts, watches and starts again.

    make ml ENGINE=torchrun WORKERS=2 [STRATEGY=fsdp]
    make ml ENGINE=ray WORKERS=2                          needs the extra [ray], which it installs

Why an ML engineer leaves this to them: in a long run on many machines one of them will fail. Both starters notice a lost
worker, end the rest of the group and start a new one, which goes on from the last checkpoint; RESTARTS times, then they give up.
What a worker runs is `finetune.py`, the same as without them. `docs/cluster.md` says how to use more than one machine.

The job (settings and data version) is a file in the working folder, the result is what the first worker writes there: on
several machines that folder must be one they share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.distributed import is_first, joined
from ml_engineer_track.finetune import Tuned, finetune
from shared.cluster import need_ray, start_ray
from shared.errors import UserError
from shared.files import write_json, write_text
from shared.settings import Settings

#: A worker that is lost more often than this has not been unlucky.
RESTARTS = 3
#: Bytes of memory that Ray may fill with data on this machine.
OBJECT_STORE = 500_000_000


class Job(BaseModel):
    """What every worker is told."""

    settings: Settings
    data: CuratedData


def train(settings: Settings, data: CuratedData) -> Tuned:
    """Fine-tune with the engine of the settings. UserError as `finetune`, and when workers die again and again."""
    check(settings)
    if settings.engine == "local":
        return finetune(settings, data)
    work = settings.work / "finetune"
    work.mkdir(parents=True, exist_ok=True)
    for left_over in ("error.json", "training.json", "workers.log"):
        (work / left_over).unlink(missing_ok=True)
    write_text(work / "job.json", Job(settings=settings, data=data).model_dump_json(indent=2))
    print(
        f"  finetune: {settings.workers} workers ({settings.engine}, {settings.strategy}), log {work / 'workers.log'}", flush=True
    )
    (run_torchrun if settings.engine == "torchrun" else run_ray)(settings, work)
    if (work / "error.json").exists():
        raise UserError(**json.loads((work / "error.json").read_text(encoding="utf-8")))
    if not (work / "training.json").exists():
        what = f"the workers were given up: a lost group is started again at most {RESTARTS} times"
        raise UserError(what, str(work / "workers.log"), "Its end says why; the same command goes on from the last checkpoint")
    return TypeAdapter(Tuned).validate_json((work / "training.json").read_text(encoding="utf-8"))


def check(settings: Settings) -> None:
    """UserError, before any work, for workers that cannot be had or could not share the rows of a step evenly."""
    workers, rows = settings.workers, settings.finetune.batch_rows
    if settings.engine == "local" and workers > 1:
        raise UserError("one process cannot be several workers", f"WORKERS={workers}", "Set ENGINE=torchrun or ENGINE=ray")
    if rows % workers:
        fitting = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        raise UserError(f"{workers} workers cannot share the {rows} rows of a step evenly", "WORKERS", f"Use one of: {fitting}")
    if settings.engine == "ray":
        need_ray("ENGINE=ray", "train")
    here = torch.cuda.device_count()
    if settings.engine != "local" and "RAY_ADDRESS" not in os.environ and 0 < here < workers // nodes():
        raise UserError(f"{workers // nodes()} workers need as many GPUs, and here are {here}", "WORKERS", f"Use at most {here}")
    if settings.engine == "torchrun" and workers % nodes():
        raise UserError(f"{workers} workers cannot be spread over {nodes()} machines evenly", "WORKERS", "Use a multiple")


def work(job: Path, tell: Any = None) -> None:
    """What every worker does. A mistake of the user's is written down: no new group of workers could mend it."""
    error = job.with_name("error.json")
    if error.exists():
        return
    told = Job.model_validate_json(job.read_text(encoding="utf-8"))
    with ExitStack() as quiet:
        if not is_first():
            quiet.enter_context(redirect_stdout(quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))))
        try:
            finetune(told.settings, told.data, tell)
        except UserError as mistake:
            write_json(error, {"what": str(mistake)})


# --- torchrun --------------------------------------------------------------------------------------------------------


def nodes() -> int:
    """Machines, as torchrun reads it from its environment; of a range such as 1:4 the largest number."""
    return int(os.environ.get("PET_NNODES", "1").split(":")[-1])


def run_torchrun(settings: Settings, work: Path) -> None:
    """One agent on this machine; with torchrun's own PET_RDZV_ENDPOINT and PET_NNODES set, one of several agents."""
    here = settings.workers // nodes()
    rendezvous = [] if "PET_RDZV_ENDPOINT" in os.environ else ["--standalone"]
    command = [
        sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={here}", f"--max-restarts={RESTARTS}",
        "-m", "ml_engineer_track.launch", str(work / "job.json"),
    ]  # fmt: skip
    # A store that outlives its group still holds the dead worker's address, and the next group fails to reach it (torch 2.13,
    # Gloo: "connectFullMesh failed", every time until the restarts are used up).
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = os.environ | fresh | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // here))}
    with (work / "workers.log").open("w", encoding="utf-8") as log:
        agent = subprocess.Popen(command, env=environment, stderr=log)
        try:
            agent.wait()
        except BaseException:
            agent.terminate()  # it ends its workers
            agent.wait()
            raise


# --- Ray Train -------------------------------------------------------------------------------------------------------


def run_ray(settings: Settings, work: Path) -> None:
    """On the cluster of RAY_ADDRESS, else on this machine alone."""
    start_ray(max(settings.workers, os.cpu_count() or 1), OBJECT_STORE)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = torch.cuda.is_available() or ray.cluster_resources().get("GPU", 0) > 0
    cores = int(ray.cluster_resources()["CPU"]) // settings.workers
    if not cores:
        raise UserError(f"the Ray cluster has fewer CPUs than {settings.workers} workers need", "WORKERS", "Use fewer")
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": str(work / "job.json")},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        # Ray sets OMP_NUM_THREADS to the CPUs of a worker.
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=on_gpu, resources_per_worker={"CPU": cores, **({"GPU": 1} if on_gpu else {})}
        ),
        run_config=RunConfig(
            name="finetune", storage_path=str(work / "ray"), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as failure:
        with (work / "workers.log").open("a", encoding="utf-8") as log:
            log.write(f"{failure}\n")
    finally:
        ray.shutdown()


def _ray_worker(told: dict[str, Any]) -> None:
    from ray import train

    job = Path(told["job"])
    with job.with_name("workers.log").open("a", buffering=1, encoding="utf-8") as log, redirect_stdout(log):
        work(job, lambda step, loss: train.report({"step": step, "validation_loss": loss}))


if __name__ == "__main__":
    with joined():
        work(Path(sys.argv[1]))
