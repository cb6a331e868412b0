"""The pages keep their promises: every command they show runs, every path and link leads somewhere, every preset loads.

WORKSHOP.md is followed as a whole, in order: tests/benchmarks/test_workshop.py.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
import typer

from shared.settings import load_settings, preset_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "ml_engineer_track" / "README.md",
    ROOT / "ai_engineer_track" / "README.md",
    ROOT / "datasets" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "monitoring" / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "benchmarks" / "README.md",  # after the pages that measure something: `make report` shows what they left
]
#: pages whose links and file names must lead somewhere
LINKED = [*PAGES, ROOT / "WORKSHOP.md", ROOT / "benchmarks" / "results" / "README.md"]
#: pages that name files by way of explanation; the READMEs of the tracks do so, too
NAMED = [ROOT / "README.md", ROOT / "WORKSHOP.md", *sorted((ROOT / "docs").glob("*.md"))]
#: files that only a run makes
MADE = ("quarantine.jsonl", "manifest.json", "workshop.json", "low_bits.json", "distill.json", "tune.json", "loop.json")
#: commands that would start this very test run again, rewrite a file under version control, or run until they are stopped;
#: that measure for minutes (tests/benchmarks runs each suite on something small), fetch other projects, or name a reader's files
NOT_RUN = (
    *("make test", "pytest ", "python -m shared.datasheet", "make serve", "engineer_track serve", "make demo"),
    *("BUDGET=5m", "SUITE=engines", "benchmarks replicas", "make bench-peers", "make compare", "--url"),
)
#: the commands of the AI track need what `make ml` published, or load the embedding model
SLOW = (
    "make ml",
    "make ai",
    "make distill",
    "make quantize",
    "make tune",
    "make accounting",
    "make loop",
    "ml_engineer_track models",
    "make bench",
    "make report",
    "benchmarks limits",
    "ml_engineer_track run",
    "ml_engineer_track evaluate",
    "ml_engineer_track benchmark",
    "ml_engineer_track drift-study",
    "handoff verify",
    *(f"ai_engineer_track {name}" for name in ("run", "ingest", "search", "measure", "calibrate")),
)


def shown_commands() -> list[str]:
    found: list[str] = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            found += [line.split("#")[0].strip() for line in block.splitlines() if line.split("#")[0].strip()]
    return list(dict.fromkeys(found))


def run(command: str, artifacts: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PRESET": "smoke", "ARTIFACTS": str(artifacts), "PYTHON": sys.executable}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # `make` would set up .venv first; these tests already run in an environment that has everything.
    command = re.sub(r"\bmake (?=[a-z])", f"make -o setup VENV={Path(sys.executable).parent.parent} ", command)
    return subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def test_the_readme_shows_commands() -> None:
    assert len(shown_commands()) >= 8


@pytest.mark.parametrize("command", [c for c in shown_commands() if not any(word in c for word in (*NOT_RUN, *SLOW))])
def test_a_quick_command_of_the_readme_runs(command: str, artifacts: Path) -> None:
    done = run(command, artifacts)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_commands_of_the_readme_run_one_after_the_other(artifacts: Path) -> None:
    order = [c for c in shown_commands() if any(word in c for word in SLOW)]
    # Models are published by `make ml` and read by the others, so it goes first; the model of another preset is not fetched.
    for command in sorted(order, key=lambda c: not c.startswith(("make ml", "DATASETS"))):
        done = run(command.replace("handoff verify", f"handoff verify --models {artifacts / 'models'}"), artifacts)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr


# --- every command that any page names -------------------------------------------------------------------------------

OURS = re.compile(
    r"python -m (shared\.\w+|benchmarks\.workshop|benchmarks|ml_engineer_track|ai_engineer_track)\b(?!\.)([^\n#|>&;(]*)"
)


def tracked_pages() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed]


def code_of(page: Path) -> Iterator[str]:
    """What stands in a page as code: the lines of its blocks, and what is in backticks (where a line may break)."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    for inline in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield " ".join(inline.split())


