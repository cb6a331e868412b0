"""Ray, which trains, cleans and serves here: the cluster of RAY_ADDRESS, else a Ray of this program's own that ends with it.

It is an extra (`[ray]`), so nothing imports it before somebody asked for it. Nothing is reported to anybody.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

from shared.errors import UserError
from shared.settings import ROOT

INSTALL = "pip install -c torch.txt -c constraints.txt -e '.[ray]'"


def need_ray(asked: str, part: str = "") -> None:
    """UserError naming what `asked` for it, when Ray is not installed, or not with this part (`serve`, `data`, `train`)."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("Ray is not installed", asked, INSTALL)
    if part:
        try:
            importlib.import_module(f"ray.{part}")
        except ImportError as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"Ray is installed without what ray.{part} needs ({first})", asked, INSTALL) from None


def start_ray(places: int, object_store: int) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine. UserError when it fails; `ray.shutdown()` ends it.

    Started here, it has `places` CPUs to give away, however many cores there are (whoever runs on them shares the cores), and
    `object_store` bytes of memory for objects that processes share before it writes them to disk (its default is 30 % of all).
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # processes without a GPU of their own keep what they see
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 lets every other program go first
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of its processes
    import ray

    address = os.environ.get("RAY_ADDRESS")
    here = {"num_cpus": places, "include_dashboard": False, "object_store_memory": object_store}
    try:
        ray.init(address=address or "local", logging_level="error", log_to_driver=False, **({} if address else here))
    except Exception as error:  # Ray raises plain ones, too
        ray.shutdown()
        first = (str(error).strip().splitlines() or [repr(error)])[0].split(". ")[0]
        fix = "Is the cluster up?" if address else "It gives up after 30 seconds: try again when the machine is less busy"
        raise UserError(f"Ray did not start: {first}", address or "this machine", fix) from None
