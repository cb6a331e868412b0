"""A search over real short fine-tunings; and its rules, on trainings made up so that the right answer is known."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ml_engineer_track import tune as t
from ml_engineer_track import tune_report as tr
from ml_engineer_track.checkpoint import Diverged
from ml_engineer_track.curate import CuratedData, curate
from ml_engineer_track.tune import Search, Values
from shared.errors import UserError
from shared.settings import Settings, load_settings, preset_names
from tests.ml_engineer_track.conftest import RANKER

optuna = pytest.importorskip("optuna")
MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """Steps of a few rows, so that half of the mini data are several."""
    return make_settings(finetune={"batch_tokens": 700, "batch_rows": 1}, tune={"validation_rows": 4})


@pytest.fixture
def data(settings: Settings) -> CuratedData:
    return curate(settings, RANKER)


@pytest.fixture
def search(settings: Settings, data: CuratedData) -> Search:
    """A study on a wider space than the smoke preset's; the preset's own values are rank 4, ratio 2, 2e-3."""
    wide = settings.tune.model_copy(update={"ranks": [2, 4, 8], "alpha_ratios": [1, 2], "repeats": 2})
    return t.open_study(settings.model_copy(update={"tune": wide}), data)


def made_up(loss: Callable[[Values, int], float], monkeypatch: pytest.MonkeyPatch) -> list[Values]:
    """Training that takes no time: looks at 5 and 10 at the given loss. Returns the list of what was trained."""
    asked: list[Values] = []

    def train(search: Search, values: Values, seed: int, watch: Callable[[int, float], None] | None = None) -> float:
        asked.append(values)
        for step in (5, 10):
            if watch:
                watch(step, loss(values, seed))
        return loss(values, seed)

    monkeypatch.setattr(t, "train", train)
    return asked


def bowl(values: Values, seed: int = 0) -> float:
    """Lowest at 4e-3; rank and targets matter little, and nothing else at all."""
    off = math.log10(values.learning_rate / 4e-3) ** 2
    return 1 + off + 0.01 * (values.rank == 2) + 0.01 * (values.targets == "attention")


# --- real fine-tunings -----------------------------------------------------------------------------------------------


def test_a_search_by_real_fine_tunings_ends_with_a_report_and_goes_on_from_there(
    settings: Settings, data: CuratedData, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = t.open_study(settings, data)
    t.tune(search, trials=2)
    page = tr.write(search)
    said = capsys.readouterr().out
    assert page is not None
    facts = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [trial["number"] for trial in facts["trials"]] == [0, 1]
    first = facts["trials"][0]
    assert first["values"] == vars(search.preset) == facts["preset_values"]["values"]
    assert first["looks"][-1]["step"] == search.steps == facts["budget"]["steps"] < facts["budget"]["full_steps"]
    assert len(first["looks"]) == settings.tune.looks
    assert first["loss"] == min(look["loss"] for look in first["looks"])
    assert facts["importances"] is None  # two trials say nothing
    assert facts["verdict"]["says"] in said
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not (search.folder / "trial").exists()

    again = t.open_study(settings, data)
    before = [(trial.number, trial.value) for trial in t.finished(again.study)]
    asked = made_up(lambda values, seed: 99.0, monkeypatch)
    t.tune(again, trials=2)
    assert asked == []
    t.tune(again, trials=3)
    assert len(asked) == 1
    assert [(trial.number, trial.value) for trial in t.finished(again.study)][:2] == before


def test_trials_read_a_share_of_training_rows_and_no_test_row(search: Search, data: CuratedData) -> None:
    assert sorted(path.name for path in search.data.folder.iterdir()) == ["train.jsonl", "validation.jsonl"]
    rows, all_rows = search.data.rows("train"), data.rows("train")
    assert {row.id for row in rows} <= {row.id for row in all_rows}
    assert {row.skill for row in rows} == {row.skill for row in all_rows}
    assert len(rows) < len(all_rows)
    assert t.sample(all_rows, 0.5, 7) == t.sample(all_rows, 0.5, 7)
    assert t.sample(all_rows, 1.0, 7) == all_rows


def test_a_trial_trains_with_its_values_and_leaves_nothing(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def watched(settings: Settings, data: CuratedData, watch: Any) -> Any:
        seen.append(settings)
        raise UserError("stopped here")

    monkeypatch.setattr(t, "finetune", watched)
    with pytest.raises(UserError, match="stopped here"):
        t.train(search, Values(8, 1, "attention", 3e-3), seed=9)
    [trained] = seen
    f = trained.finetune
    assert (f.rank, f.alpha, f.learning_rate, trained.seed) == (8, 8, 3e-3, 9)
    assert f.targets == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert f.checkpoint_every > search.steps
    assert trained.work.is_relative_to(search.folder)
    assert not trained.work.exists()


# --- the rules of the search -----------------------------------------------------------------------------------------


def test_the_best_values_are_found_and_what_matters_is_named(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(bowl, monkeypatch)
    t.tune(search, trials=25)
    found = t.best(search.study)
    assert found is not None
    assert 2.5e-3 < found.learning_rate < 6.5e-3
    shares = tr.importances(search)
    assert shares is not None
    assert next(iter(shares)) == "learning_rate"
    assert set(shares) == {"rank", "alpha_ratio", "targets", "learning_rate"}
    assert sum(shares.values()) == pytest.approx(1)


def test_bad_trials_are_ended_early_but_never_the_presets(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[int] = []

    def worse_and_worse(values: Values, seed: int) -> float:
        late.append(1)
        return float(len(late))

    made_up(worse_and_worse, monkeypatch)
    t.tune(search, trials=8)
    states = [trial.state.name for trial in t.finished(search.study)]
    assert states[: t.STARTUP] == ["COMPLETE"] * t.STARTUP
    assert "PRUNED" in states
    changed = replace(search, preset=t.values_of(t.finished(search.study)[-1].params))
    t.tune(changed, trials=9)
    last = t.finished(search.study)[-1]
    assert t.values_of(last.params).close_to(changed.preset)
    assert last.state.name == "COMPLETE"  # the worst of all, and what the others are compared with


def test_ctrl_c_keeps_what_is_finished_and_the_study_goes_on(
    search: Search, data: CuratedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def stopped(values: Values, seed: int) -> float:
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return bowl(values)

    made_up(stopped, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        t.tune(search, trials=6)
    assert len(t.finished(search.study)) == 2
    assert tr.write(search) is not None
    made_up(bowl, monkeypatch)
    again = t.open_study(search.settings, data)
    t.tune(again, trials=6)
    assert len(t.finished(again.study)) == 6


def test_a_run_that_was_killed_leaves_no_trial_running(search: Search, data: CuratedData) -> None:
    search.study.ask()
    again = t.open_study(search.settings, data)
    assert [trial.state.name for trial in again.study.trials] == ["FAIL"]


def test_a_diverged_trial_is_not_the_end(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverges(values: Values, seed: int) -> float:
        if values.close_to(search.preset):
            return 1.0
        raise Diverged("training diverged (validation loss nan)", "step 5", "Lower finetune.learning_rate")

    made_up(diverges, monkeypatch)
    t.tune(search, trials=3)
    assert [trial.state.name for trial in t.finished(search.study)] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert "what 3 trials found" in tr.verdict(search, search.preset)["says"]
    assert tr.write(search) is not None

    def full(values: Values, seed: int) -> float:
        raise UserError("not enough memory for one row", "a row", "Use METHOD=qlora")

    made_up(full, monkeypatch)
    with pytest.raises(UserError, match="not enough memory"):
        t.tune(search, trials=4)


def test_other_data_or_another_space_is_another_study_and_other_preset_values_are_not(search: Search, data: CuratedData) -> None:
    s = search.settings
    name = search.study.study_name
    moved = s.model_copy(update={"finetune": s.finetune.model_copy(update={"rank": 8, "alpha": 16, "learning_rate": 3e-3})})
    assert t.open_study(moved, data).study.study_name == name
    narrower = s.model_copy(update={"tune": s.tune.model_copy(update={"ranks": [4, 8]})})
    assert t.open_study(narrower, data).study.study_name != name
    longer = s.model_copy(update={"finetune": s.finetune.model_copy(update={"epochs": 2.0})})
    assert t.open_study(longer, data).study.study_name != name
    assert t.open_study(s, replace(data, version="d-other")).study.study_name != name


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "says", "best"),
    [
        (0.2, "the preset's values are not what", False),  # lower with every seed
        (0.02, "the preset's values are as good as", True),  # seeds differ by more
        (-0.2, "the preset's values are what", True),
    ],
)
def test_whether_the_preset_holds_is_judged_on_other_seeds(
    gain: float, says: str, best: bool, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(values: Values, seed: int) -> float:
        luck = 0.05 if seed % 2 else -0.05
        if values.close_to(search.preset):
            return 1 + (luck if seed != search.settings.seed else 0)
        return 1 - gain + 0.001 * abs(math.log10(values.learning_rate)) + (-luck if seed != search.settings.seed else 0)

    made_up(loss, monkeypatch)
    t.tune(search, trials=5)
    found = t.best(search.study)
    assert found is not None
    verdict = tr.verdict(search, found)
    assert verdict["says"].startswith(says)
    assert verdict["preset_is_best"] is best
    if gain > 0:
        assert len(t.repeats(search, found)) == len(t.repeats(search, search.preset)) == 2


def test_before_any_trial_is_finished_there_is_no_report(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    assert tr.write(search) is None
    assert "no trial is finished yet" in capsys.readouterr().out


# --- the search space ------------------------------------------------------------------------------------------------


def test_target_groups_come_from_the_models_own_modules(micro_path: str) -> None:
    assert t.target_groups(micro_path) == {
        "all-linear": "all-linear",
        "attention": ["k_proj", "o_proj", "q_proj", "v_proj"],
        "feed-forward": ["down_proj", "gate_proj", "up_proj"],
    }


@pytest.mark.parametrize("name", preset_names())
def test_the_values_of_every_preset_lie_within_its_search_space(name: str) -> None:
    settings = load_settings(name)
    values = t.preset_values(settings, {"all-linear": "all-linear"})
    assert round(values.alpha_ratio * values.rank) == settings.finetune.alpha
    assert values.close_to(t.values_of(t.params_of(values)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rank": 5, "alpha": 10}, r"finetune.rank 5 is not among tune.ranks \[2, 4\]"),
        ({"alpha": 12}, "finetune.alpha / rank = 3 is not among tune.alpha_ratios"),
        ({"learning_rate": 0.5}, "finetune.learning_rate 0.5 lies outside tune.learning_rates"),
        ({"targets": ["q_proj"]}, r"finetune.targets \['q_proj'\] is none of all-linear"),
    ],
)
def test_a_preset_outside_its_space_is_one_line(changed: dict[str, Any], told: str) -> None:
    settings = load_settings("smoke")
    settings = settings.model_copy(update={"finetune": settings.finetune.model_copy(update=changed)})
    with pytest.raises(UserError, match=told):
        t.preset_values(settings, {"all-linear": "all-linear"})


def test_without_optuna_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"optuna is not installed\. Run `pip install .*\[tune\]"):
        t.need_optuna()
