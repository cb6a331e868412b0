"""What the committed results teach, as text for docs/lessons.md: each function is one lesson's figures; none is typed by hand.

    python -m benchmarks readme

A lesson whose result is not committed yet says so, with the command that measures it. Sentences that compare two figures are made
from them, so that they turn around when the figures do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.studies import not_measured
from shared.metrics import Estimate
from shared.settings import ROOT

RESULTS = ROOT / "benchmarks" / "results"
DEMO = RESULTS / "demo"


def blocks() -> dict[str, str]:
    """Mark of a lesson's figures -> its text."""
    lessons: dict[str, Callable[[], str]] = {
        "lesson four bits": four_bits,
        "lesson devices": devices,
        "lesson low bits": lambda: study("low_bits.json"),
        "lesson lora": lora,
        "lesson tune": tuning,
        "lesson distill": lambda: study("distill.json"),
        "lesson engine": engine,
        "lesson retrieval": retrieval,
        "lesson emergencies": emergencies,
        "lesson asking back": asking_back,
        "lesson judge": judge,
        "lesson feedback": the_way_back,
    }
    return {name: text() for name, text in lessons.items()}


def four_bits() -> str:
    """Bytes, quality and speed of every variant beside bf16, from one `make demo`."""
    ml = report("ml.json")
    size, quality, models = ml["weight_bytes"], ml["quality"], ml["benchmark"]["models"]
    rows = []
    for name in size:
        figure, decision = (estimate(quality[name][key]) for key in ("grounded/evidence_f1", "grounded/decision_accuracy"))
        speeds = "-"
        if name in models:
            speeds = " / ".join(
                f"{models[name]['batch'][b]['decode_throughput'] / models['bf16']['batch'][b]['decode_throughput']:.2f}"
                for b in models["bf16"]["batch"]
            )
        rows.append([name, f"{size[name] / 1e6:.1f}", f"{size[name] / size['bf16']:.2f}", str(figure), str(decision), speeds])
    batches = " / ".join(models["bf16"]["batch"])
    head = ["variant", "MB", "of bf16", "evidence F1", "decision accuracy", f"decode tokens/s of bf16's, batch {batches}"]
    n = quality["bf16"]["grounded/evidence_f1"]["n"]
    fastest = max((models[v]["batch"]["1"]["decode_throughput"], v) for v in models if v != "base")[1]
    said = (
        f"The fastest of them at batch 1 in transformers is {fastest}. "
        f"q8_0 and q4_0 run in the server's engine, so their speed stands [below](#what-is-the-servers-engine-worth)."
    )
    return (
        f"{machine(ml['hardware'])}; {n} answerable test questions, seed {ml['seed']}.\n\n{markdown_table(head, rows)}\n\n{said}"
    )


