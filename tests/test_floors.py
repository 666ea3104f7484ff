"""Imports go only down. The floors are those of docs/map.md; lazy imports count too, where not said otherwise."""

import ast
import sys
from pathlib import Path

import pytest

import maestrale

ROOT = Path(maestrale.__file__).parent
F0 = ("errors", "values", "config", "plan", "mesh", "batch", "memory", "interrupts", "threads")
FLOORS = [
    F0,
    ("text", "checkpoint", "sampling"),
    ("engine",),
    ("torch_backend", "native_backend", "parallel"),
    ("choices", "launch", "llm", "reader"),
    ("cli", "serve"),
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
FRAMEWORKS = {"torch", "jax", "mindspore", "transformers"}
MODULES = {  # "engine.pages" → its file; the package's own two files stand above all floors
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path not in (ROOT / "__init__.py", ROOT / "__main__.py")
}


def imports(module: str, only_at_top: bool = False) -> set[str]:
    """What a module imports: "engine.pages" for our own, the first word of the name for others' modules."""
    tree = ast.parse(MODULES[module].read_text())
    found = set()
    for node in tree.body if only_at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in below if name.removeprefix("maestrale.") in MODULES} or {node.module}
    return {name.removeprefix("maestrale.") if name.startswith("maestrale.") else name.split(".")[0] for name in found}


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name in MODULES}


def part(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"one_file"}))
def test_imports_go_only_down(module):
    assert [name for name in ours(imports(module)) if FLOOR[part(name)] > FLOOR[part(module)]] == []


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m != "one_file" and FLOOR[part(m)] <= 2))
def test_no_framework_below_the_backends(module):
    assert not imports(module) & FRAMEWORKS


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part(m) in ("cli", "llm", "launch", "choices")))
def test_the_command_line_starts_without_a_framework_or_a_backend(module):
    at_top = imports(module, only_at_top=True)
    assert not at_top & FRAMEWORKS
    assert "torch_backend" not in {part(name) for name in at_top}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if part(m) in ("cli", "serve") and m != "cli.bench"))
def test_the_command_line_and_the_server_reach_engines_through_llm_only(module):
    reached = {part(name) for name in ours(imports(module))}
    assert not reached & (
        {"engine"}
        if module in ("cli.train", "cli.quantize", "cli.finetune", "cli.plot")
        else {"engine", "torch_backend"}
    )


@pytest.mark.parametrize(
    "module", sorted(m for m in MODULES if part(m) in ("torch_backend", "native_backend", "parallel"))
)
def test_a_backend_knows_nothing_of_the_engine(module):
    assert "engine" not in {part(name) for name in ours(imports(module))}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("torch_backend.ops")))
def test_kernels_import_torch_only(module):
    others = {name for name in imports(module) if not name.startswith("torch_backend.ops")}
    assert others <= {"torch"} | sys.stdlib_module_names


@pytest.mark.parametrize("module", ["torch_backend.model", "torch_backend.moe", "torch_backend.cache"])
def test_the_model_knows_only_kernels_and_the_ground_floor(module):
    near = ("torch_backend.ops", "torch_backend.moe", "torch_backend.staging")
    assert {name for name in ours(imports(module)) if part(name) not in F0 and not name.startswith(near)} == set()


def test_only_launch_names_a_backend():
    rest = [m for m in MODULES if part(m) not in ("torch_backend", "launch", "cli")]
    assert [m for m in rest if any(part(name) == "torch_backend" for name in imports(m))] == []


def test_one_file_imports_nothing_of_ours():
    assert not {name for name in imports("one_file") if name in MODULES or name == "maestrale"}
