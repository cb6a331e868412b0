"""The report of `make kernels`: lines in the terminal, `artifacts/reports/kernels.json` for programs, `kernels.html` for people.

Whether a goal was reached is computed from the figures; what this device cannot show is null, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from ml_engineer_track.kernels.benchmark import Product, Results
from shared.errors import UserError
from shared.files import write_json, write_text
from shared.page import document, heading, paragraph, table

#: Share of the copy bandwidth to reach at the shapes of a 7 B model.
SHARE = 0.7
NOT_MEASURED = "not measured here: speeds need a GPU"


def write(results: Results, folder: Path) -> Path:
    """Write both files, print what came out, return the path of the page. UserError, after that, when a kernel is wrong here."""
    write_json(folder / "kernels.json", facts(results))
    write_text(folder / "kernels.html", page(results))
    where = "in Triton's interpreter" if results.interpreted else str(results.hardware["gpu_info"])
    right = sum(case.right for case in results.cases)
    print(f"correct {where}: {right} of {len(results.cases)} cases, each beside float64")
    if results.copy_bandwidth is None:
        print(NOT_MEASURED)
    for found in findings(results):
        if found["reached"] is not None:
            print(f"  {'yes' if found['reached'] else 'NO ':3} {found['claim']}: {found['value']}")
    print(f"report: {folder / 'kernels.html'}  (figures: {folder / 'kernels.json'})")
    wrong = [case for case in results.cases if not case.right]
    if wrong:
        fix = "No speed is told of a wrong kernel; the report lists every case"
        raise UserError(f"{len(wrong)} of {len(results.cases)} cases are wrong on this device", wrong[0].kernel, fix)
    return folder / "kernels.html"


def facts(results: Results) -> dict[str, Any]:
    """The report for programs."""
    cases = [asdict(case) | {"right": case.right} for case in results.cases]
    return asdict(results) | {"cases": cases, "findings": findings(results)}


def findings(results: Results) -> list[dict[str, Any]]:
    """What the kernels are to show, with what came out; `value` and `reached` are None where it was not measured."""
    right = [case.right for case in results.cases]
    claims: list[tuple[str, str | None, bool | None]] = [
        ("every case within its rounding bound", f"{sum(right)} of {len(right)}", all(right)),
        share_of_copy(results.products),
        beside_bitsandbytes(results.products),
        saved_memory(results),
    ]
    return [{"claim": claim, "value": value, "reached": reached} for claim, value, reached in claims]


def share_of_copy(products: Sequence[Product]) -> tuple[str, str | None, bool | None]:
    claim = f"one row at 4 bits reaches at least {SHARE:.0%} of the copy bandwidth at every shape of the 7 B model"
    shares = [p.share for p in products if (p.model, p.batch, p.side) == ("7 B", 1, "ours, 4 bits")]
    if not shares:
        return claim, None, None
    return claim, f"{min(shares):.0%} to {max(shares):.0%}", min(shares) >= SHARE


def beside_bitsandbytes(products: Sequence[Product]) -> tuple[str, str | None, bool | None]:
    claim = "one row at 4 bits is at no shape slower than bitsandbytes"
    seconds = {(p.rows, p.columns, p.side): p.seconds for p in products if p.batch == 1}
    ratios = [seconds[*shape, "bitsandbytes nf4"] / t for (*shape, side), t in seconds.items() if side == "ours, 4 bits"]
    if not ratios:
        return claim, None, None
    return claim, f"{min(ratios):.2f} to {max(ratios):.2f} times as fast", min(ratios) >= 1


def saved_memory(results: Results) -> tuple[str, str | None, bool | None]:
    claim = "the fused loss takes less memory than PyTorch's on float32 and is no slower, at every vocabulary"
    sides = {(loss.vocabulary, loss.side): loss for loss in results.losses}
    pairs = [(own, sides[vocabulary, "PyTorch on float32"]) for (vocabulary, side), own in sides.items() if side == "ours"]
    if not pairs:
        return claim, None, None
    memory = [own.peak_bytes / other.peak_bytes for own, other in pairs]
    speed = [own.tokens_per_second / other.tokens_per_second for own, other in pairs]
    value = f"{min(memory):.2f} to {max(memory):.2f} of the memory, {min(speed):.2f} to {max(speed):.2f} times as fast"
    return claim, value, max(memory) < 1 and min(speed) >= 1


def page(results: Results) -> str:
    """The report for people."""
    h = results.hardware
    versions = f"torch {h['libraries']['torch']}, Triton {h['triton']}"
    machine = f"{h['cpu_info']}, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}; {versions}."
    claims = [
        [f["claim"], f["value"] or NOT_MEASURED, {True: "yes", False: "no", None: "-"}[f["reached"]]] for f in findings(results)
    ]
    title = "Two kernels of our own"
    return document(
        title,
        [
            heading(title, 1),
            paragraph(machine, lead=True),
            heading("What they are to show"),
            table(["claim", "measured", "reached"], claims),
            *correctness(results),
            *products(results),
            *losses(results),
        ],
    )


def correctness(results: Results) -> list[str]:
    how = (
        "In Triton's interpreter, which runs a kernel block by block on the CPU: it checks indices, masks and arithmetic, "
        "not what only the compiler or a GPU does."
        if results.interpreted
        else "Compiled, on the GPU."
    )
    rows = [
        [c.kernel, " x ".join(map(str, c.shape)), c.dtype, f"{c.error:.1e}", f"{c.bound:.1e}", "yes" if c.right else "NO"]
        for c in results.cases
    ]
    return [
        heading("Are they right?"),
        paragraph(f"{how} Every case beside float64; errors are relative to what each sum is made of."),
        table(["kernel", "rows x columns x batch, or tokens x vocabulary", "dtype", "error", "bound", "right"], rows),
    ]


def products(results: Results) -> list[str]:
    title = heading("Dequantise and multiply")
    if results.copy_bandwidth is None:
        return [title, paragraph(f"Bandwidth, beside bitsandbytes and bf16, is {NOT_MEASURED}.")]
    told = (
        f"Copying reaches {results.copy_bandwidth / 1e9:,.0f} GB/s here, read and written bytes counted. Bandwidth is the bytes "
        "a product must move / its time, with weights that are in no cache; a share above 1 is possible, as reading "
        "is faster than copying. Time is a call's in a CUDA graph; eager is the same call "
        "launched from Python, as the server does it."
    )
    rows = []
    for (model, n, k, batch), sides in groupby(results.products, key=lambda p: (p.model, p.rows, p.columns, p.batch)):
        rows += [
            [model, f"{n} x {k}", str(batch), p.side, f"{1e6 * p.seconds:.1f}", f"{1e6 * p.eager_seconds:.1f}",
             f"{p.bandwidth / 1e9:,.0f}", f"{p.share:.0%}"]
            for p in sides
        ]  # fmt: skip
    head = ["model", "outputs x inputs", "rows of input", "side", "time, µs", "eager, µs", "GB/s", "of copying"]
    return [title, paragraph(told), table(head, rows)]


def losses(results: Results) -> list[str]:
    title = heading("Cross-entropy")
    if not results.losses:
        return [title, paragraph(f"Tokens/s and peak memory, with the kernel and without, are {NOT_MEASURED}.")]
    rows = [
        [x.model, f"{x.tokens:,}", f"{x.vocabulary:,}", x.side, f"{x.tokens_per_second:,.0f}", f"{x.peak_bytes / 1e6:,.0f}"]
        for x in results.losses
    ]
    told = "Forward and backward on bf16 logits. Memory is the peak beyond the logits, their gradient included."
    head = ["model", "tokens", "vocabulary", "side", "tokens/s", "peak memory, MB"]
    return [title, paragraph(told), table(head, rows)]
