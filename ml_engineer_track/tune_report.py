"""The report of a search: a line that says what it found, `artifacts/reports/tune.json` for programs, `tune.html` for people.

    python -m ml_engineer_track tune      (its last step)

Whether the preset's values are what the search found is computed from losses with seeds the search has not seen. Importances are
fANOVA's (Hutter et al. 2014): the share of the loss's variance over the whole space that one value explains alone.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ml_engineer_track.tune import Search, Values, best, finished, need_optuna, repeats, values_of
from shared.files import write_json, write_text
from shared.hardware import fingerprint
from shared.page import document, heading, paragraph, svg, table

if TYPE_CHECKING:
    import optuna

#: Completed trials below which importances say nothing.
ENOUGH = 8
TRIAL_HEAD = ("trial", "rank", "alpha / rank", "targets", "learning rate")


def write(search: Search) -> Path | None:
    """Write both files, print what was found. None, and a line, as long as no trial has come to its end."""
    if best(search.study) is None:
        print("  tune: no trial is finished yet, so there is nothing to report")
        return None
    folder, found = search.settings.artifacts / "reports", facts(search)
    write_json(folder / "tune.json", found)
    write_text(folder / "tune.html", page(found))
    for value, share in (found["importances"] or {}).items():
        print(f"  importance of {value}: {share:.2f}")
    print(f"  {found['verdict']['says']}")
    print(f"report: {folder / 'tune.html'}  (figures: {folder / 'tune.json'})")
    return folder / "tune.html"


def facts(search: Search) -> dict[str, Any]:
    """The report for programs. Losses are weighted means in nats per reply token."""
    s, found = search.settings, best(search.study)
    assert found is not None
    trials = [history(t) for t in finished(search.study)]
    return {
        "preset": s.preset,
        "model": s.model,
        "seed": s.seed,
        "hardware": fingerprint(),
        "study": {"name": search.study.study_name, "database": str(search.folder / "study.db")},
        "budget": {
            "share": s.tune.share, "steps": search.steps, "full_steps": search.full_steps,
            "rows": {split: sum(c.values()) for split, c in search.data.counts.items()}, "data": search.data.version,
        },
        "space": {
            "rank": s.tune.ranks, "alpha_ratio": s.tune.alpha_ratios, "targets": search.groups,
            "learning_rate": s.tune.learning_rates,
        },
        "trials": trials,
        "pruned": sum(t["state"] == "pruned" for t in trials),
        "importances": importances(search),
        "best": beside(search, found),
        "preset_values": beside(search, search.preset),
        "verdict": verdict(search, found),
    }  # fmt: skip


def history(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    looks = sorted(trial.intermediate_values.items())
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "values": vars(values_of(trial.params)),
        "loss": trial.value if trial.state.name == "COMPLETE" else None,
        "looks": [{"step": step, "loss": loss} for step, loss in looks],
        "seconds": trial.duration.total_seconds() if trial.duration else None,
    }


def beside(search: Search, values: Values) -> dict[str, Any]:
    """Values with their losses: in the search, and with the other seeds."""
    own = [t.value for t in finished(search.study) if t.state.name == "COMPLETE" and values_of(t.params).close_to(values)]
    return {"values": vars(values), "loss": min(own, default=None), "other_seeds": repeats(search, values)}


def importances(search: Search) -> dict[str, float] | None:
    """Shares of the variance, adding to 1, largest first; None while trials that came to their end are too few to say."""
    if sum(t.state.name == "COMPLETE" for t in finished(search.study)) < ENOUGH:
        return None
    optuna = need_optuna()
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=search.settings.seed)
    try:
        found = optuna.importance.get_param_importances(search.study, evaluator=evaluator)
    except RuntimeError:  # all losses are the same
        return None
    return {name.removeprefix("log10_"): float(share) for name, share in found.items()}


def verdict(search: Search, found: Values) -> dict[str, Any]:
    """Whether the preset's values are what was found, or as good, or worse with every seed that was tried."""
    number = len(finished(search.study))
    count = f"{number} trial{'s' if number > 1 else ''}"
    if found.close_to(search.preset):
        return {"preset_is_best": True, "says": f"the preset's values are what {count} found: {found}"}
    ours, theirs = repeats(search, found), repeats(search, search.preset)
    if len(ours) < search.settings.tune.repeats or len(theirs) < len(ours):
        says = f"the best of {count} so far: {found}; it was not yet compared with the preset's values on other seeds"
        return {"preset_is_best": None, "says": says}
    worse = all(a < b for a, b in zip(ours, theirs, strict=True))
    figures = f"{mean(ours):.4f} beside the preset's {mean(theirs):.4f} ({mean(ours) / mean(theirs) - 1:+.1%})"
    seeds = f"{len(ours)} other seed{'s' if len(ours) > 1 else ''}"
    if worse:
        says = f"the preset's values are not what {count} found: {found} gives {figures}, lower with each of {seeds}"
    else:
        good = f"the preset's values are as good as what {count} found"
        says = f"{good}: {found} gives {figures}, not lower with each of {seeds}"
    return {"preset_is_best": not worse, "says": says}


