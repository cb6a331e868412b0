"""All settings, in one place: presets in YAML, overridden by the environment or the command line.

    PRESET=tiny MODEL=HuggingFaceTB/SmolLM2-135M-Instruct METHOD=qlora make ml

A preset is a file `ml_engineer_track/presets/<name>.yaml` with a comment on every line that matters; `PRESET=some/file.yaml` is
one of your own. The variables in `OVERRIDES` replace single values; nothing else does, so that a run is described by its preset
and a handful of words.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import UserError
from shared.thinned import thinned

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "ml_engineer_track" / "presets"
BASE_MODEL = ROOT / "ml_engineer_track" / "base_model"

#: environment variable -> path of the value it replaces
OVERRIDES = {
    "MODEL": ("model",),
    "METHOD": ("finetune", "method"),
    "SEED": ("seed",),
    "DATASETS": ("datasets",),
    "ARTIFACTS": ("artifacts",),
    "VRAM_GB": ("vram_gb",),
    "ENGINE": ("engine",),
    "WORKERS": ("workers",),
    "STRATEGY": ("strategy",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Curate(_Strict):
    max_sources: int = Field(gt=1, le=60)
    max_prompt_tokens: int = Field(gt=64)
    near_duplicate: float = Field(gt=0, lt=1)
    copies: int = Field(ge=1)
    conversations: int = Field(ge=0)
    conversation_turns: int = Field(ge=2)
    single_share: float = Field(ge=0, le=1)
    max_rows: int | None = None


class Training(_Strict):
    """What every training has: how fast it learns, how its rows become steps, when it looks, saves and stops."""

    learning_rate: float = Field(gt=0)
    epochs: float = Field(gt=0)
    batch_tokens: int = Field(gt=0)
    batch_rows: int = Field(gt=0)
    warmup_share: float = Field(ge=0, lt=1)
    evaluate_every: int = Field(gt=0)
    patience: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)


class Finetune(Training):
    method: Literal["lora", "qlora"]
    rank: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: str | list[str]
    choice_weight: float = Field(ge=1)
    # Memory, not learning: VRAM_GB sets these two (ml_engineer_track/accounting.py).
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    gradient_checkpointing: bool = False


class Tune(_Strict):
    trials: int = Field(gt=0)
    share: float = Field(gt=0, le=1)
    looks: int = Field(ge=2)
    validation_rows: int = Field(gt=0)
    repeats: int = Field(ge=1)
    ranks: list[int] = Field(min_length=1)
    alpha_ratios: list[float] = Field(min_length=1)
    learning_rates: tuple[float, float]


class Quantize(_Strict):
    variants: list[Literal["nf4", "int8", "q8_0", "q4_0"]]


class LowBits(_Strict):
    uniform_bits: list[Literal[2, 3, 4]] = Field(min_length=1)
    group: Literal[16, 32, 64]
    other_groups: list[Literal[16, 32, 64]]
    mixed_like: Literal[2, 3, 4]
    mixed_choices: list[Literal[2, 3, 4, 8]] = Field(min_length=2)
    calibration_rows: int = Field(gt=0)
    divergence_rows: int = Field(gt=0)
    repair_rank: int = Field(gt=0)
    repair_steps: int = Field(gt=0)
    repair_learning_rate: float = Field(gt=0)


class Distill(Training):
    hidden: int = Field(gt=0)
    layers: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    copies: int = Field(ge=1)
    temperature: float = Field(gt=0)
    top_k: int = Field(gt=0)
    task_share: float = Field(ge=0, le=1)
    prompt_weight: float = Field(ge=0)
    on_policy_share: float = Field(ge=0, le=0.5)
    sample_tokens: int = Field(gt=0)


class Evaluate(_Strict):
    answer_rows: int = Field(gt=0)
    free_rows: int = Field(gt=0)
    other_rows: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)
    bootstrap: int = Field(ge=100)


class Benchmark(_Strict):
    batch_sizes: list[int]
    prompt_tokens: int = Field(gt=0)
    new_tokens: int = Field(gt=1)
    repeats: int = Field(ge=5)
    training_steps: int = Field(gt=0)


class Gate(_Strict):
    """What a candidate may lose before it is refused, each on the scale of its figure."""

    test_rows: int = Field(gt=0)
    refusal_rows: int = Field(gt=0)
    evidence_margin: float = Field(gt=0, lt=1)
    emergency_margin: float = Field(gt=0)
    refusal_margin: float = Field(gt=0, lt=1)
    slower: float = Field(gt=1)
    rounds: int = Field(ge=5)


class Trial(_Strict):
    """How a candidate is tried on live traffic before it is promoted."""

    share: float = Field(gt=0, lt=1)
    error: float = Field(gt=0, lt=0.5)
    margin: float = Field(gt=0, lt=1)
    shadow_answers: int = Field(gt=0)
    canary_answers: int = Field(gt=0)


class Loop(_Strict):
    """When the model is changed, what it learns then besides the labels, and what it must pass (ml_engineer_track/lifecycle/)."""

    every_seconds: float = Field(gt=0)
    enough_labels: int = Field(gt=0)
    oldest_days: float | None = Field(default=None, gt=0)
    label_copies: int = Field(ge=1)
    exam_share: float = Field(gt=0, lt=1)
    replay: dict[Literal["answer", "not_answered", "decide", "clarify", "judge"], int]
    emergencies: float = Field(ge=1)
    gate: Gate
    trial: Trial
    keep: int = Field(ge=0)


class Settings(_Strict):
    """One run of the ML track."""

    preset: str
    model: str
    seed: int
    artifacts: Path = ROOT / "artifacts"
    datasets: Path = ROOT / "datasets"
    families: float = Field(default=1.0, gt=0, le=1)
    vram_gb: float | None = Field(default=None, gt=0)
    # Who trains: this process, or workers that torchrun or Ray starts (ml_engineer_track/launch.py).
    engine: Literal["local", "torchrun", "ray"] = "local"
    workers: int = Field(default=1, gt=0)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    curate: Curate
    finetune: Finetune
    tune: Tune
    quantize: Quantize
    low_bits: LowBits
    distill: Distill
    evaluate: Evaluate
    benchmark: Benchmark
    #: only presets that `make loop` may use have it
    loop: Loop | None = None

    @property
    def model_path(self) -> str:
        """What `from_pretrained` gets: the bundled model's folder, another folder, or a hub id."""
        return str(BASE_MODEL) if self.model == "bundled" else self.model

    def with_its_data(self) -> Settings:
        """The same run on the share of the leaflet families that its preset asks for (`shared/thinned.py`)."""
        return self.model_copy(update={"datasets": thinned(self.datasets, self.families, self.artifacts), "families": 1.0})

    @property
    def work(self) -> Path:
        """Where the stages of this preset and model leave their results."""
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.model).strip("-.")
        return self.artifacts / "runs" / f"{self.preset}-{name}"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_settings(preset: str | None = None, **overrides: Any) -> Settings:
    """The preset (argument, else PRESET, else `tiny`) with the environment's and then the arguments' values over it.

    A preset that ends in `.yaml` is a file; the run is then named after it. Arguments are named like the OVERRIDES, in lower
    case; None means "not given". UserError for an unknown preset or a value the preset cannot take.
    """
    name = preset or os.environ.get("PRESET") or "tiny"
    path = PRESETS / f"{name}.yaml"
    if name.endswith(".yaml"):
        path, name = Path(name), Path(name).stem
        if not path.is_file():
            raise UserError("no such preset file", str(path), "Copy one of ml_engineer_track/presets")
    elif name not in preset_names():
        raise UserError(f"unknown preset {name!r}", "PRESET", f"Use one of: {', '.join(preset_names())}, or a .yaml file")
    if unknown := set(overrides) - {variable.lower() for variable in OVERRIDES}:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        raise UserError("preset is not valid YAML", str(path), "Compare it with tiny.yaml") from None
    if not isinstance(values, dict):
        raise UserError("preset is empty or not a list of `name: value` lines", str(path), "Compare it with tiny.yaml")
    values["preset"] = name
    for variable, place in OVERRIDES.items():
        given = overrides.get(variable.lower())
        given = os.environ.get(variable) if given is None else given
        if given not in (None, ""):
            target = values
            for key in place[:-1]:
                target = target[key] if isinstance(target.get(key), dict) else {}
            target[place[-1]] = given
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {first['msg']}", f"preset {name}", f"Correct {path.name} or the variable") from None
