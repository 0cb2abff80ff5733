"""Each check of `suite.py` can fail: a tiny project is spoilt in one way at a time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import mk_cell, new_nb, write_nb

SUITE = Path(__file__).with_name("suite.py")
SETTINGS = """[DEFAULT]
repo = tiny
lib_name = tiny
lib_path = tiny
nbs_path = nbs
version = 0.0.1
branch = main
user = tiny
author = tiny
update_pyproject = False
"""


def write_notebook(path: Path, *cells: str) -> None:
    path.parent.mkdir(exist_ok=True)
    kind = lambda cell: "markdown" if cell.startswith("# ") else "code"
    nb = new_nb([mk_cell(cell, kind(cell), id=f"cell{i}") for i, cell in enumerate(cells)])
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
    write_nb(nb, path)


def nbdev_export(root: Path) -> None:
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=root, check=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    "A project in which all is well."
    root = tmp_path_factory.mktemp("sound") / "tiny"
    root.mkdir()
    (root / "settings.ini").write_text(SETTINGS)
    write_notebook(root / "nbs/00_core.ipynb", "#| default_exp core", "#| export\nanswer = 42", "assert answer == 42")
    write_notebook(root / "nbs/index.ipynb", "# Tiny", "1 + 1")
    (root / "tests").mkdir()
    (root / "tests/test_core.py").write_text(
        "def test_answer():\n    from tiny.core import answer\n    assert answer == 42\n"
    )
    nbdev_export(root)
    make = ["--to", "markdown", "--no-input", "--output-dir", root, "--output", "README", root / "nbs/index.ipynb"]
    subprocess.run([sys.executable, "-m", "nbconvert", *make], check=True, capture_output=True)
    return root


@pytest.fixture
def project(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "tiny"))


def ask(root: Path, *only: str) -> tuple[int, str, str]:
    "The exit status, all that was printed, and its last line."
    options = ["--only", *only] if only else []
    run = subprocess.run([sys.executable, SUITE, root, *options], text=True, capture_output=True)
    printed = run.stdout + run.stderr
    return run.returncode, printed, run.stdout.splitlines()[-1]


def test_a_sound_project_passes(project):
    status, printed, last = ask(project)
    assert (status, last) == (0, "6 passed, 0 failed, 0 skipped"), printed


def test_a_failure_stops_no_other_part(project):
    (project / "tiny/core.py").unlink()
    status, printed, last = ask(project)
    assert status == 1 and "tiny/core.py: the notebooks export it" in printed
    # Three: the export differs, and neither pytest nor anyone else can import the module. The notebook runs without it.
    assert last == "4 passed, 2 failed, 0 skipped", printed


def test_module_out_of_step(project):
    module = project / "tiny/core.py"
    module.write_text(module.read_text().replace("answer = 42", "answer = 43"))
    status, printed, last = ask(project, "export")
    assert (status, last) == (1, "0 passed, 1 failed, 0 skipped")
    assert "-answer = 43\n+answer = 42" in printed and "run nbdev_export" in printed


def test_module_without_notebook(project):
    shutil.copy(project / "tiny/core.py", project / "tiny/gone.py")
    status, printed, _ = ask(project, "export")
    assert status == 1 and "tiny/gone.py: no notebook exports it" in printed


def test_hand_written_module_is_left_alone(project):
    (project / "tiny/by_hand.py").write_text("x = 1\n")
    nbdev_export(project)  # it is listed in _modidx.py all the same
    assert ask(project, "export")[0] == 0


def test_readme_out_of_step(project):
    (project / "README.md").write_text("# Huge\n")
    status, printed, last = ask(project, "readme")
    assert (status, last) == (1, "0 passed, 1 failed, 0 skipped")
    assert "-# Huge\n+# Tiny" in printed and "make readme" in printed


def test_unclean_notebook(project):
    path = project / "nbs/00_core.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"][2]["execution_count"] = 7
    path.write_text(json.dumps(nb))
    status, printed, _ = ask(project, "clean")
    assert status == 1 and "nbs/00_core.ipynb is not clean" in printed


def test_path_of_a_machine_in_an_output(project):
    path, home = project / "nbs/00_core.ipynb", "/".join(("", "home", "somebody"))
    nb = json.loads(path.read_text())
    nb["cells"][2]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": [f"finished, in {home}/full\n"]}]
    path.write_text(json.dumps(nb, indent=1) + "\n")
    status, printed, _ = ask(project, "clean")
    assert status == 1 and f"nbs/00_core.ipynb shows a path of this machine ({home})" in printed


def test_unreadable_notebook(project):
    (project / "nbs/01_broken.ipynb").write_text("{")
    assert ask(project, "clean")[0] == 1


def test_large_notebook(project):
    write_notebook(project / "nbs/01_large.ipynb", "x = '" + "x" * 500_000 + "'")
    status, printed, _ = ask(project, "clean")
    assert status == 1 and "nbs/01_large.ipynb has 500," in printed


@pytest.mark.parametrize(
    "cells",
    [
        ["#| eval: false\nassert True"],
        ["#| default_exp nothing"],
        ["---\nskip_exec: true\n---", "assert True"],
    ],
    ids=["not evaluated", "only a directive", "skipped by its front matter"],
)
def test_notebook_that_runs_nothing(project, cells):
    path = project / "nbs/01_idle.ipynb"
    write_notebook(path, *cells)
    if cells[0].startswith("---"):
        nb = json.loads(path.read_text())
        nb["cells"][0] = {"cell_type": "raw", "id": "cell0", "metadata": {}, "source": cells[0].splitlines(True)}
        path.write_text(json.dumps(nb))
    status, printed, last = ask(project, "notebooks")
    assert (status, last) == (1, "2 passed, 1 failed, 0 skipped") and "ran no code cell" in printed


@pytest.mark.parametrize(
    "source, problem",
    [("assert 1 == 2", "AssertionError"), ("import os; os.abort()", "did not come to its end")],
    ids=["raises", "kills its process"],
)
def test_failing_notebook(project, source, problem):
    write_notebook(project / "nbs/01_wrong.ipynb", source)
    status, printed, last = ask(project, "notebooks")
    assert (status, last) == (1, "2 passed, 1 failed, 0 skipped") and problem in printed


def test_notebooks_do_not_share_a_process(project):
    for name in "abcd":
        write_notebook(project / f"nbs/{name}.ipynb", "import math\nassert not hasattr(math, 'seen')\nmath.seen = True")
    assert ask(project, "notebooks")[0] == 0


def test_no_test_collected(project):
    (project / "tests/test_core.py").unlink()
    status, printed, last = ask(project, "tests")
    assert (status, last) == (1, "0 passed, 1 failed, 0 skipped") and "no test to run" in printed


def test_skipped_tests_are_listed(project):
    (project / "tests/test_more.py").write_text("import pytest\n\n@pytest.mark.skip('no reason')\ndef test_it(): ...\n")
    status, printed, last = ask(project, "tests")
    assert (status, last) == (0, "1 passed, 0 failed, 1 skipped") and "no reason" in printed


def test_a_suite_of_skipped_tests_counts_none_as_passed(project):
    (project / "tests/test_core.py").write_text("import pytest\npytest.skip('absent', allow_module_level=True)\n")
    assert ask(project, "tests")[2].startswith("0 passed")
