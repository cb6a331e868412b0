"""Exercise 12: talk to the running service, say what was wrong, and see which model it was.    python artifacts/workshop/ex12.py

SERVICE is the address of the service, http://127.0.0.1:8000 unless you set another. What is sent here is what the thumbs of the
web page send.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import httpx

from benchmarks.workshop.place import artifacts, keep_run, script
from shared import feedback, handoff
from shared.errors import UserError

# --- change this: read the answers of your first run, then say what you think of them ------------------------------------
#: question -> your thumb and, for a thumb down, the reason
QUESTIONS: dict[str, tuple[str, str]] = {
    "How long does a cold last?": ("thumbs_up", ""),
    "What helps against a migraine at home?": ("thumbs_up", ""),
    "My ankle is swollen after a fall, can I walk on it?": ("thumbs_up", ""),
    "When should I see a doctor about back pain?": ("thumbs_up", ""),
}
# ------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    base = os.environ.get("SERVICE", "http://127.0.0.1:8000")
    with httpx.Client(base_url=base, timeout=60) as client:  # one client: the service knows a person by a cookie
        model = ready(client)
        print(f"answers of {model}")
        for question, (thumb, reason) in QUESTIONS.items():
            exchange = client.post("/chat", json={"message": question}).raise_for_status().json()
            print(f"  {question}\n    {exchange['turn']['kind']}: {exchange['turn']['text']}\n    {thumb} {reason}")
            body = {"answer_id": exchange["answer_id"], "kind": thumb, "reason": reason}
            client.post("/feedback", json=body).raise_for_status()
    keep_run(12, {"model": model, "thumbs": {q: list(given) for q, given in QUESTIONS.items()}})
    print("\nwhere the feedback came from")
    for line in lineage():
        print(f"  {line}")


def ready(client: httpx.Client) -> str:
    """The name of the model that answers. Waits until the service can: its first start reads and embeds for a while."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            said: dict[str, Any] = client.get("/ready").json()
            if said["ready"]:
                return str(said["model_version"])
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"no service answers at {client.base_url}. Start it with `make serve`")


def lineage() -> list[str]:
    """Feedback by model, and how each model was made, from the manifests of the published versions."""
    counted: dict[str, Counter[str]] = {}
    for record in feedback.read(artifacts() / "feedback")[0]:
        counted.setdefault(record.model_version, Counter())[record.kind] += 1
    lines = []
    for model, kinds in counted.items():
        lines.append(f"{model}: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))
        for folder in sorted((artifacts() / "models").glob("m-*")):
            try:
                made = handoff.read_manifest(folder)
            except UserError:
                continue
            if model.split(":")[0] in (made.version, made.model_id):
                rank, data = made.training.get("rank"), made.data.version
                lines.append(f"  made as {made.version}: LoRA rank {rank}, data {data}, seed {made.seed}")
    return lines


if __name__ == "__main__":
    script(main)
