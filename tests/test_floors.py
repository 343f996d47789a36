"""Imports run downward only: a file imports from floors below its own."""

import ast
from pathlib import Path

import maml_fast

ROOT = Path(maml_fast.__file__).parent
FLOORS = [
    {"kernels"},
    {"errors", "memory", "openmp", "cost", "custom_op", "inner", "recorder", "live_memory"},
    {"outer", "cpu_features", "cpu_cost", "triton_features", "triton_cost", "profiled"},
    {"ops", "losses", "signature"},
    {"fast_weights", "problem", "refusals", "norm_calls"},
    {"trace"},
    {"rates", "layers", "rows", "options"},
    {"cpu_plan", "triton_plan"},
    {"plan"},
    {"surroundings"},
    {"backends", "inputs"},
    {"meta_step"},
    {"finite", "verify"},
    {"planner", "results", "autograd"},
    {"trajectory", "settings"},
    {"maml"},
    {"check", "presets", "features", "profile"},
    {"models", "tasks"},
    {"config", "checkpoint", "measure", "captured"},
    {"ranks"},
    {"config_sinusoid", "config_images", "progress", "run", "run_files", "starts"},
    {"event_files", "image_data", "evaluate", "evaluate_images"},
    {"run_sinusoid", "run_images"},
    {"kinds"},
    {"report", "train"},
    {"plots", "plots_run"},
    {"plots_images", "run_report", "cli_options"},
    {"cli_evaluate", "cli_report", "cli_profile"},
    {"cli"},
    {"__main__"},
]
WITHIN = {"ops", "fast_weights", "backends", "tasks"}  # a folder's own files may import each other


def floor_of(module: str) -> int:
    parts = module.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        for i, floor in enumerate(FLOORS):
            if name in floor:
                return i
    raise AssertionError(f"{module} is on no floor: add it to the list")


def imports(path: Path) -> set[str]:
    """Modules of maml_fast that a file imports, without the package's name; "maml" for what it
    imports of the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {
                n for n in names if (ROOT / Path(*n.split(".")[1:])).with_suffix(".py").exists()
            }
            if node.module == "maml_fast":
                found |= files | ({"maml_fast.maml"} if names - files else set())
            else:
                found |= files or {node.module}
    if "maml_fast" in found:
        found.add("maml_fast.maml")
    return {m.removeprefix("maml_fast.") for m in found if m.startswith("maml_fast.")}


def test_imports_run_downward():
    seen = 0
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module in ("__init__",) or module.startswith("kernels"):
            continue
        module = module.removesuffix(".__init__")
        for imported in imports(path):
            seen += 1
            same = (
                imported.split(".")[0] in WITHIN and imported.split(".")[0] == module.split(".")[0]
            )
            assert same or floor_of(imported) < floor_of(module), f"{module} imports {imported}"
    assert seen > 30


def test_kernels_import_nothing_from_above():
    files = list(ROOT.joinpath("kernels").rglob("*.py")) or list(
        ROOT.parent.joinpath("kernels").rglob("*.py")
    )
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or not node.module.startswith("maml_fast"), file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("maml_fast") for alias in node.names), file


def test_the_package_needs_no_extras():
    """`import maml_fast` works without what the command line needs."""
    allowed = {"torch", "numpy", "triton", "maml_fast"}
    last = floor_of("check")  # of what `maml_fast/__init__.py` imports
    for floor in FLOORS[1 : last + 1]:
        for name in floor:
            path = ROOT.joinpath(*name.split("."))
            for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
                for node in ast.walk(ast.parse(file.read_text())):
                    names = []
                    if isinstance(node, ast.Import):
                        names = [alias.name for alias in node.names]
                    if isinstance(node, ast.ImportFrom):
                        names = [node.module]
                    for imported in names:
                        top = imported.split(".")[0]
                        assert top in allowed or top in __import__("sys").stdlib_module_names, file
