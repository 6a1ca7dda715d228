"""Version, changelog and metadata agree. Imports nothing of the package, so that `make check` can run it at once."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def package_version() -> str:
    source = (ROOT / "lego_pipeline" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def test_the_newest_numbered_entry_of_the_changelog_is_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == package_version()


def test_no_requirement_is_pinned_and_every_one_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+", line) for line in lines), lines


def test_constraints_hold_versions_and_no_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9A-Za-z.]+", line) for line in lines)


def test_the_tested_versions_satisfy_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    tested = {name.lower().replace("_", "-"): version for name, version in tested.items()}

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    for line in lines:
        name, _, lowest = line.partition(">=")
        found = tested.get(name.lower().replace("_", "-"))
        assert found is None or numbers(found) >= numbers(lowest), f"{line}, but constraints.txt has {found}"