# --- what people read ------------------------------------------------------------------------------------------------


def page(f: dict[str, Any]) -> str:
    h, b, title = f["hardware"], f["budget"], "Hyper-parameters of fine-tuning, searched"
    machine = f"{h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}"
    lead = f"Preset {f['preset']}, model {f['model']}, seed {f['seed']}, data {b['data']}. {machine}."
    story = (
        f"{len(f['trials'])} short fine-tunings, {f['pruned']} of them ended early. Each takes {b['steps']} steps on "
        f"{b['rows']['train']} training rows ({b['share']:.0%}; a whole run takes {b['full_steps']} steps) and is scored on "
        f"{b['rows']['validation']} validation rows; test rows play no part. Short runs favour values that "
        "learn fast: what they find is confirmed by a whole run, or not."
    )
    return document(
        title,
        [
            heading(title, 1),
            paragraph(lead, lead=True),
            paragraph(f"{f['verdict']['says'][0].upper()}{f['verdict']['says'][1:]}."),
            paragraph(story),
            heading("Found, and the preset's"),
            table(["", "found", "preset"], comparison(f["best"], f["preset_values"])),
            heading("Which values matter"),
            *importance_parts(f["importances"]),
            heading("All trials"),
            history_chart(f["trials"]),
            table([*TRIAL_HEAD, "looks", "validation loss", "s"], trial_rows(f["trials"])),
            paragraph(f"Study {f['study']['name']} in {f['study']['database']}."),
        ],
    )  # fmt: skip


def comparison(found: dict[str, Any], preset: dict[str, Any]) -> list[list[str]]:
    rows = [[name, *(_value(side["values"][name]) for side in (found, preset))] for name in found["values"]]
    losses = [["validation loss in the search", *(_loss(side["loss"]) for side in (found, preset))]]
    losses += [["with other seeds", *(", ".join(map(_loss, side["other_seeds"])) or "-" for side in (found, preset))]]
    return rows + losses


def importance_parts(shares: dict[str, float] | None) -> list[str]:
    if shares is None:
        return [paragraph(f"Not computed: fewer than {ENOUGH} trials came to their end, or all had the same loss.")]
    story = "fANOVA over the trials that came to their end: the share of the loss's variance that each value explains alone."
    rows = [[name, f"{share:.3f}"] for name, share in shares.items()]
    return [paragraph(story), importance_chart(shares), table(["value", "importance"], rows)]


def trial_rows(trials: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [str(t["number"]), *map(_value, t["values"].values()), str(len(t["looks"])),
         _loss(t["loss"]) if t["state"] == "complete" else f"ended at {_loss(_last(t))}", f"{t['seconds'] or 0:.0f}"]
        for t in trials
    ]  # fmt: skip


def importance_chart(shares: dict[str, float]) -> str:
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(shares) + 1))
    axes.barh(list(shares)[::-1], list(shares.values())[::-1], color="0.8", edgecolor="black", height=0.6)
    axes.set(xlabel="share of the variance of the validation loss", xlim=(0, 1))
    return _closed(figure)


def history_chart(trials: list[dict[str, Any]]) -> str:
    """Every trial, and the best so far. Trials that were ended stand at their last loss."""
    done = [t for t in trials if t["state"] == "complete"]
    ended = [t for t in trials if t["state"] != "complete" and _last(t) is not None]
    lowest = [min(t["loss"] for t in done[: n + 1]) for n in range(len(done))]
    figure, axes = plt.subplots(figsize=(9, 3))
    axes.plot([t["number"] for t in done], [t["loss"] for t in done], "ko", markersize=4, label="came to its end")
    axes.plot([t["number"] for t in ended], [_last(t) for t in ended], "x", color="0.5", label="ended early")
    axes.step([t["number"] for t in done], lowest, color="0.4", linewidth=1, where="post", label="best so far")
    axes.set(xlabel="trial", ylabel="validation loss, nats")
    axes.legend(frameon=False)
    return _closed(figure)


def _last(trial: dict[str, Any]) -> float | None:
    return trial["looks"][-1]["loss"] if trial["looks"] else None


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _closed(figure: Any) -> str:
    text = svg(figure)
    plt.close(figure)
    return text
