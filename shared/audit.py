"""What this project is made of: licences, a bill of materials, known weaknesses. The work is done by maintained tools.

    python -m shared.audit        (make audit)

    artifacts/reports/licences.json    every installed package with its licence (pip-licenses)
    artifacts/reports/sbom.json        bill of materials in CycloneDX (cyclonedx-bom)
    artifacts/reports/audit.json       packages with known weaknesses (pip-audit; it asks an advisory service over the network)

The packages of the core are the ones pyproject.toml names and all that those need; what only tests and checks need may carry
licences the product could not. Every one of them is pinned in constraints.txt (torch in torch.txt), with hashes in
requirements.lock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared.errors import UserError
from shared.settings import ROOT

REPORTS = ROOT / "artifacts" / "reports"
INSTALL = "pip install -c torch.txt -c constraints.txt -e '.[audit]'"
#: Words of licences under which the product may be given on: with conditions on the work itself, not on what uses it.
PERMITTED = (
    "MIT",
    "BSD",
    "0BSD",
    "APACHE",
    "PYTHON SOFTWARE FOUNDATION",
    "PSF",
    "ISC",
    "MPL",
    "MOZILLA",
    "ZLIB",
    "UNLICENSE",
    "CNRI",
)
FORBIDDEN = ("AGPL", "GPL", "AFFERO", "GNU", "SSPL", "BUSL", "PROPRIETARY", "NON-COMMERCIAL", "NONCOMMERCIAL", "-NC")
SECONDS = 180.0


def core_packages() -> set[str]:
    """Canonical names of what the product needs to run, as far as it is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return _closure(project["dependencies"])


def _closure(requirements: Iterable[str]) -> set[str]:
    """The distributions that `requirements` name and all that those need on this machine, extras included."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for wanted in ("", *requirement.extras):
            if (key := f"{name}[{wanted}]") not in found:
                found.add(key)
                waiting += [(Requirement(text), wanted) for text in needs]
    return {key.partition("[")[0] for key in found}


def licence_of(name: str) -> str:
    """What a package says its licence is: the SPDX expression, else its classifiers, else the first line of the field."""
    about = metadata.metadata(name).json
    if expression := about.get("license_expression"):
        return str(expression)
    classified = [c.split(" :: ")[-1] for c in about.get("classifier", []) if c.startswith("License :: ")]
    named = [text for text in classified if text not in ("OSI Approved", "DFSG approved")]
    return "; ".join(named) or str(about.get("license", "")).strip().split("\n")[0]


def licence_problem(licence: str) -> str | None:
    """Why a package of the core may not carry this licence; None when it may. Of alternatives (OR) one must be permitted."""
    if not licence or licence.upper() == "UNKNOWN":
        return "no licence is named"
    choices = [part.upper() for part in licence.replace("(", "").replace(")", "").split(" OR ")]
    if any(not any(word in part for word in FORBIDDEN) and any(word in part for word in PERMITTED) for part in choices):
        return None
    return f"licence {licence!r} is not among the permitted ones"


def pins() -> dict[str, str]:
    """Canonical name -> version, from constraints.txt and torch.txt."""
    found: dict[str, str] = {}
    for file in ("constraints.txt", "torch.txt"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                name, _, version = line.partition("==")
                found[canonicalize_name(name.strip())] = version.strip()
    return found


def run(reports: Path = REPORTS) -> list[str]:
    """Run the three tools; one line for each about what came of it. UserError when the tools are not installed."""
    for module, package in (("piplicenses", "pip-licenses"), ("cyclonedx_py", "cyclonedx-bom"), ("pip_audit", "pip-audit")):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(f"{package} ({module}) is not installed", "this environment", INSTALL) from None
    reports.mkdir(parents=True, exist_ok=True)
    licences = ["-m", "piplicenses", "--format=json", "--with-urls", "--output-file", str(reports / "licences.json")]
    bill = ["-m", "cyclonedx_py", "environment", "--of", "JSON", "-o", str(reports / "sbom.json")]
    known = ["-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "-f", "json", "-o", str(reports / "audit.json")]
    said = [_tool("licences", licences, reports / "licences.json"), _tool("bill of materials", bill, reports / "sbom.json")]
    core = {name: licence_of(name) for name in sorted(core_packages())}
    wrong = [f"{name}: {problem}" for name, licence in core.items() if (problem := licence_problem(licence))]
    said.append(
        f"core licences: {len(core)} packages, " + (f"{len(wrong)} to look at: {'; '.join(wrong)}" if wrong else "all permitted")
    )
    said.append(_tool("known weaknesses", known, reports / "audit.json") + looked_up(reports / "audit.json"))
    return said


def looked_up(result: Path) -> str:
    """How many packages the advisory service knew: pip-audit passes in silence over those it could not ask about."""
    if not result.exists():
        return ""
    packages = json.loads(result.read_text(encoding="utf-8"))["dependencies"]
    weak = [package["name"] for package in packages if package.get("vulns")]
    asked = sum("skip_reason" not in package for package in packages)
    return f"; {asked} of {len(packages)} packages could be looked up, {len(weak)} with known weaknesses" + (
        f": {', '.join(weak)}" if weak else ""
    )


def _tool(what: str, arguments: Sequence[str], result: Path) -> str:
    """Run a tool; its result or, in one line, why there is none. Exit status 1 with a result means that it found something."""
    result.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"{what}: not known, the tool gave no answer within {SECONDS:.0f} s"
    if not result.exists():
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return f"{what}: not known, the tool could not find out ({(lines or ['it said nothing'])[-1].strip()[:160]})"
    return f"{what}: {result}" + (" (something was found)" if done.returncode else "")


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m shared.audit", description=(__doc__ or "").split("\n")[0]).parse_args(argv)
    try:
        print("\n".join(run()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
