"The house as a whole: what importing costs, who imports whom, and that every public name is explained."
import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import crossmodal

HOUSE = Path(crossmodal.__file__).parent
ROOMS = ("data", "models", "losses", "metrics", "training", "systems", "workbook", "cli")
HEAVY = ("IPython", "accelerate", "ipywidgets", "librosa", "matplotlib", "numba", "pandas", "pydantic", "scipy", "sklearn",
         "soundfile", "tensorboard", "tyro", "umap")


def name_of(path):
    "crossmodal/data/text.py -> crossmodal.data.text"
    parts = path.relative_to(HOUSE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(HOUSE.rglob("*.py")) if path.name != "_modidx.py"}
IS_PACKAGE = {name_of(path) for path in HOUSE.rglob("__init__.py")}


def imports(module):
    "Modules of this package that a module imports, at its top or inside a function."
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import): found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            if node.level: base = base[:len(base) - node.level + (module in IS_PACKAGE)]
            start = ".".join([*(base if node.level else []), *([node.module] if node.module else [])])
            found = [f"{start}.{alias.name}" if f"{start}.{alias.name}" in MODULES else start for alias in node.names]
        else: continue
        yield from (name for name in found if name in MODULES and name != module)


def room(module): return module.split(".")[1] if "." in module else None


def fresh(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_package_offers_its_promised_names():
    from crossmodal.systems import experiments
    for name in ("load", "train", "resume", "evaluate", "SYSTEMS"): assert getattr(crossmodal, name) is getattr(experiments, name)


def test_importing_adds_less_than_a_second_to_torch():
    code = "from time import process_time as now; a = now(); import torch; b = now(); import crossmodal; print(b - a, now() - b)"
    torch, added = (min(map(float, times)) for times in zip(*(fresh(code) for _ in range(3))))
    assert added < 1, f"import torch: {torch:.2f} s; crossmodal adds {added:.2f} s"


def test_importing_leaves_heavy_modules_alone():
    assert fresh(f"import sys, crossmodal, crossmodal.systems.experiments; print(*sorted(set({HEAVY}) & set(sys.modules)))") == []


def test_every_module_lives_in_a_known_room():
    assert {room(module) for module in MODULES} - {None} <= set(ROOMS)


def test_the_import_reader_sees_through_relative_and_lazy_imports():
    assert {"crossmodal.data.batch", "crossmodal.training.checkpoint"} <= set(imports("crossmodal.training.loop"))
    assert sum(len(set(imports(module))) for module in MODULES) > 20


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_no_import_points_upward(module):
    here = ROOMS.index(room(module))
    assert [name for name in imports(module) if not room(name) or ROOMS.index(room(name)) > here] == []


def test_no_imports_in_circles():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module):], module])
        if module in done: return
        for name in imports(module): visit(name, [*path, module])
        done.add(module)
    for module in MODULES: visit(module, [])
    assert done == set(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in IS_PACKAGE])
def test_every_public_name_is_explained(module):
    public = importlib.import_module(module).__all__
    nodes = {node.name: node for node in MODULES[module].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert public and ast.get_docstring(MODULES[module])
    assert [name for name in public if name in nodes and not ast.get_docstring(nodes[name])] == []
