"""The workbook's tools as a reader meets them: notebooks that JupyterLab runs, and pages that have no kernel.

By default two pages are opened; CROSSMODAL_ALL_PAGES=1 opens all of them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from crossmodal.systems.experiments import train
from crossmodal.training.runs import open_run
from crossmodal.workbook.pages import render

ROOT = Path(__file__).parents[2]
PAGES = [path.stem for path in sorted((ROOT / "nbs" / "workbook").glob("[0-9]*_*.ipynb")) if path.stem[3:] in {"embedmap", "selfsup", "gxn", "laviter", "sdn"}]
CHOSEN = PAGES if os.environ.get("CROSSMODAL_ALL_PAGES") else ["02_embedmap", "07_sdn"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder as a clone has it, with the notebooks, the stored results and no runs."
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "nbs" / "workbook", folder / "nbs" / "workbook", ignore=shutil.ignore_patterns(".*"))
    (folder / "results").symlink_to(ROOT / "results")
    return folder


@pytest.fixture(scope="module")
def settings(desk):
    "What makes notebooks train in seconds, into the desk's own folder, with this project's own package."
    return {"CROSSMODAL_RUNS": str(desk / "runs"), "CROSSMODAL_PRESET": "smoke", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lab(desk, settings, tmp_path_factory):
    "A JupyterLab on a free port, with nobody's settings but its own."
    pytest.importorskip("jupyterlab")
    place = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"notebook-extension/tracker": {"windowingMode": "none"},    # cells out of sight are in the page too
             "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
    for name, value in quiet.items():
        file = place / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(value))
    own = {f"JUPYTER{name}": str(place / name.lower()) for name in ("_CONFIG_DIR", "_RUNTIME_DIR", "LAB_WORKSPACES_DIR")}
    options = {"ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.root_dir": desk, "IdentityProvider.token": "secret",
               "ServerApp.open_browser": False, "ServerApp.allow_root": True, "LabApp.expose_app_in_browser": True, "LabApp.news_url": None,
               "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate"}
    child = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", *(f"--{key}={value}" for key, value in options.items())], cwd=desk,
                             env=os.environ | settings | own | {"JUPYTERLAB_SETTINGS_DIR": str(place / "settings")},
                             stdout=subprocess.DEVNULL, stderr=open(place / "log", "w"))
    until = time.monotonic() + 300
    while True:
        try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=secret", timeout=10); break
        except OSError: time.sleep(.2)
        assert child.poll() is None and time.monotonic() < until, (place / "log").read_text()[-2000:]
    yield f"http://127.0.0.1:{port}/doc/tree/{{}}?token=secret&reset"
    child.send_signal(signal.SIGINT)        # twice: the second is the answer to "shut down?"
    child.send_signal(signal.SIGTERM)
    child.wait(90)


STATE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
  if (!kernel) return null;
  const cells = [...panel.content.model.cells].filter(cell => cell.type === 'code' && cell.sharedModel.source.trim());
  const errors = cell => cell.outputs.toJSON().filter(out => out.output_type === 'error').map(out => out.evalue);
  return {status: kernel.status, cells: cells.map(cell => ({count: cell.executionCount, errors: errors(cell)}))};
}"""


def run_all(page, lab: str, notebook: str, seconds: int = 300) -> None:
    "Open a notebook, run it, and wait for its end; an error in any cell fails."
    page.goto(lab.format(notebook))
    page.wait_for_function(f"() => {{ const state = ({STATE})(); return state?.status === 'idle' && state.cells.length; }}")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    end = time.time() + seconds
    while time.time() < end:
        state = page.evaluate(STATE)
        errors = [error for cell in state["cells"] for error in cell["errors"]]
        assert not errors, errors
        if state["status"] == "idle" and all(cell["count"] for cell in state["cells"]): return
        page.wait_for_timeout(300)
    raise AssertionError(f"{notebook}: {sum(bool(cell['count']) for cell in state['cells'])} of {len(state['cells'])} cells ran in {seconds} s")


def move_slider(page) -> None:
    "A film's slider, by keyboard: another frame comes into the window."
    film = page.locator(".cm-film").first
    film.scroll_into_view_if_needed()
    window, slider = film.locator(".frame").last, film.locator("input[type=range]")
    before, place, said = window.screenshot(), window.evaluate("e => getComputedStyle(e).backgroundPositionX"), film.locator("output").inner_text()
    slider.focus()
    for _ in range(int(slider.get_attribute("max"))): slider.press("ArrowRight")
    assert window.evaluate("e => getComputedStyle(e).backgroundPositionX") != place
    assert film.locator("output").inner_text() != said and window.screenshot() != before


