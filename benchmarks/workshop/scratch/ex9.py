"""Exercise 9: where does an emergency begin?    python artifacts/workshop/ex9.py

Probabilities come from fits that saw neither the message nor its family (cross-validation), so every training and validation
message can be counted. The test split is not touched.
"""

from __future__ import annotations

import numpy as np

from ai_engineer_track.heads import unseen
from ai_engineer_track.ingest import open_index
from ai_engineer_track.settings import load_ai_settings
from ai_engineer_track.triage import MEANING, STRENGTH, examples, without_flags
from benchmarks.workshop.place import keep_run, script
from shared.metrics import estimate_mean
from shared.passages import StoredVectors

# --- change this -------------------------------------------------------------------------------------------------------
THRESHOLD = 0.50  # probability from which a message is sent to the emergency number
WANTED = 0.95  # share of emergencies that must be sent there
# ------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    settings = load_ai_settings("tiny")
    index = open_index(settings)
    rows = examples(settings, StoredVectors(settings.artifacts / "vectors.npz", index.embed))
    index.close()
    probability = (unseen(rows, STRENGTH, MEANING) + unseen(without_flags(rows), STRENGTH, MEANING)) / 2
    emergency = rows.labels.astype(bool)
    near_miss = ~emergency & (rows.weights == 1.0)  # written to look like an emergency; the rest are ordinary messages
    ordinary = ~emergency & (rows.weights != 1.0)

    def shares(threshold: float) -> tuple[float, float, float]:
        sent = probability >= threshold
        return float(sent[emergency].mean()), float((~sent[near_miss]).mean()), float((~sent[ordinary]).mean())

    print(f"{emergency.sum()} emergencies, {near_miss.sum()} near misses, {ordinary.sum()} ordinary messages")
    print("threshold   sent (sensitivity)   near misses not sent (specificity)   ordinary not sent")
    table = {f"{t:.2f}": shares(float(t)) for t in np.arange(0.01, 1.0, 0.01)}
    for name in [f"{t:.2f}" for t in np.arange(0.1, 0.95, 0.1)]:
        print("   {}              {:.3f}                     {:.3f}                         {:.3f}".format(name, *table[name]))
    sent = (probability >= THRESHOLD).astype(float)
    print(f"\nyours, {THRESHOLD:.2f}: sensitivity {estimate_mean(list(sent[emergency]), 1000, 7)}, "
          f"specificity {estimate_mean(list(1 - sent[near_miss]), 1000, 7)}")  # fmt: skip
    missed = [text for text, p, e in zip(rows.texts, probability, emergency, strict=True) if e and p < THRESHOLD]
    print(f"missed: {len(missed)}. Three of them:")
    for text in missed[:3]:
        print(f"  - {text[:150]}")
    keep_run(9, {"threshold": round(THRESHOLD, 2), "wanted": WANTED, "table": table})


if __name__ == "__main__":
    script(main)
