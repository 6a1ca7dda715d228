"""Imports only go down: a module may import modules of a lower level, or of its own unit. Read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lego_pipeline"
HOSTS = ("train", "examples")  # import lego_pipeline, never one another
OUTSIDE = (*HOSTS, "benchmarks", "tests")  # measure and test all of them; imported by none

LEVELS = (
    ("atomic", "cli.records", "config"),
    ("attention", "checkpoints", "conditioning", "contact_sheet", "generated", "guidance", "images",
     "loading", "lora", "parity", "projector", "scene", "scheduler", "training", "vlm.base"),
    ("vlm", "checks", "fast", "convert.checkpoint"),
    ("data",),
    ("enhance",),
    ("pipeline_lego",),
    ("curation", "diffusion_step", "evaluation", "export", "stable_diffusion", "storyboard"),
    ("app", "baselines", "convert", "distillation", "start", "study", "validation"),
    ("memory",),
    ("cli",),
)  # fmt: skip
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# Only the function that needs one of these may import it: the core runs without.
OPTIONAL = {"ai_edge_litert", "av", "bitsandbytes", "cleanfid", "embreex", "gradio", "jinja2", "lpips", "matplotlib",
            "openai", "peft", "scipy", "tensorboard", "timm", "torchmetrics", "torchvision", "trimesh",
            "xformers"}  # fmt: skip
HEAVY = {"PIL", "accelerate", "datasets", "diffusers", "numpy", "safetensors", "torch", "tqdm", "transformers"}


def sources(folder: Path) -> list[Path]:
    """Python files below a folder, saved pipelines' loaders (copies of lego.py) left out."""
    return sorted(path for path in folder.rglob("*.py") if not (path.parent / "model_index.json").exists())


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, at_import: bool) -> Iterator[str]:
    """Dotted names that a file imports; with `at_import` only those that are executed with the module itself."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).parts[: -node.level]) if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


def unit_of(module: str) -> str | None:
    """The unit of a dotted name in the package; the three public names come from the pipeline."""
    parts = module.split(".")
    if parts[0] != "lego_pipeline" or parts[1:] in ([], ["__version__"]):
        return None
    if parts[1] in ("LegoPipeline", "LegoPipelineOutput"):
        return "pipeline_lego"
    inner = ".".join(parts[1:3])
    return inner if inner in LEVEL_OF else parts[1]


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_a_module_imports_only_what_is_below_it(path: Path) -> None:
    unit = unit_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if unit in ("__init__", "lego"):  # the public names, and the loader that is copied into saved folders
        assert {unit_of(name) for name in imports(path, at_import=False)} <= {None, "pipeline_lego"}
        return
    assert unit in LEVEL_OF, f"give {unit} a level in LEVELS of {Path(__file__).name}"
    for name in imports(path, at_import=False):
        other = unit_of(name)
        if other is None or other == unit:
            continue
        assert other in LEVEL_OF, f"{path.name} imports {name}, which is no unit of the package"
        assert LEVEL_OF[other] < LEVEL_OF[unit], f"{path.name} (level {LEVEL_OF[unit]}) imports {name}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_the_package_imports_nothing_from_outside_it(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, at_import=False)}
    assert not roots & set(OUTSIDE)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=name_of)
def test_optional_packages_are_imported_inside_functions(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path, at_import=True)}
    assert not roots & OPTIONAL


@pytest.mark.parametrize("path", sources(PACKAGE / "cli"), ids=name_of)
def test_the_command_line_imports_nothing_heavy_before_it_runs(path: Path) -> None:
    for name in imports(path, at_import=True):
        assert name.split(".")[0] not in HEAVY | OPTIONAL
        assert unit_of(name) in (None, "cli", "cli.records", "checkpoints", "generated")


@pytest.mark.parametrize("folder", HOSTS)
def test_folders_outside_the_package_do_not_import_one_another(folder: str) -> None:
    for path in sources(ROOT / folder):
        roots = {name.split(".")[0] for name in imports(path, at_import=False)}
        assert not roots & (set(OUTSIDE) - {folder}), f"{name_of(path)} imports another folder"
