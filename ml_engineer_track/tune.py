"""Searches the settings of fine-tuning that a preset can only guess: LoRA rank, alpha ratio, target modules, learning rate.

Why an ML engineer does this: copied hyper-parameters are somebody else's answer. A search says which values matter at all, how
far the preset is from the best of them, and whether that distance is more than chance.

    python -m ml_engineer_track tune [--preset tiny] [--trials 30] [--minutes 20]      (make tune TRIALS= MINUTES=)

A trial is a fine-tuning by finetune.py on a stated share of the curated training rows (every skill in its proportion), with a
whole learning-rate schedule of its own; its score is the validation loss on a fixed sample of the validation rows. Test rows are
not in the folder that trials read. The first trial takes the preset's own values. Then Optuna's tree-structured Parzen estimator
(Bergstra et al. 2011) proposes, and the median rule (Golovin et al. 2017) ends trials whose validation loss is worse than half
of the others' at the same step. At the end the best values and the preset's are trained again with other seeds, because the
best of many trials is lucky.

The study lies in SQLite under `artifacts/tune/`: stopped at any moment, it goes on with the same command, and more trials
add to it. It is another study when data, model, share or search space change.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ml_engineer_track.accounting import read_config, skeleton
from ml_engineer_track.checkpoint import Diverged
from ml_engineer_track.curate import CuratedData, Row
from ml_engineer_track.finetune import encode, finetune, plan_batches
from ml_engineer_track.models import load_tokenizer
from shared.errors import UserError
from shared.files import sha256_text, sha256_tree, write_jsonl
from shared.settings import Settings

if TYPE_CHECKING:
    import optuna

Targets = str | list[str]
#: Completed trials before the median rule may end others.
STARTUP = 4


@dataclass(frozen=True)
class Values:
    """One point of the search: `targets` is the name of a group of modules."""

    rank: int
    alpha_ratio: float
    targets: str
    learning_rate: float

    def close_to(self, other: Values) -> bool:
        """The same, as far as a database keeps numbers."""
        same = (self.rank, self.targets) == (other.rank, other.targets) and math.isclose(self.alpha_ratio, other.alpha_ratio)
        return same and math.isclose(self.learning_rate, other.learning_rate, rel_tol=1e-6)

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha_ratio:g} x rank, {self.targets}, learning rate {self.learning_rate:.2e}"


@dataclass(frozen=True)
class Search:
    """A study and all that its trials depend on. `steps` is a trial's length, `full_steps` that of a whole run."""

    settings: Settings
    data: CuratedData
    study: optuna.Study
    groups: dict[str, Targets]
    preset: Values
    steps: int
    full_steps: int
    folder: Path


def tune(search: Search, trials: int | None = None, minutes: float | None = None) -> None:
    """Search until the study holds `trials` (default: the preset's) finished ones, or `minutes` are over.

    A trial that was begun is finished; the repeats with other seeds come on top. Ctrl-C keeps what is finished.
    """
    wanted = (trials or search.settings.tune.trials) - len(finished(search.study))
    if wanted > 0:
        add_preset_trial(search)
        search.study.optimize(
            lambda trial: objective(search, trial),
            n_trials=wanted,
            timeout=None if minutes is None else 60 * minutes,
            callbacks=[lambda study, trial: print(f"  {trial_line(study, trial)}", flush=True)],
        )
    repeat(search)


def objective(search: Search, trial: optuna.Trial) -> float:
    """Validation loss of one short fine-tuning (weighted mean, nats per reply token). A diverged one counts as ended early."""
    optuna = need_optuna()
    values = suggest(search.settings, search.groups, trial)
    keeps = values.close_to(search.preset)  # what all others are compared with is trained to its end

    def watch(step: int, loss: float) -> None:
        trial.report(loss, step)
        if trial.should_prune() and not keeps:
            raise optuna.TrialPruned

    try:
        return train(search, values, search.settings.seed, watch)
    except Diverged:
        raise optuna.TrialPruned from None


