"""All settings of the AI track: a preset in YAML, with single values replaced by the environment or by arguments.

    LLM_BASE_URL=http://localhost:8000/v1 LLM_MODEL=Qwen/Qwen3-0.6B make ai

A product is moved between machines and model providers far more often than it is reprogrammed, so everything that
differs between them is an environment variable. Secrets come only from there and are never printed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from shared.errors import UserError
from shared.thinned import thinned

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "ai_engineer_track" / "presets"

#: environment variable -> path of the value it replaces
OVERRIDES = {
    "LLM_BASE_URL": ("llm", "base_url"),
    "LLM_MODEL": ("llm", "model"),
    "LLM_API_KEY": ("llm", "api_key"),
    "LARGE_BASE_URL": ("large", "base_url"),
    "LARGE_MODEL": ("large", "model"),
    "LARGE_API_KEY": ("large", "api_key"),
    "JUDGE_BASE_URL": ("judge", "base_url"),
    "JUDGE_MODEL": ("judge", "model"),
    "JUDGE_API_KEY": ("judge", "api_key"),
    "CORPUS": ("corpus",),
    "DATASETS": ("datasets",),
    "ARTIFACTS": ("artifacts",),
    "HOST": ("api", "host"),
    "PORT": ("api", "port"),
    "API_TOKEN": ("api", "token"),
    "RATE_PER_MINUTE": ("api", "rate_per_minute"),
    "OTEL_EXPORTER_OTLP_ENDPOINT": ("otel_endpoint",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LlmSettings(_Strict):
    """One model behind an OpenAI-compatible API. `base_url` None: the bundled server; `model` None: the one it serves.

    `published` is the version of the artifact behind the address, where the bundled server serves it.
    """

    base_url: str | None = None
    model: str | None = None
    published: str | None = None
    api_key: SecretStr = SecretStr("")
    timeout_s: float = Field(gt=0)
    retries: int = Field(ge=0)
    concurrency: int = Field(gt=0)
    price_in: float = Field(ge=0)
    price_out: float = Field(ge=0)

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("an http:// or https:// address is needed, for example http://127.0.0.1:8001/v1")
        return url


class Retrieve(_Strict):
    k: int = Field(gt=0)
    candidates: int = Field(gt=0)
    rrf_k: int = Field(gt=0)


class Clarify(_Strict):
    max_turns: int = Field(ge=0)


class Answer(_Strict):
    mode: Literal["grounded", "free"]
    max_sources: int = Field(gt=0, le=60)
    max_sentences: int = Field(gt=0)


class Cache(_Strict):
    enabled: bool
    semantic_threshold: float = Field(gt=0, le=1)


class Api(_Strict):
    host: str
    port: int = Field(ge=0, le=65535)
    token: SecretStr | None = None
    max_chars: int = Field(gt=0)
    rate_per_minute: int = Field(gt=0)
    concurrency: int = Field(gt=0)


class Evaluate(_Strict):
    per_kind: int = Field(gt=0)
    concurrency: int = Field(gt=0)
    bootstrap: int = Field(ge=100)


class AiSettings(_Strict):
    """One run of the AI track. `corpus` None stands for `<datasets>/health_library`."""

    preset: str
    seed: int
    artifacts: Path = ROOT / "artifacts"
    datasets: Path = ROOT / "datasets"
    families: float = Field(default=1.0, gt=0, le=1)
    corpus: Path | None = None
    otel_endpoint: str | None = None
    llm: LlmSettings
    large: LlmSettings | None = None
    judge: LlmSettings | None = None
    retrieve: Retrieve
    clarify: Clarify
    answer: Answer
    cache: Cache
    api: Api
    evaluate: Evaluate

    def with_its_data(self) -> AiSettings:
        """The same run on the share of the leaflet families that its preset asks for (`shared/thinned.py`)."""
        return self.model_copy(update={"datasets": thinned(self.datasets, self.families, self.artifacts), "families": 1.0})

    @property
    def corpus_path(self) -> Path:
        return self.corpus or self.datasets / "health_library"

    @property
    def judge_llm(self) -> LlmSettings:
        """The judge's model; the assistant's own when none is set."""
        return self.judge or self.llm


def load_ai_settings(preset: str | None = None, **overrides: Any) -> AiSettings:
    """The preset (argument, else PRESET, else `tiny`) with the environment's and then the arguments' values over it.

    PRESET is shared with the ML track: a name only that track knows (a larger base model, say) uses `tiny` here.
    Arguments are named like the OVERRIDES, in lower case; None means "not given". UserError for a value that cannot be.
    """
    if unknown := set(overrides) - {variable.lower() for variable in OVERRIDES}:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    name = preset or os.environ.get("PRESET") or "tiny"
    known = {path.stem: path for path in PRESETS.glob("*.yaml")}
    path = known.get(name, PRESETS / "tiny.yaml")
    values = _read(path)
    values["preset"] = name
    for variable, place in OVERRIDES.items():
        given = overrides.get(variable.lower())
        given = os.environ.get(variable) if given is None else given
        if given in (None, ""):
            continue
        *groups, key = place
        target = values
        for group in groups:
            if not isinstance(target.get(group), dict):  # `judge: null`: another model, else treated like the first
                target[group] = {**values["llm"]}
            target = target[group]
        target[key] = given
    try:
        return AiSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {first['msg']}", f"preset {name}", f"Correct {path.name} or the variable") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, OverflowError, RecursionError):
        raise UserError("preset is not readable YAML", str(path), "Compare it with the shipped tiny.yaml") from None
    if not isinstance(values, dict) or not isinstance(values.get("llm"), dict):
        raise UserError("preset has no `llm:` group", str(path), "Compare it with the shipped tiny.yaml")
    return values
