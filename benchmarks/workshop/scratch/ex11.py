"""Exercise 11: a judge of your own, judged.    python artifacts/workshop/ex11.py

The data set labels answers as grounded (the passages say all of it) or not; its authors were language models. A judge is worth
its agreement with the labels beyond chance: Cohen's kappa. Training and validation labels; the test split is not touched.
"""

from __future__ import annotations

from ai_engineer_track.judge import TRUSTED_KAPPA, confusion
from ai_engineer_track.settings import load_ai_settings
from benchmarks.workshop.place import keep_run, script
from shared import library as lib
from shared.chat import parse_answer  # noqa: F401 (for your judge)
from shared.metrics import cohen_kappa, estimate, estimate_mean


# --- change this -------------------------------------------------------------------------------------------------------
def grounded(question: str, passages: list[str], answer: str) -> bool:
    """Do the passages say all of the answer? `answer` is "[2] Rest. [1] Drink water."; `[2]` stands for `passages[1]`.

    `parse_answer(answer)` gives its statements, each with `.number` (None without a mark) and `.text`.
    """
    return True


# ------------------------------------------------------------------------------------------------------------------------


def main() -> None:
    datasets = load_ai_settings("tiny").datasets
    library = lib.load_library(datasets)
    labels = [r for r in lib.read_rows(datasets, "judge_labels.jsonl", lib.JudgeLabel)[0] if r.split != "test"]
    pairs = []
    for label in labels:
        passages = [library.sentence(sentence_id).text for sentence_id in label.passages]
        pairs.append((int(label.grounded), int(grounded(label.question, passages, label.answer))))
    kappa = estimate(pairs, cohen_kappa, 1000, 7)
    accuracy = estimate_mean([float(a == b) for a, b in pairs], 1000, 7)
    print(f"{len(pairs)} labelled answers, {sum(a for a, _ in pairs)} of them grounded; value [95 % interval]")
    print(f"  accuracy {accuracy}\n  kappa    {kappa}   (trusted when its lower end reaches {TRUSTED_KAPPA})")
    print(f"  label -> verdict -> rows: {confusion(pairs)}")
    share = sum(a for a, _ in pairs) / len(pairs)
    keep_run(11, {"rows": len(pairs), "grounded_share": share, "accuracy": accuracy.value, "kappa": kappa.model_dump()})


if __name__ == "__main__":
    script(main)