def train(search: Search, values: Values, seed: int, watch: Callable[[int, float], None] | None = None) -> float:
    """The best validation loss of a short run with these values."""
    settings, work = search.settings, search.folder / "trial"
    shutil.rmtree(work, ignore_errors=True)
    options = settings.finetune.model_copy(
        update={
            "rank": values.rank,
            "alpha": max(1, round(values.alpha_ratio * values.rank)),
            "targets": search.groups[values.targets],
            "learning_rate": values.learning_rate,
            "evaluate_every": look_every(settings, search.steps),
            "patience": search.steps,  # all looks, so that losses compare
            "checkpoint_every": search.steps + 1,  # a stopped trial is not gone on with
        }
    )
    try:
        short = settings.model_copy(update={"finetune": options, "artifacts": work, "seed": seed})
        return finetune(short, search.data, watch).best_validation_loss
    finally:
        shutil.rmtree(work, ignore_errors=True)


def repeat(search: Search) -> None:
    """Train the best values and the preset's again with other seeds; losses are kept with the study."""
    found = best(search.study)
    if found is None or found.close_to(search.preset):
        return
    for values in (found, search.preset):
        for seed in other_seeds(search.settings):
            if (name := repeat_name(values, seed)) not in search.study.user_attrs:
                loss = train(search, values, seed)
                search.study.set_user_attr(name, loss)
                print(f"  {name}: {loss:.4f}", flush=True)


def repeats(search: Search, values: Values) -> list[float]:
    """The losses of `values` with other seeds, as far as there are."""
    kept, names = search.study.user_attrs, [repeat_name(values, seed) for seed in other_seeds(search.settings)]
    return [kept[name] for name in names if name in kept]


def other_seeds(settings: Settings) -> range:
    return range(settings.seed + 1, settings.seed + 1 + settings.tune.repeats)


def repeat_name(values: Values, seed: int) -> str:
    return f"seed {seed}: {values}"


# --- the search space ------------------------------------------------------------------------------------------------


def suggest(settings: Settings, groups: dict[str, Targets], trial: optuna.Trial) -> Values:
    """The learning rate is searched, stored and weighed by the importances on a logarithmic scale."""
    low, high = settings.tune.learning_rates
    return values_of(
        {
            "rank": trial.suggest_categorical("rank", settings.tune.ranks),
            "alpha_ratio": trial.suggest_categorical("alpha_ratio", settings.tune.alpha_ratios),
            "targets": trial.suggest_categorical("targets", list(groups)),
            "log10_learning_rate": trial.suggest_float("log10_learning_rate", math.log10(low), math.log10(high)),
        }
    )


def values_of(params: dict[str, Any]) -> Values:
    rate = float(f"{10 ** params['log10_learning_rate']:.6g}")  # 0.002 comes back as 0.002
    return Values(params["rank"], params["alpha_ratio"], params["targets"], rate)


def params_of(values: Values) -> dict[str, Any]:
    own = asdict(values)
    return {**own, "log10_learning_rate": math.log10(own.pop("learning_rate"))}


def preset_values(settings: Settings, groups: dict[str, Targets]) -> Values:
    """The preset's own point. UserError when the search space leaves it out: then nothing could be compared."""
    f, t = settings.finetune, settings.tune
    where, name = f"preset {settings.preset}", next((n for n, modules in groups.items() if modules == f.targets), None)
    ratio = next((r for r in t.alpha_ratios if round(r * f.rank) == f.alpha), None)
    low, high = t.learning_rates
    if f.rank not in t.ranks:
        raise UserError(f"finetune.rank {f.rank} is not among tune.ranks {t.ranks}", where, "Add it")
    if ratio is None:
        raise UserError(f"finetune.alpha / rank = {f.alpha / f.rank:g} is not among tune.alpha_ratios", where, "Add it")
    if not low <= f.learning_rate <= high or low >= high:
        raise UserError(f"finetune.learning_rate {f.learning_rate:g} lies outside tune.learning_rates", where, "Widen them")
    if name is None:
        raise UserError(f"finetune.targets {f.targets!r} is none of {', '.join(groups)}", where, "Set one of them to tune")
    return Values(f.rank, ratio, name, f.learning_rate)


def target_groups(model: str) -> dict[str, Targets]:
    """All projections, those of attention and those of the feed-forward part, found in the model's own modules."""
    names = [
        name
        for name, module in skeleton(read_config(model), torch.float32).named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]
    attention = {name.rsplit(".", 1)[-1] for name in names if "attn" in name or "attention" in name}
    others = {name.rsplit(".", 1)[-1] for name in names} - attention
    groups: dict[str, Targets] = {"all-linear": "all-linear"}
    if attention and others:
        groups |= {"attention": sorted(attention), "feed-forward": sorted(others)}
    return groups