def devices() -> str:
    """The same measurement on every machine whose result is committed (the newest of each)."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "latency" in result["suites"]:
            newest[machine(result["environment"])] = result
    rows = []
    for name, result in newest.items():
        runs = [r for r in result["records"] if r["suite"] == "latency" and r["case"].get("what") == "run"]
        batches = sorted({r["case"]["batch"] for r in runs})
        for batch in (batches[0], batches[-1]):
            same = {r["model"]: r["metrics"] for r in runs if r["case"]["batch"] == batch and r["case"]["prompt_tokens"] == 256}
            if "bf16" not in same:
                continue
            told = [
                f"{same[v]['median_tpot_ms'] / same['bf16']['median_tpot_ms']:.2f}" if v in same else "-" for v in ("nf4", "int8")
            ]
            rows.append([name, str(batch), f"{same['bf16']['median_tpot_ms']:.2f}", *told])
    head = ["device", "batch", "bf16: tpot p50, ms", "nf4: times that", "int8: times that"]
    missing = (
        "" if any("GPU: none" not in name for name in newest) else "\n\nNo result of a GPU is committed yet: `make bench` there."
    )
    return markdown_table(head, rows) + missing


def lora() -> str:
    """What training a few percent of the weights brought, beside what a ranker alone gets."""
    ml = report("ml.json")
    base, tuned, training = ml["quality"]["base"], ml["quality"]["bf16"], ml["training"]
    keys = {
        "evidence F1 (grounded)": "grounded/evidence_f1",
        "correct refusal (grounded)": "grounded/correct_refusal",
        "decision accuracy": "grounded/decision_accuracy",
        "of these: answer": "grounded/decision_accuracy_answer",
        "of these: clarify": "grounded/decision_accuracy_clarify",
        "of these: escalate": "grounded/decision_accuracy_escalate",
        "of these: decline": "grounded/decision_accuracy_decline",
    }
    rows = [
        [label, str(estimate(base[key])), str(estimate(tuned[key])), str(tuned[key]["n"])]
        for label, key in keys.items()
        if key in tuned
    ]
    first, right = estimate(tuned["first_source/evidence_f1"]), estimate(tuned["grounded/evidence_f1"])
    better = "more" if (first.value or 0) > (right.value or 0) else "less"
    return (
        f"LoRA on {training['trainable_share']:.1%} of the weights, {training['steps']} steps, {training['seconds']:.0f} s. "
        f"{machine(ml['hardware'])}, seed {ml['seed']}.\n\n"
        + markdown_table(["test split", "base", "tuned", "rows"], rows)
        + f"\n\nAlways quoting the source that the ranker put first: {first}, {better} than the tuned model."
    )


def tuning() -> str:
    """What the search found about rank, alpha, targets and learning rate."""
    found = optional("tune.json")
    if found is None:
        return not_measured("tune.json")
    importances = found["importances"] or {}
    told = ", ".join(f"{name} {share:.2f}" for name, share in importances.items())
    return (
        f"{found['verdict']['says']}\n\nImportance of each value for the loss (they add up to 1): {told}. "
        f"{machine(found['hardware'])}."
    )


def engine() -> str:
    """Tokens a second by engine and number of chats, and the goals of the server."""
    path = sorted(RESULTS.glob("*-engines.json"))[-1]
    result = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for size in dict.fromkeys(r["model"].split(":")[0] for r in result["records"] if r["case"].get("what") == "throughput"):
        speeds: dict[str, dict[int, float]] = {}
        for record in result["records"]:
            model, _, side = record["model"].partition(": ")
            if model == size and record["case"].get("what") == "throughput":
                speeds.setdefault(side, {})[record["case"]["max_concurrency"]] = record["metrics"]["output_throughput"]
        chats = sorted({n for found in speeds.values() for n in found})
        rows = [[side, *(f"{found[n]:,.0f}" if n in found else "-" for n in chats)] for side, found in speeds.items()]
        parts.append(
            markdown_table([f"{size} model: output tokens/s", *(f"{n} chat{'s' if n > 1 else ''}" for n in chats)], rows)
        )
    goals = [
        [
            r["case"]["goal"], f"at {r['case']['at']} {r['metrics']['bound']:g}",
            "-" if r["metrics"]["value"] is None else f"{r['metrics']['value']:.2f}",
            {1.0: "yes", 0.0: "**no**", None: "not measured"}[r["metrics"]["met"]],
        ]
        for r in result["records"]
        if r["case"].get("what") == "goal" and r["model"] == result["records"][1]["model"].split(":")[0]
    ]  # fmt: skip
    parts.append(markdown_table(["goal, bundled model", "bound", "measured", "reached"], goals))
    return f"{machine(result['environment'])}; `{path.relative_to(ROOT)}`.\n\n" + "\n\n".join(parts)


def engine_goals() -> str:
    """For every committed run of the engines: each goal, and what each model reached."""
    parts = []
    for path in sorted(RESULTS.glob("*-engines*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        goals = [r for r in result["records"] if r["case"].get("what") == "goal"]
        models = list(dict.fromkeys(r["model"] for r in goals))
        by_goal: dict[str, dict[str, Any]] = {}
        for r in goals:
            by_goal.setdefault(f"{r['case']['goal']}: at {r['case']['at']} {r['metrics']['bound']:g}", {})[r["model"]] = r[
                "metrics"
            ]
        rows = [[goal, *(_reached(found.get(model)) for model in models)] for goal, found in by_goal.items()]
        parts.append(f"`{path.name}`, {machine(result['environment'])}:\n\n{markdown_table(['goal', *models], rows)}")
    return "\n\n".join(parts)


def _reached(metrics: dict[str, Any] | None) -> str:
    if metrics is None or metrics["value"] is None:
        return "-"
    return f"{metrics['value']:.2f}" + ("" if metrics["met"] else " (**not reached**)")


def retrieval() -> str:
    found = report("ai.json")["retrieval"]
    modes = [mode for mode in ("dense", "bm25", "fused", "reranked") if mode in found]
    keys = ("leaflet/recall@1", "leaflet/recall@5", "passage/recall@5")
    rows = [[mode, *(str(estimate(found[mode][key])) for key in keys)] for mode in modes]
    return markdown_table([f"{found[modes[0]][keys[0]]['n']} test questions", *(k.replace("/", " ") for k in keys)], rows)


def emergencies() -> str:
    found = report("ai.json")["triage"]
    rows = [
        [label, str(estimate(found[key])), str(found[key]["n"])]
        for label, key in (
            ("emergencies sent to the emergency number", "sensitivity"),
            ("near misses not sent there", "specificity"),
            ("emergencies sent there or warned", "found"),
            ("near misses with neither", "quiet"),
            ("ordinary messages not sent there", "harmless_passed"),
            ("ordinary messages with neither", "harmless_quiet"),
            ("emergencies that the written rules alone find", "floor_sensitivity"),
        )
    ]
    return markdown_table(["test split", "share [95 % interval]", "rows"], rows)


def asking_back() -> str:
    """What each further question adds, beside a question that is always the same."""
    found = report("ai.json")["clarify"]
    after = [estimate(found["accuracy"][key]) for key in sorted(found["accuracy"], key=int)]
    added = ["", *(f"{(b.value or 0) - (a.value or 0):+.2f}" for a, b in pairwise(after))]
    rows = [[str(n), str(e), more] for n, (e, more) in enumerate(zip(after, added, strict=True))]
    return (
        markdown_table([f"questions asked ({after[0].n} vague openings)", "right leaflet thought likeliest", "added"], rows)
        + f'\n\nOne question that is always the same ("Can you tell me more?"): {estimate(found["generic_question"])}. '
        f"Asked without need on clear openings: {estimate(found['needless'])} (n {found['needless']['n']})."
    )


def judge() -> str:
    """Agreement beyond chance, and what a judge that never looks would get."""
    found = report("ai.json")["judge"]
    rows = []
    for rubric, table in found["confusion"].items():
        totals = [sum(verdicts.values()) for verdicts in table.values()]
        blind = max(totals) / sum(totals)
        kappa, accuracy = estimate(found["kappa"][rubric]), estimate(found["accuracy"][rubric])
        rows.append([rubric, str(accuracy), f"{blind:.3f}", str(kappa)])
    head = ["rubric", "accuracy", "accuracy of always saying the commonest label", "kappa"]
    return (
        f"{found['rows']} labelled test answers, judged by `{found['model']}`.\n\n{markdown_table(head, rows)}\n\n"
        f"The same verdict with the passages in reverse order: {estimate(found['position'])}; "
        f"when asked again: {estimate(found['repeat'])}."
    )


def the_way_back() -> str:
    """What one turn of the loop changed, and what it refused."""
    shown = (optional("loop.json") or {}).get("demonstrations")
    if not shown:
        return not_measured("loop.json")
    hardware = report("loop.json")["hardware"]
    table = markdown_table(
        ["questions", "before", "after", "difference", "n"], [[str(cell) for cell in row] for row in shown["rows"]]
    )
    goals = markdown_table(
        ["to be shown", "figures", "shown"],
        [[goal["name"], goal["says"], "yes" if goal["met"] else "**no**"] for goal in shown["goals"]],
    )
    return "\n\n".join([f"{machine(hardware)}, seed {report('loop.json')['seed']}.", *shown["removed"], table, goals])


def study(name: str) -> str:
    """The claims of a study with what came out."""
    found = optional(name)
    if found is None:
        return not_measured(name)
    rows = [
        [f["claim"], str(f["value"]), "yes" if f["reached"] else "**no**"] for f in found.get("findings", found.get("goals", []))
    ]
    where = f"{machine(found['hardware'])}, seed {found['seed']}.\n\n" if "hardware" in found and "seed" in found else ""
    return where + markdown_table(["claim", "measured", "reached"], rows)


def report(name: str) -> dict[str, Any]:
    return dict(json.loads((DEMO / name).read_text(encoding="utf-8")))


def optional(name: str) -> dict[str, Any] | None:
    return report(name) if (DEMO / name).exists() else None


def estimate(found: dict[str, Any]) -> Estimate:
    return Estimate.model_validate(found)


def machine(hardware: dict[str, Any]) -> str:
    return f"{hardware['cpu_info']}, {hardware['n_threads']} threads, GPU: {hardware['gpu_info'] or 'none'}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)