def point_at_map(page) -> None:
    "The pointer over a point brings its words, and its picture where it is one; the legend hides a class."
    root = page.locator("[data-map]").first
    root.scroll_into_view_if_needed()
    card, canvas = root.locator(".card"), root.locator("canvas").first
    assert not card.is_visible()
    for _ in range(20):                                                   # what comes late above it may push it from under the pointer
        x, y = root.evaluate("e => e.at(0)")
        canvas.hover(position={"x": x, "y": y})
        if card.is_visible(): break
        page.wait_for_timeout(300)
    assert card.is_visible() and card.locator(".said").inner_text().strip()
    assert card.locator(".tile").is_visible() == root.evaluate("e => !!e.data.sheet && e.data.tile[0] >= 0")
    canvas.focus()
    canvas.press("ArrowRight")
    assert card.is_visible()
    canvas.press("Escape")
    assert not card.is_visible()
    full = canvas.screenshot()
    root.locator(".legend input").first.click()
    assert canvas.screenshot() != full


def sort_table(page) -> None:
    "A click on a heading sorts by it, another turns it around."
    table = page.locator(".cm-table table").first
    table.scroll_into_view_if_needed()
    values = lambda: [float(value) for value in table.locator("tbody tr td:nth-of-type(1)").evaluate_all("cells => cells.map(e => e.dataset.value)")]
    heading = table.locator("thead th").nth(1)
    for turned in (False, True):
        heading.locator("button").click()
        assert values() == sorted(values(), reverse=turned)
        assert heading.get_attribute("aria-sort") == ("descending" if turned else "ascending")


def ask_explorer(page, question: str) -> None:
    "Type a sentence, choose a picture: the answer changes."
    live = page.locator(".cm-explorer-live").first
    live.scroll_into_view_if_needed()
    live.locator("input[type=text]").first.fill(question)
    live.locator("input[type=text]").first.press("Enter")
    live.locator(".cm-explorer b", has_text=question).first.wait_for()
    live.get_by_text("drawn and written in").wait_for()
    assert live.locator("section img").count() > 3
    number = live.locator("input[type=number]").first
    number.fill("2")
    number.press("Enter")
    live.get_by_text("asked: no. 2").first.wait_for()


@pytest.mark.parametrize("name", CHOSEN)
def test_jupyterlab_runs_a_page_and_its_tools_answer(page, lab, name):
    run_all(page, lab, f"nbs/workbook/{name}.ipynb")
    sort_table(page)
    point_at_map(page)
    if page.locator(".cm-film").count(): move_slider(page)
    ask_explorer(page, "one two" if name == "02_embedmap" else "a small bird with a red crown")
    assert not [line for line in page.complaints if "Error" in line and "ResizeObserver" not in line], page.complaints


def test_a_static_page_shows_everything_without_kernel_or_network(chromium, desk, settings, tmp_path):
    keys = {key.removeprefix("CROSSMODAL_"): value for key, value in settings.items() if key.startswith("CROSSMODAL_")}
    file = render(desk / "nbs" / "workbook" / "07_sdn.ipynb", tmp_path / "page.html", keys)
    for scripts, width in ((True, 1280), (True, 390), (False, 1280)):
        context = chromium.new_context(viewport={"width": width, "height": 900}, java_script_enabled=scripts)
        context.set_default_timeout(300_000)
        page, complaints = context.new_page(), []
        page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
        page.on("request", lambda request, to=complaints: None if request.url.startswith(("file:", "data:")) else to.append(request.url))
        page.goto(file.as_uri())
        tools = {kind: page.locator(kind).count() for kind in (".cm-table", "[data-map]", ".cm-film", ".cm-explorer details")}
        assert all(tools.values()), tools
        if scripts:
            for act in (sort_table, point_at_map, move_slider): act(page)
            wide = "() => [...document.querySelectorAll('.cm-table, [data-map], .cm-film, .cm-explorer')].filter(e => e.clientWidth > innerWidth)"
            assert not page.evaluate(f"() => ({wide})().length")
        else:
            assert page.locator("[data-map] > img").first.is_visible()              # a plain picture where no script runs
        summary = page.locator(".cm-explorer summary").nth(1)
        summary.click()
        assert page.locator(".cm-explorer details").nth(1).locator("img").first.is_visible()
        assert not complaints and not page.get_by_text("Error displaying widget").count()
        context.close()


def test_a_training_is_watched_while_it_goes_on(page, lab, desk):
    run = train("gxn", preset="smoke", out=desk / "runs" / "watched", changes={"model": "frozen", "look_epochs": 3}, quiet=True)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(True)
    (run.folder / "metrics.jsonl").write_text("".join(lines[:2]))
    open_run(run.folder).save(status="running")
    notebook = {"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source":
                           f"from crossmodal.workbook.explorers import Watch\nWatch({str(run.folder)!r})"}],
                "metadata": {"kernelspec": {"name": "python3", "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
    (desk / "watch.ipynb").write_text(json.dumps(notebook))
    run_all(page, lab, "watch.ipynb")
    page.get_by_text("running, phase match, epoch 1").wait_for()
    before = page.locator("img[alt^='curves of']").get_attribute("src")
    (run.folder / "metrics.jsonl").write_text("".join(lines))
    page.get_by_text("running, phase match, epoch 3").wait_for()          # nobody pressed anything
    assert page.locator("img[alt^='curves of']").get_attribute("src") != before
    open_run(run.folder).save(status="finished")
    page.get_by_text("finished, phase match, epoch 3").wait_for()
