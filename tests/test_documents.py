"""The documents: code parses, named files, targets and subcommands exist, nothing points to one machine."""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("train/**/*.md"), *ROOT.glob("examples/**/*.md")]
)
SUBCOMMANDS = {path.stem for path in (ROOT / "lego_pipeline" / "cli").glob("*.py")}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)


@every_document
def test_python_code_parses(document: Path) -> None:
    for block in blocks(document, "python"):
        ast.parse(block)


@every_document
def test_commands_exist(document: Path) -> None:
    for line in "\n".join(blocks(document, "(?:bash|sh)")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= TARGETS, line
        elif words[:1] == ["lego"]:
            assert words[1].replace("-", "_") in SUBCOMMANDS, line
        elif words[:1] == ["python"]:
            script = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            assert (ROOT / script).is_file(), line
        elif words[:2] == ["accelerate", "launch"]:
            script = next(word for word in words if word.endswith(".py"))
            assert (ROOT / script).is_file(), line


@every_document
def test_links_to_files_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|src=\"([^\":]+)\"", text):
        path = "".join(target)
        assert (document.parent / path).exists(), path


@every_document
def test_nothing_points_to_one_machine(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp|Users)/", text)
    assert "TODO" not in text
