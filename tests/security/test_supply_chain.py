"""What the product is made of: every package pinned, hashed and under a licence it may be given on with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from shared import audit
from shared.audit import core_packages, licence_of, licence_problem, looked_up, pins
from shared.errors import UserError
from shared.settings import ROOT

LOCK = ROOT / "requirements.lock"


def test_every_package_of_the_core_is_pinned() -> None:
    core = core_packages()
    assert len(core) > 80
    assert {"torch", "fastapi", "chromadb"} <= core
    missing = {name for name in core - set(pins()) if not name.startswith("nvidia-") and name not in ("setuptools", "triton")}
    assert not missing, f"add to constraints.txt: {', '.join(sorted(missing))}"


def test_every_package_of_the_core_has_a_licence_to_give_it_on() -> None:
    assert [f"{name}: {problem}" for name in sorted(core_packages()) if (problem := licence_problem(licence_of(name)))] == []


@pytest.mark.parametrize(
    ("licence", "fine"),
    [
        ("MIT", True), ("Apache Software License; MIT License", True), ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("GPL-3.0-or-later OR MIT", True), ("GPL-3.0-or-later", False), ("AGPL-3.0", False), ("", False), ("UNKNOWN", False),
        ("GNU Lesser General Public License v3", False), ("CC-BY-NC-4.0", False), ("BUSL-1.1", False),
    ],
)  # fmt: skip
def test_licences_are_told_apart(licence: str, fine: bool) -> None:
    assert (licence_problem(licence) is None) == fine


def test_the_lock_names_every_pinned_package_of_the_core_with_hashes() -> None:
    text = LOCK.read_text(encoding="utf-8")
    blocks = re.findall(
        r"^([A-Za-z0-9._-]+)==(\S+)((?:.*\\\n)(?:\s+--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, flags=re.MULTILINE
    )
    locked = {canonicalize_name(name): version for name, version, _ in blocks}
    pinned = pins()
    assert not {
        name for name in core_packages() - {"torch", "setuptools", "triton"} - set(locked) if not name.startswith("nvidia-")
    }
    assert not {name: version for name, version in locked.items() if pinned.get(name, version) != version}
    assert "torch" not in locked  # which build of it depends on the machine


def test_no_package_is_fetched_from_anywhere_but_an_index() -> None:
    for file in ("pyproject.toml", "constraints.txt", "torch.txt", "requirements.lock"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(r"git\+|@ (https?|file):|--index-url|--extra-index|--trusted-host|--find-links", text), file


def test_without_the_tools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(audit.metadata, "version", gone)
    with pytest.raises(UserError, match=r"pip install -c torch.txt -c constraints.txt -e '.\[audit\]'"):
        audit.run(tmp_path)


def test_a_tool_that_cannot_reach_its_service_is_one_line(tmp_path: Path) -> None:
    said = audit._tool("known weaknesses", ["-c", "import sys; sys.exit('no route to host')"], tmp_path / "audit.json")
    assert said == "known weaknesses: not known, the tool could not find out (no route to host)"


@pytest.mark.slow
def test_packages_that_could_not_be_looked_up_are_counted(tmp_path: Path) -> None:
    result = tmp_path / "audit.json"
    assert looked_up(result) == ""
    packages = [{"name": "a", "vulns": []}, {"name": "b", "vulns": [{"id": "X-1"}]}, {"name": "c", "skip_reason": "not found"}]
    result.write_text(json.dumps({"dependencies": packages}), encoding="utf-8")
    assert looked_up(result) == "; 2 of 3 packages could be looked up, 1 with known weaknesses: b"


def test_the_audit_writes_its_reports(tmp_path: Path) -> None:
    pytest.importorskip("pip_audit")
    said = audit.run(tmp_path)
    assert len(said) == 4
    assert all("\n" not in line for line in said)
    assert {row["Name"].lower() for row in json.loads((tmp_path / "licences.json").read_text())} >= {"fastapi", "torch"}
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert len(bill["components"]) > 80


# --- the code itself -------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if not name.startswith("tests/")]


def test_nothing_that_runs_what_it_reads() -> None:
    """No pickles, no shell, no code from a model's folder, no YAML that makes objects."""
    never = re.compile(
        r"\bpickle\b(?!d|s)|shell=True|os\.system\(|trust_remote_code=True|allow_pickle=True|weights_only=False|\byaml\.(unsafe|full)_load"
        r"|yaml\.load\((?!.*Loader=_FrontMatter)|\beval\(|(?<!\.)\bexec\("
    )
    found = []
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if never.search(line.split("#")[0]) and not re.search(r"never pickle|no pickle|\.eval\(", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


def test_weights_are_only_read_from_safetensors() -> None:
    text = (ROOT / "ml_engineer_track" / "models.py").read_text(encoding="utf-8")
    assert '"use_safetensors": True' in text
    assert sys.version_info >= (3, 11)