# --- the study -------------------------------------------------------------------------------------------------------


def open_study(settings: Settings, data: CuratedData) -> Search:
    """The study of these data, model and search space, new or as it was left.

    UserError without optuna, or when the preset's own values lie outside its search space.
    """
    optuna = need_optuna()
    options, folder = settings.tune, settings.artifacts / "tune" / settings.work.name
    groups = target_groups(settings.model_path)
    preset = preset_values(settings, groups)
    short = short_data(settings, data, folder / "data")
    tokenizer = load_tokenizer(settings.model_path)
    steps, full_steps = (
        len(plan_batches(encode(d.rows("train"), tokenizer), settings.finetune, settings.seed)) for d in (short, data)
    )
    free = {"rank", "alpha", "targets", "learning_rate"}  # or without effect on a trial's loss
    free |= {"evaluate_every", "patience", "checkpoint_every", "micro_batch_tokens", "gradient_checkpointing"}
    weights = Path(settings.model_path)
    depends = [
        data.version, options.model_dump(exclude={"trials", "repeats"}), settings.finetune.model_dump(exclude=free),
        settings.seed, settings.model, sha256_tree([weights]) if weights.is_dir() else "", groups,
    ]  # fmt: skip
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # it logs what stops a trial with a traceback
    name = f"{data.version}-{sha256_text(json.dumps(depends))[:12]}"
    database = f"sqlite:///{(folder / 'study.db').resolve()}"
    study = optuna.create_study(
        storage=database,
        study_name=name,
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=look_every(settings, steps) + 1),
    )
    # Seeded by how far the study is: the same seed again would propose what it has tried.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # of a run that was killed
    return Search(settings, short, study, groups, preset, steps, full_steps, folder)


def short_data(settings: Settings, data: CuratedData, folder: Path) -> CuratedData:
    """`tune.share` of the training rows and `tune.validation_rows` validation rows, skill by skill, in a folder of their own."""
    train, validation = data.rows("train"), data.rows("validation")
    kept = {
        "train": sample(train, settings.tune.share, settings.seed),
        "validation": sample(validation, min(1.0, settings.tune.validation_rows / len(validation)), settings.seed),
    }
    for split, rows in kept.items():
        write_jsonl(folder / f"{split}.jsonl", [row.model_dump() for row in rows])
    skills = sorted({row.skill for row in train})
    counts = {split: {skill: sum(r.skill == skill for r in rows) for skill in skills} for split, rows in kept.items()}
    return CuratedData(data.version, folder, counts, {})


def sample(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The share of each skill's rows, at least one, in their order."""
    kept: set[int] = set()
    for skill in sorted({row.skill for row in rows}):
        places = [i for i, row in enumerate(rows) if row.skill == skill]
        kept.update(random.Random(f"{seed}/{skill}").sample(places, max(1, round(share * len(places)))))
    return [rows[i] for i in sorted(kept)]


def look_every(settings: Settings, steps: int) -> int:
    """Steps between two of the `tune.looks` looks at the validation loss; the last look is at the end."""
    return math.ceil(steps / settings.tune.looks)


def add_preset_trial(search: Search) -> None:
    """The preset's values go first, unless they are there already."""
    for trial in search.study.get_trials(deepcopy=False):
        given = trial.params or trial.system_attrs.get("fixed_params", {})
        if trial.state.name in ("COMPLETE", "WAITING") and given and values_of(given).close_to(search.preset):
            return
    search.study.enqueue_trial(params_of(search.preset))


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials that came to their end or were ended because others were better."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in ("COMPLETE", "PRUNED")]


def best(study: optuna.Study) -> Values | None:
    """The values with the lowest loss of all trials that came to their end; None when none did."""
    done = [t for t in finished(study) if t.state.name == "COMPLETE"]
    return values_of(min(done, key=lambda t: t.value).params) if done else None


def trial_line(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> str:
    lowest = min((t.value for t in finished(study) if t.state.name == "COMPLETE"), default=math.nan)
    looks = len(trial.intermediate_values)
    end = f"{trial.value:.4f}" if trial.state.name == "COMPLETE" else f"ended after {looks} looks"
    return f"trial {trial.number}: {values_of(trial.params)}: {end} (best {lowest:.4f})"


def need_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("optuna is not installed", "", "Run `pip install -c torch.txt -c constraints.txt -e '.[tune]'`") from None
    return optuna