@cache
def options(module: str) -> dict[str, set[str]]:
    """Subcommand -> its options; a module without subcommands has one that is called "". Reads the program's own definitions."""
    main = importlib.import_module(module if module.startswith("shared.") else f"{module}.__main__")
    if hasattr(main, "app"):
        group = typer.main.get_command(main.app)
        return {name: {o for p in one.params for o in p.opts} for name, one in group.commands.items()}  # type: ignore[attr-defined]
    if "ArgumentParser" not in Path(str(main.__file__)).read_text(encoding="utf-8"):
        return {"": set()}
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        main.main(["--help"])
    parts = re.search(r"\{([a-z,-]+)\}", said.getvalue())
    for name in parts[1].split(",") if parts else []:
        with redirect_stdout(said), suppress(SystemExit):
            main.main([name, "--help"])
    return {"": set(re.findall(r"--[a-z][a-z-]*", said.getvalue()))}


def unknown_words(module: str, words: list[str]) -> list[str]:
    """What of `python -m MODULE WORDS` does not exist."""
    known = options(module)
    name = "" if "" in known else next((word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)), "")
    if not name and "" not in known:
        return []  # the program as such: `python -m benchmarks`
    if name not in known:
        return [name]
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    return sorted(used - known[name] - {"--help"})


@pytest.mark.parametrize("page", tracked_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_a_page_names_exists(page: Path) -> None:
    """Nothing is run: targets are looked up in the Makefile, subcommands and options in the programs' own definitions."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for code in code_of(page):
        for target in re.findall(r"(?:^|[(,;:&$] ?|=\S+ )make (?:-\w+ )*([a-z][a-z-]*)", code):
            assert target in targets, code
        for module, rest in OURS.findall(code):
            assert not unknown_words(module, rest.strip().rstrip(")").split()), code


def test_a_command_that_is_not_there_is_noticed() -> None:
    assert unknown_words("benchmarks", ["dance"]) == ["dance"]
    assert unknown_words("benchmarks", ["soak", "--minutes", "1", "--people", "3"]) == ["--people"]
    assert unknown_words("shared.handoff", ["verify", "--modles", "x"]) == ["--modles"]
    assert options("shared.handoff")[""]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{target}#{anchor}"


@pytest.mark.parametrize("page", NAMED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_a_page_names_exists(page: Path) -> None:
    """`serving/openvino_engine.py` from the root or the page, a bare `triage.py` anywhere in the tree."""
    names = {path.name for path in ROOT.rglob("*.*") if "artifacts" not in path.parts and ".venv" not in path.parts}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`([\w./-]+\.(?:py|md|yaml|jsonl?|toml|txt))`", text):
        made = name.startswith("artifacts/") or Path(name).name in MADE or re.fullmatch(r"ex\d.*|.*swapped.yaml|ml.yaml", name)
        found = (ROOT / name).exists() or (page.parent / name).exists() if "/" in name else name in names
        assert made or found, name


def test_every_file_in_the_readmes_tree_exists() -> None:
    tree = re.search(r"```text\n(ml_engineer_track/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert tree
    folder = ROOT
    for line in tree[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name
        path = folder if not line.startswith(" ") else folder / name
        assert path.exists() or name == "artifacts/", path


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_says_what_it_is_for(name: str) -> None:
    assert load_settings(name).preset == name
    first = (ROOT / "ml_engineer_track" / "presets" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 30


ML, AI = "python -m ml_engineer_track run", "python -m ai_engineer_track run"


@pytest.mark.parametrize(
    ("target", "given", "expected"),
    [
        ("ai", [], [ML, AI]),
        ("ai", ["LLM_BASE_URL=http://127.0.0.1:9/v1"], [ML, AI]),
        ("demo", [], [ML, ML, AI]),
        ("serve", [], [ML, "python -m ai_engineer_track serve"]),
        ("serve", ["REPLICAS=3"], [ML, "python -m ai_engineer_track serve-ray"]),
    ],
)
def test_a_target_of_the_product_makes_the_model_first(target: str, given: list[str], expected: list[str]) -> None:
    """What would be run, in order; that `ML` is skipped where a model exists is the next test."""
    done = subprocess.run(["make", "-n", target, *given], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"python -m \w+_engineer_track [\w-]+", done.stdout) == expected


@pytest.mark.parametrize("target", ["ai", "serve"])
@pytest.mark.parametrize(
    ("published", "address", "makes_one"), [(False, "", True), (True, "", False), (False, "http://127.0.0.1:9/v1", False)]
)
def test_a_model_is_only_made_where_there_is_none(
    target: str, published: bool, address: str, makes_one: bool, tmp_path: Path
) -> None:
    """With a stand-in for Python that writes down what it was asked to run."""
    fake = tmp_path / "env" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n', encoding="utf-8")
    fake.chmod(0o755)
    artifacts = tmp_path / "artifacts"
    if published:
        (artifacts / "models").mkdir(parents=True)
        (artifacts / "models" / "current").write_text("m-1\n", encoding="utf-8")
    command = ["make", target, "-o", "setup", f"VENV={tmp_path / 'env'}", f"ARTIFACTS={artifacts}", f"LLM_BASE_URL={address}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    asked = (tmp_path / "asked").read_text(encoding="utf-8").split("\n")[:-1]
    last = f"-m ai_engineer_track {'run' if target == 'ai' else 'serve'}"
    assert asked == (["-m ml_engineer_track run", last] if makes_one else [last])


@pytest.mark.parametrize(
    ("target", "given", "with_ray"),
    [
        ("ml", [], False),
        ("ml", ["ENGINE=torchrun"], False),
        ("ml", ["ENGINE=ray"], True),
        ("serve", [], False),
        ("serve", ["REPLICAS=2"], True),
        ("replicas", [], True),
        ("scaling", [], False),
        ("curate-corpus", ["SHARDS=a", "INTO=b"], True),
    ],
)
def test_a_target_that_needs_ray_installs_it_first(target: str, given: list[str], with_ray: bool) -> None:
    command_line = ["make", "--no-print-directory", "-n", "-o", "setup", target, *given]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("-c torch.txt -c constraints.txt -e '.[ray]'" in done.stdout) == with_ray
    if with_ray:
        assert done.stdout.index("[ray]") < done.stdout.rindex("python -m")


@pytest.mark.parametrize(
    ("target", "given", "command"),
    [
        ("replicas", ["REPLICAS=3"], 'benchmarks replicas --replicas "3"'),
        ("scaling", ["WORKERS=4"], 'benchmarks scaling --workers "4"'),
        ("drift-study", [], "ml_engineer_track drift-study"),
        ("curate-corpus", ["SHARDS=a", "INTO=b"], 'ml_engineer_track curate-corpus "a" --into "b"'),
    ],
)
def test_a_target_passes_on_what_it_was_given(target: str, given: list[str], command: str) -> None:
    command_line = ["make", "--no-print-directory", "-n", "-o", "setup", target, *given]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith(f"python -m {command}")


def test_a_corpus_without_a_folder_to_clean_it_into_is_one_line() -> None:
    done = subprocess.run(["make", "-o", "setup", "curate-corpus", "SHARDS=a"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: SHARDS=<folder of *.jsonl> and INTO=<folder> are needed\n")


def test_every_target_is_phony_and_stands_apart() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert phony
    assert sorted(phony[1].split()) == sorted(re.findall(r"^([a-z][a-z-]*):", text, flags=re.MULTILINE))
    assert not re.search(r"^[^\n#][^\n]*\n[a-z][a-z-]*:", text, flags=re.MULTILINE)


def test_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert targets
    for target in targets[1].split():
        assert re.search(rf"^{target} ", done.stdout, flags=re.MULTILINE), target
