"""One training step of these settings, predicted and measured: memory by component, FLOPs, TFLOPS used, and what fits a limit.

Why an ML engineer does this: a prediction nobody checked is a hope. Where both columns agree, the same arithmetic can be trusted
for a card that is not at hand; how many FLOPs a second the step does, beside what the device can do, says whether it is worth
looking for more.

    python -m ml_engineer_track accounting [--preset tiny]      (make accounting; VRAM_GB=8 is the limit that is planned for)

The step is the largest of the run: rows, lengths and replies are those of the curated data, its tokens are random. It is
measured in a process of its own, once keeping all activations and once with gradient checkpointing. Lines in the terminal,
`artifacts/reports/accounting.json` for programs, `accounting.html` for people.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ml_engineer_track import accounting as a
from ml_engineer_track.accounting_measure import measure
from ml_engineer_track.curate import CuratedData
from ml_engineer_track.finetune import encode
from ml_engineer_track.models import load_tokenizer
from ml_engineer_track.progress import watched
from shared.files import write_json, write_text
from shared.hardware import busy, device, fingerprint
from shared.page import document, heading, paragraph, table
from shared.settings import Settings

#: The limit that is planned for when VRAM_GB is not set: the smallest card that is still common.
USUAL_GB = 8.0


def account(settings: Settings, data: CuratedData) -> Path:
    """Predict, measure, choose, report. Returns the path of the page. UserError when VRAM_GB holds no step at all."""
    steps = a.shapes(encode(data.rows("train"), load_tokenizer(settings.model_path)), settings.finetune)
    limit = settings.vram_gb or USUAL_GB
    choice = a.choose(settings, steps, limit)
    largest = max(steps, key=lambda s: (s.rows * s.length, s.kept))
    sides = [side(a.step_plan(settings, largest, again)) for again in watched((False, True), "accounting")]
    facts = {
        "preset": settings.preset,
        "model": settings.model,
        "data": data.version,
        "hardware": fingerprint(),
        "device": device().type,
        "busy_share": busy(),
        "step": {
            "rows": largest.rows, "tokens_per_row": largest.length, "reply_tokens_per_row": largest.kept,
            "method": settings.finetune.method, "rank": settings.finetune.rank, "targets": settings.finetune.targets,
            "dtype": a.step_plan(settings, largest, False).dtype,
        },
        "sides": sides,
        "vram_gb": limit,
        "choice": {
            "micro_batch_tokens": choice.micro_batch_tokens, "gradient_checkpointing": choice.checkpointing,
            "predicted_bytes": choice.bytes, "says": a.described(choice, settings.finetune),
        },
    }  # fmt: skip
    folder = settings.artifacts / "reports"
    write_json(folder / "accounting.json", facts)
    write_text(folder / "accounting.html", page(facts))
    print(text(facts))
    print(f"report: {folder / 'accounting.html'}  (figures: {folder / 'accounting.json'})")
    return folder / "accounting.html"


def side(plan: a.Plan) -> dict[str, Any]:
    """One way to do the step. `model_flops` leaves out what checkpointing computes a second time, as MFU is defined
    (Chowdhery et al. 2022, appendix B); `flops` does not. Memory in bytes.
    """
    predicted, measured = a.predict_components(plan), measure(plan)
    flops = a.step_flops(plan)
    model_flops = a.step_flops(replace(plan, checkpointing=False)) if plan.checkpointing else flops
    seconds = median(measured.seconds)
    total = sum(predicted.values())
    return {
        "checkpointing": plan.checkpointing,
        "predicted": {**predicted, "total": total},
        "measured": {**measured.components, "total": measured.tensors},
        "predicted_to_measured": total / measured.tensors,
        "process": {"what": measured.process_what, "bytes": measured.process},
        "predicted_to_process": total / measured.process if measured.process > 0 else None,
        "flops": flops,
        "model_flops": model_flops,
        "seconds": seconds,
        "raw_seconds": measured.seconds,
        "tflops": flops / seconds / 1e12,
        "matmul_peak_tflops": measured.matmul_peak / 1e12,
        "mfu": model_flops / seconds / measured.matmul_peak,
    }


# --- what people read ------------------------------------------------------------------------------------------------


def text(facts: dict[str, Any]) -> str:
    """The report as lines of the terminal."""
    lines = [step_line(facts), f"  {'MB':14s}" + "".join(f"{head:>14s}" for head in COLUMNS)]
    lines += [f"  {name:14s}" + "".join(f"{cell:>14s}" for cell in cells) for name, cells in memory_rows(facts)]
    lines += [f"  {'checkpointing' if s['checkpointing'] else 'plain'}: {speed_line(s)}" for s in facts["sides"]]
    return "\n".join([*lines, f"  {choice_line(facts)}"])


def page(facts: dict[str, Any]) -> str:
    h, title = facts["hardware"], "One training step, predicted and measured"
    machine = f"{h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}"
    what = facts["sides"][0]["process"]["what"]
    cells = [
        ["checkpointing" if s["checkpointing"] else "plain", f"{s['flops'] / 1e9:,.1f}", f"{s['model_flops'] / 1e9:,.1f}",
         f"{1e3 * s['seconds']:,.1f}", f"{s['tflops']:.4f}", f"{s['matmul_peak_tflops']:.4f}", f"{s['mfu']:.2f}"]
        for s in facts["sides"]
    ]  # fmt: skip
    head = ["", "GFLOPs", "without recomputing", "ms (median)", "TFLOPS used", "TFLOPS of a matrix product", "MFU"]
    return document(
        title,
        [
            heading(title, 1),
            paragraph(f"Preset {facts['preset']}, model {facts['model']}, data {facts['data']}. {machine}.", lead=True),
            paragraph(f"{step_line(facts)}."),
            heading("Memory"),
            table(["MB", *COLUMNS], [[name, *row] for name, row in memory_rows(facts)]),
            paragraph(
                "Predicted from the model's config on tensors without memory; measured as PyTorch's allocator counts the tensors "
                "of a real step after the first. Logits are what the step takes beyond one in which a single token of each row "
                "gets logits; activations the rest of its widest moment. Kernels' scratch space is measured, not predicted, and "
                "can move bytes from logits to activations. The process is counted from outside "
                f"({what}), with libraries' scratch space and the allocator's slack."
            ),
            heading("Arithmetic"),
            paragraph(
                "FLOPs of matrix products and attention, forward and backward, counted on the predicted step. "
                f"Other programs used {facts['busy_share']:.0%} of the machine at the end."
            ),
            table(head, cells),
            heading("Within a limit"),
            paragraph(choice_line(facts)),
        ],
    )


COLUMNS = ("predicted", "measured", "checkpointed", "measured")


def memory_rows(facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Components, their sum, the ratio and the process; predicted and measured, plain and then with checkpointing."""
    sides = facts["sides"]
    rows = [
        (name, [f"{s[kind].get(name, 0) / 1e6:,.2f}" for s in sides for kind in ("predicted", "measured")])
        for name in sides[0]["predicted"]
    ]
    ratios = [cell for s in sides for cell in (f"{s['predicted_to_measured']:.3f}", "1")]
    outside = [cell for s in sides for cell in ("", f"{s['process']['bytes'] / 1e6:,.2f}")]
    return [*rows, ("ratio", ratios), ("process", outside)]


def step_line(facts: dict[str, Any]) -> str:
    s = facts["step"]
    return (
        f"{s['method']} of rank {s['rank']} on {facts['model']}: the largest step, {s['rows']} rows of {s['tokens_per_row']} "
        f"tokens, {s['reply_tokens_per_row']} of each with logits; {s['dtype']} on {facts['device']}"
    )


def speed_line(s: dict[str, Any]) -> str:
    return (
        f"{s['flops'] / 1e9:,.1f} GFLOPs in {1e3 * s['seconds']:,.0f} ms: {s['tflops']:.4f} TFLOPS used, "
        f"MFU {s['mfu']:.2f} of the {s['matmul_peak_tflops']:.4f} a matrix product reaches here"
    )


def choice_line(facts: dict[str, Any]) -> str:
    return f"VRAM_GB={facts['vram_gb']:g}: {facts['choice']['says']}"
