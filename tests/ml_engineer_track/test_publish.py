"""What is handed over: the variants, what they answer word for word, and a recommendation that follows from figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ml_engineer_track import publish as pub
from ml_engineer_track.curate import CuratedData
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.finetune import Tuned
from ml_engineer_track.models import load_model, load_tokenizer, prompt_text, weight_bytes
from ml_engineer_track.quantize import Variants, save
from shared import handoff
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.hardware import fingerprint
from shared.metrics import Estimate
from shared.settings import Settings

KEYS = ("grounded/evidence_f1", "free/evidence_f1", "grounded/correct_refusal", "grounded/decision_accuracy")


def scores_of(name: str, value: float, rows: int = 900) -> Scores:
    return Scores(name, {k: Estimate(value=value, low=value - 0.1, high=value + 0.1, n=rows) for k in KEYS}, [])


def figures_of(times: dict[str, float], gpu: str | None = None) -> dict[str, Any]:
    models = {name: {"batch": {"1": {"tpot": {"p50": seconds}}}} for name, seconds in times.items()}
    return {"hardware": {"gpu_info": gpu}, "models": models}


@pytest.fixture(scope="module")
def made(
    micro_path: str, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tuned, Variants, dict[str, Scores], dict[str, Any]]:
    """The results of the earlier stages, with the micro model as if it had been tuned."""
    folder = tmp_path_factory.mktemp("variants")
    sizes = {}
    for name, model in {
        "bf16": load_model(micro_path, torch.bfloat16),
        "nf4": load_model(micro_path, torch.bfloat16, variant="nf4"),
    }.items():
        save(model, tokenizer, folder / name)
        sizes[name] = weight_bytes(model)
    tuned = Tuned(
        adapter="", base=micro_path, method="lora", steps=3, stopped_early=False, resumed_at=0, best_validation_loss=1.5,
        validation=[], loss=[], seconds=1.0, tokens_per_second=1.0, data_wait_share=0.0, mfu=0.1, trainable_share=0.1,
    )  # fmt: skip
    scores = {name: scores_of(name, 0.5) for name in ("base", "bf16", "nf4")}
    figures = figures_of({"base": 0.1, "bf16": 0.2, "nf4": 0.1}) | {"hardware": fingerprint()}
    return tuned, Variants({name: str(folder / name) for name in sizes}, sizes), scores, figures


@pytest.fixture
def settings(small_settings: Settings, tmp_path: Path) -> Settings:
    return small_settings.model_copy(update={"artifacts": tmp_path})


@pytest.fixture(scope="module")
def published(small_settings: Settings, small_data: CuratedData, made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifacts = tmp_path_factory.mktemp("published")
    return Path(pub.publish(small_settings.model_copy(update={"artifacts": artifacts}), small_data, *made).folder)


def test_what_is_published_is_verified_and_current(published: Path) -> None:
    manifest = handoff.verify(published)
    assert handoff.current(published.parent) == published
    assert published.name == manifest.version
    assert set(manifest.variants) == {"bf16", "nf4"}


def test_the_manifest_says_what_a_consumer_must_know(
    published: Path, small_data: CuratedData, small_settings: Settings, made: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    manifest = handoff.read_manifest(published)
    assert manifest.prompt_version == PROMPT_VERSION
    assert manifest.context_window == 2048
    assert manifest.stop_token_ids == [tokenizer.eos_token_id]
    assert manifest.stop_tokens == ["<|end|>"]
    assert manifest.data.version == small_data.version
    assert manifest.data.counts == small_data.counts
    assert manifest.training["rank"] == small_settings.finetune.rank
    assert manifest.training["validation_loss"] == 1.5
    assert {name: v.weight_bytes for name, v in manifest.variants.items()} == made[1].weight_bytes
    assert manifest.variants["nf4"].quality["grounded/evidence_f1"].value == 0.5


@pytest.mark.parametrize("name", ["bf16", "nf4"])
def test_golden_replies_replay_exactly_from_the_published_files(published: Path, name: str) -> None:
    golden = handoff.read_manifest(published).variants[name].golden
    assert len(golden) == 8
    assert len({g.reply for g in golden}) > 1
    model, tokenizer = load_model(str(published / name)), load_tokenizer(str(published / name))
    for given in golden:
        batch = tokenizer(prompt_text(tokenizer, given.messages), add_special_tokens=False, return_tensors="pt").to(model.device)
        ids = model.generate(**batch, max_new_tokens=given.max_tokens, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert ids.tolist() == given.token_ids
        assert tokenizer.decode(given.token_ids, skip_special_tokens=True) == given.reply


def test_golden_prompts_are_validation_rows_of_every_skill(small_data: CuratedData) -> None:
    rows = pub.golden_rows(small_data)
    assert {r.split for r in rows} == {"validation"}
    assert {skill: [r.skill for r in rows].count(skill) for skill in ("answer", "decide", "clarify", "judge")} == dict.fromkeys(
        ("answer", "decide", "clarify", "judge"), 2
    )


def test_the_card_shows_figures_with_intervals_and_what_the_model_says(published: Path) -> None:
    card = (published / "MODEL_CARD.md").read_text(encoding="utf-8")
    manifest = handoff.read_manifest(published)
    assert "not a medical product" in card
    assert "0.500 [0.400, 0.600]" in card
    for part in (manifest.version, manifest.data.version, *(g.reply for g in manifest.variants["bf16"].golden)):
        assert part in card


def test_the_published_folder_loads_without_this_repository(published: Path) -> None:
    assert AutoTokenizer.from_pretrained(published / "nf4").chat_template
    assert not [p for p in published.rglob("*") if p.is_file() and p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_the_same_weights_are_the_same_version(settings: Settings, small_data: CuratedData, made: Any, published: Path) -> None:
    assert pub.publish(settings, small_data, *made).version == published.name


def folders_of(made: Any) -> dict[str, Path]:
    return {name: Path(folder) for name, folder in made[1].folders.items()}


def test_other_weights_are_another_version(made: Any, small_data: CuratedData, tmp_path: Path) -> None:
    folders, rest = folders_of(made), (small_data, made[2], made[3])
    before = pub.version_of(folders, *rest)
    changed = Path(shutil.copytree(folders["nf4"], tmp_path / "nf4"))
    content = (changed / "model.safetensors").read_bytes()
    (changed / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert pub.version_of(folders | {"nf4": changed}, *rest) != before
    assert pub.version_of(dict(reversed(folders.items())), *rest) == before


def test_the_same_weights_with_other_data_or_figures_are_another_version(made: Any, small_data: CuratedData) -> None:
    """The manifest says what a model was trained on and what was measured: one version must not stand for two manifests."""
    folders, (_, _, scores, figures) = folders_of(made), made
    versions = {
        pub.version_of(folders, small_data, scores, figures),
        pub.version_of(folders, replace(small_data, version="d-other"), scores, figures),
        pub.version_of(folders, small_data, scores | {"nf4": scores_of("nf4", 0.6)}, figures),
        pub.version_of(folders, small_data, scores, figures | {"busy_share": 0.9}),
    }
    assert len(versions) == 4
    assert all(re.fullmatch(r"m-[0-9a-f]{12}", version) for version in versions)


def test_publishing_the_same_again_keeps_what_is_there_and_makes_it_current(
    settings: Settings, small_data: CuratedData, made: Any
) -> None:
    first = pub.publish(settings, small_data, *made)
    manifest = (Path(first.folder) / "manifest.json").read_bytes()
    handoff.set_current(settings.artifacts / "models", "m-other")
    assert pub.publish(settings, small_data, *made) == first
    assert (Path(first.folder) / "manifest.json").read_bytes() == manifest
    assert handoff.current(settings.artifacts / "models") == Path(first.folder)


def test_a_failed_publication_leaves_the_current_model_alone(
    settings: Settings, small_data: CuratedData, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pub.publish(settings, small_data, *made)
    files = {p: p.read_bytes() for p in Path(first.folder).rglob("*") if p.is_file()}
    monkeypatch.setattr(pub, "version_of", lambda *_: "m-second")
    monkeypatch.setattr(pub, "card", lambda manifest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pub.publish(settings, small_data, *made)
    assert handoff.current(settings.artifacts / "models") == Path(first.folder)
    assert {p: p.read_bytes() for p in Path(first.folder).rglob("*") if p.is_file()} == files
    assert {p.name for p in (settings.artifacts / "models").iterdir()} == {"current", first.version}


def test_a_variant_whose_files_are_gone_is_refused(
    settings: Settings, small_data: CuratedData, made: Any, tmp_path: Path
) -> None:
    tuned, variants, scores, figures = made
    missing = replace(variants, folders=variants.folders | {"nf4": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="gone"):
        pub.publish(settings, small_data, tuned, missing, scores, figures)
    assert not (settings.artifacts / "models" / "current").exists()


# --- the recommendation ----------------------------------------------------------------------------------------------


def test_the_fastest_variant_that_keeps_its_quality_is_recommended() -> None:
    scores = {"base": scores_of("base", 0.9), "bf16": scores_of("bf16", 0.8), "nf4": scores_of("nf4", 0.79),
              "int8": scores_of("int8", 0.7)}  # fmt: skip
    times = {"base": 0.1, "bf16": 0.5, "nf4": 0.3, "int8": 0.2}
    # the base is not for use, int8 lost more than 3 % of its quality
    assert pub.recommend(scores, figures_of(times), {}) == {"cpu": "nf4", "cuda": "bf16"}
    assert pub.recommend(scores, figures_of(times, gpu="H200"), {}) == {"cpu": "bf16", "cuda": "nf4"}
    assert pub.recommend(scores, figures_of(times | {"nf4": 0.6}), {}) == {"cpu": "bf16", "cuda": "bf16"}


@pytest.mark.parametrize(
    ("q8_0", "q4_0", "chosen"),
    [(0.8, 0.8, "q4_0"), (0.8, 0.7, "q8_0"), (0.7, 0.8, "q4_0"), (0.7, 0.7, "bf16"), (None, None, "bf16")],
)
def test_a_cpu_gets_the_smallest_served_variant_that_keeps_its_quality(
    q8_0: float | None, q4_0: float | None, chosen: str
) -> None:
    """Without figures (no openvino-genai here) a variant is not recommended."""
    values = {"base": 0.9, "bf16": 0.8, "nf4": 0.7, "q8_0": q8_0, "q4_0": q4_0}
    scores = {name: scores_of(name, value) for name, value in values.items() if value is not None}
    figures, sizes = figures_of({"base": 0.1, "bf16": 0.5, "nf4": 0.3}), {"bf16": 18, "nf4": 8, "q8_0": 10, "q4_0": 6}
    assert pub.recommend(scores, figures, sizes) == {"cpu": chosen, "cuda": "bf16"}
    measured_on_gpu = {"hardware": {"gpu_info": "H200"}, "models": figures["models"]}
    assert pub.recommend(scores, measured_on_gpu, sizes) == {"cpu": chosen, "cuda": "bf16"}


@pytest.mark.parametrize(("value", "kept"), [(0.5, True), (0.485, True), (0.48, False), (0.6, True)])
def test_quality_is_kept_at_97_percent_of_the_merged_model(value: float, kept: bool) -> None:
    assert pub.keeps_quality(scores_of("nf4", value), scores_of("bf16", 0.5)) is kept


@pytest.mark.parametrize(("wrong", "kept"), [(0, True), (1, True), (2, False)])
def test_one_row_of_few_does_not_decide_who_serves_the_model(wrong: int, kept: bool) -> None:
    assert pub.keeps_quality(scores_of("q8_0", (11 - wrong) / 16, 16), scores_of("bf16", 11 / 16, 16)) is kept


def test_the_recommendation_is_for_the_first_batch_size_that_was_measured() -> None:
    """`batch_sizes` is a setting; nothing says that 1 must be among them."""
    models = {
        "bf16": {"batch": {"4": {"tpot": {"p50": 0.5}}, "8": {"tpot": {"p50": 0.6}}}},
        "nf4": {"batch": {"4": {"tpot": {"p50": 0.3}}, "8": {"tpot": {"p50": 0.9}}}},
    }
    figures = {"hardware": {"gpu_info": None}, "models": models}
    assert pub.recommend({name: scores_of(name, 0.5) for name in models}, figures, {})["cpu"] == "nf4"


def test_the_base_model_is_named_with_its_licence(make_settings: Callable[..., Settings]) -> None:
    bundled = pub.base_info(make_settings(model="bundled"))
    assert bundled.id == "bundled"
    assert bundled.edition in ("cpu", "gpu", "test")
    assert "Apache-2.0" in bundled.licence
    assert pub.base_info(make_settings(model="somebody/model")).id == "somebody/model"
