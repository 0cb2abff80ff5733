"""`make docs`: notebooks, reference, results and a few pages of prose become a site in _site/ that opens from a folder.

    vendor    MathJax and the widgets' script, from npm                      _docs/vendor
    execute   notebooks that are stored without all outputs, two at a time   _docs/executed (kept until notebook or package change)
              (papers' pages show the runs of `make workbook` where runs/ has them all, else small ones trained on the spot)
    chapters  nbdev's processors over all of them                            _proc, then _docs/source
    pages     reference, results, open questions, rooms, prose               _docs/source
    sphinx    with warnings as errors                                        _site
    links     every link and every picture inside the site is there
"""
import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat

from crossmodal.training.runs import finished_runs
from crossmodal.workbook.pages import execute
from crossmodal.workbook.tables import IN_WORKBOOK, asked_runs, find_table

HERE = Path(__file__).parent
ROOT = HERE.parent
WORK, SITE, NBS, PACKAGE = ROOT / "_docs", ROOT / "_site", ROOT / "nbs", ROOT / "crossmodal"
WORKERS = 2
OTHER_RUNS = "*Drawn when this site was made, of runs at preset {}; the tables and figures around it are stored, of runs that the first output names.*"
MATHJAX, WIDGETS = "mathjax", "@jupyter-widgets/html-manager/dist"
SCRIPTS = {                                 # what the pages load: from npm's folder to ours
    f"{MATHJAX}/es5/tex-svg.js": "mathjax/tex-svg.js", f"{MATHJAX}/es5/input/tex/extensions": "mathjax/input/tex/extensions",
    f"{MATHJAX}/LICENSE": "mathjax/LICENSE", f"{WIDGETS}/embed.js": "widgets/embed.js", f"{WIDGETS}/embed.js.LICENSE.txt": "widgets/LICENSE",
    f"{WIDGETS}/*.woff2": "widgets",        # the buttons' icons
}


# vendor

def vendor(folder: Path) -> Path:
    "Formulas and widgets without a network: the files that package-lock.json names, fetched once."
    wanted = hashlib.sha256((HERE / "package-lock.json").read_bytes() + repr(SCRIPTS).encode()).hexdigest()
    stamp = folder / "vendor/.lock"
    if stamp.exists() and stamp.read_text() == wanted: return folder
    npm = shutil.which("npm")
    if npm is None: raise SystemExit("make docs needs npm for MathJax and the widgets' script: install Node.js (https://nodejs.org), then run it again.")
    print("fetching MathJax and the widgets' script from npm", flush=True)
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)
    for source, target in SCRIPTS.items():
        found, there = sorted((HERE / "node_modules").glob(source)), folder / "vendor" / target
        if not found: raise SystemExit(f"{source} is not in npm's package: has its version changed? SCRIPTS in docs/build.py names what the pages load.")
        there.parent.mkdir(parents=True, exist_ok=True)
        for here in found: shutil.copytree(here, there) if here.is_dir() else shutil.copy(here, there)
    stamp.write_text(wanted)
    return folder


# execute

def called(node: ast.AST) -> set[str]:
    "The names of what is called when a cell runs: not in the functions that it defines."
    found = {ast.unparse(node.func).rpartition(".")[2]} if isinstance(node, ast.Call) else set()
    inner = [] if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) else ast.iter_child_nodes(node)
    return found.union(*map(called, inner))


def lacks_output(cell) -> bool:
    "Whether by its source a cell shows something (it prints, draws, or ends in a value), and nothing is stored. In doubt, yes: that costs seconds."
    if cell.cell_type != "code" or cell.outputs or re.search(r"^#\|\s*(hide|export|eval: false)\b", cell.source, re.MULTILINE): return False
    code = ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.MULTILINE))
    if called(code) & {"print", "display", "subplots"}: return True
    ends_in_value = bool(code.body) and isinstance(code.body[-1], ast.Expr) and not cell.source.rstrip().endswith(";")
    return ends_in_value and not ast.unparse(code.body[-1]).startswith("test_")


def complete(content) -> bool: return not any(map(lacks_output, content.cells))


def filled(stored: nbformat.NotebookNode, run: nbformat.NotebookNode, words: str = "") -> nbformat.NotebookNode:
    "A notebook as stored; what its other cells show when it is run, under `words`."
    from chapters import STATE
    for cell, new in zip(stored.cells, run.cells):
        if cell.cell_type != "code" or cell.outputs: continue
        note = [nbformat.v4.new_output("display_data", {"text/markdown": words})] if words and lacks_output(cell) else []
        cell.outputs = [*note, *new.outputs]
    states = [content.metadata.get("widgets", {}).get(STATE, {}).get("state", {}) for content in (stored, run)]
    stored.metadata = nbformat.from_dict(run.metadata | {"widgets": {STATE: {"state": states[0] | states[1]}}})
    return stored


def package_hash() -> str:
    "Another text when any code, table or record changes: a figure may then be another one."
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "results").rglob("*.csv")]): digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def made_by_workbook() -> frozenset[str]:
    "The systems all of whose runs `make workbook` has left in runs/: their papers' pages show those, and the others what `smoke` trains on the spot."
    done = finished_runs(ROOT / "runs")
    missing = {system for system, number in IN_WORKBOOK if not done or not asked_runs(find_table(system, number)).keys() <= done.keys()}
    return frozenset({system for system, _ in IN_WORKBOOK} - missing)


def executed(notebook: Path, folder: Path, code: str) -> nbformat.NotebookNode:
    """A notebook with its outputs: as stored, and where that lacks some, as it shows them when run in its own folder by a kernel of its own.
    What was run is kept under the hash of all that it depends on."""
    stored = nbformat.read(NBS / notebook, as_version=4)
    if complete(stored): return stored
    system = notebook.stem.partition("_")[2] if notebook.parts[0] == "workbook" else ""
    whole = system in made_by_workbook()
    runs, preset = (ROOT / "runs", "quick") if whole else (folder / f"runs-{code}", "smoke")
    mixed = system in dict(IN_WORKBOOK) and any(cell.get("outputs") for cell in stored.cells)
    words = OTHER_RUNS.format(f"`{preset}`{', at which nothing is learned' if preset == 'smoke' else ''}") if mixed else ""
    key = hashlib.sha256((code + preset + json.dumps([cell.source for cell in stored.cells])).encode()).hexdigest()[:16]
    kept = folder / f"{'-'.join(notebook.with_suffix('').parts)}-{key}.ipynb"
    if kept.exists():
        kept.touch()
        return filled(stored, nbformat.read(kept, as_version=4), words)
    started = time.perf_counter()
    environment = {"OMP_NUM_THREADS": "1", "CROSSMODAL_RUNS": str(runs), "CROSSMODAL_PRESET": preset,
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    content = execute(NBS / notebook, environment)
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(content, kept)
    print(f"         {time.perf_counter() - started:4.0f} s  {notebook}", flush=True)
    return filled(stored, content, words)


def execute_all(notebooks: list[Path], folder: Path) -> dict[Path, nbformat.NotebookNode]:
    code, started = package_hash(), time.time()
    last_first = notebooks[::-1]            # those that train take longest and stand last
    with ThreadPoolExecutor(WORKERS) as pool: found = dict(zip(last_first, pool.map(lambda notebook: executed(notebook, folder, code), last_first)))
    for old in folder.glob("*"):            # of earlier packages and notebooks
        if old.is_dir() and old.name != f"runs-{code}": shutil.rmtree(old)
        elif old.is_file() and old.stat().st_mtime < started: old.unlink()
    return found


# chapters

def chapters(contents: dict[Path, nbformat.NotebookNode], source: Path):
    "nbdev processes a folder, so it is given one in which every notebook has its outputs; what comes out is what Sphinx reads."
    import nbdev.serve
    from chapters import Chapters
    with tempfile.TemporaryDirectory() as place:
        for notebook, content in contents.items():
            content.metadata["notebook"] = notebook.as_posix()
            for cell in content.cells: cell.metadata.pop("execution", None)
            (copy := Path(place) / notebook).parent.mkdir(exist_ok=True)
            nbformat.write(content, copy)
        nbdev.serve.FilterDefaults = Chapters
        os.chdir(ROOT)
        shutil.copytree(nbdev.serve.proc_nbs(place, n_workers=0, force=True), source, dirs_exist_ok=True)


# pages

def write_pages(source: Path, extra: Path):
    "Everything that is not a notebook."
    import house
    from chapters import link_names
    shutil.copy(ROOT / "CITATION.cff", source)
    shutil.copytree(HERE / "pictures", source / "pictures", dirs_exist_ok=True)
    fill = {"papers": house.paper_table, "open": house.open_questions, "howto": lambda: how_to(house)}
    for path in (HERE / "pages").rglob("*.md"):
        text = re.sub(r"<!-- (\w+) -->", lambda match: fill[match[1]](), path.read_text(encoding="utf-8"))
        if path.parent.name == "rooms": text = house.room_page(path.stem, text)
        place = source / path.relative_to(HERE / "pages")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(link_names(text), encoding="utf-8")
    write_reference(source / "api", house)
    write_results(source / "results", extra / "results", house)
    index = nbformat.read(source / "index.ipynb", as_version=4)
    index.cells.append(nbformat.v4.new_markdown_cell(house.contents()))
    nbformat.write(index, source / "index.ipynb")


def how_to(house) -> str:
    mine = house.in_room("howto")
    return f"{house.listing(mine)}\n\n{house.toctree([house.page(path).removesuffix('.ipynb') for path in mine])}"


def write_reference(folder: Path, house):
    "A page for each module, and one that lists them by room."
    import reference
    folder.mkdir(parents=True, exist_ok=True)
    modules = {name: notebook for notebook in house.notebooks() if (name := house.module(notebook))}
    for name, notebook in modules.items():
        text = reference.page(name, PACKAGE / f"{name.replace('.', '/')}.py", notebook.as_posix(), house.heading(notebook)[1])
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    parts = ["# Reference", "Every module, in the order in which they build upon each other: signatures with the shapes of tensors, "
             "the comment beside each parameter, and the source."]
    for room in (*house.ROOMS, ""):
        mine = [name for name in modules if name.rpartition(".")[0] == room]
        parts += [f"## {room or 'on top'}", "\n".join(f"- [{name}](#api-{name}): {house.heading(modules[name])[1]}" for name in mine), house.toctree(mine)]
    (folder / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_results(folder: Path, extra: Path, house):
    "A page for each stored table; tables and records themselves are copied beside."
    import matplotlib
    matplotlib.use("Agg")
    import records
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "results", extra, dirs_exist_ok=True)
    tables = records.stored_tables(ROOT / "results")
    for name, csv in tables.items():
        chapter, page = house.chapter_of(csv.stem.partition("_")[0]).as_posix(), folder / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(records.result_page(name, csv, chapter, page.parent), encoding="utf-8")
    links = "\n".join(f"- [{records.title(name)}]({name}.md)" for name in tables)
    words = (records.WORDS / "index.md").read_text(encoding="utf-8")
    (folder / "index.md").write_text(f"{words}\n\n{links}\n\n{house.toctree(list(tables))}\n", encoding="utf-8")


def sphinx(source: Path):
    "Warnings are errors. Built beside the old site, which is replaced when all is well."
    from sphinx.cmd.build import main
    made = WORK / "html"
    shutil.rmtree(made, ignore_errors=True)
    options = ["-b", "html", "-W", "--keep-going", "-q", "-j", str(WORKERS), "-c", str(HERE), "-d", str(WORK / "doctrees"),
               "-D", f"html_static_path={HERE / 'static'},{WORK / 'vendor'}", "-D", f"html_extra_path={WORK / 'extra'}"]
    if main([*options, str(source), str(made)]): raise SystemExit("the site was not built: Sphinx warned of what stands above.")
    (made / ".nojekyll").touch()            # GitHub Pages would leave out folders that begin with an underscore
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(made, SITE)


# links

class Page(HTMLParser):
    "What a page offers to link to, what it links to, and what it loads."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        needed = tag == "link" and not {*(dict(attributes).get("rel") or "").split()} & {"next", "prev", "index", "search", "author"}
        for key, value in attributes:
            if key == "id" or (tag == "a" and key == "name"): self.ids.add(value)
            elif value and (key == "src" or (key == "href" and needed)): self.loads.append(value)
            elif value and key == "href": self.links.append(value)


def broken_links(site: Path) -> list[str]:
    "Links and pictures inside a site that lead nowhere: no file, or no such place in it. What a page would load from a network counts too."
    site = site.resolve()
    pages, found = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}, []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: {link}: is loaded from a network" for link in page.loads if re.match(r"(https?:)?//", link)]
        for link in [*page.loads, *page.links]:
            if re.match(r"(https?|mailto|data|javascript):|//", link): continue
            target, _, place = unquote(link).partition("#")
            file = (path.parent / target.partition("?")[0]).resolve() if target else path
            if not file.is_file(): found.append(f"{name}: {link}: no such file")
            elif place and file in pages and place not in pages[file].ids: found.append(f"{name}: {link}: no such place in the page")
    return found


def build(stored: bool = False) -> None:
    started = time.perf_counter()
    def done(what): print(f"{time.perf_counter() - started:6.1f} s  {what}", flush=True)
    sys.path.insert(0, str(ROOT))
    import house
    vendor(WORK / "vendor"); done("scripts")
    notebooks = house.notebooks()
    contents = {notebook: nbformat.read(NBS / notebook, as_version=4) for notebook in notebooks} if stored else execute_all(notebooks, WORK / "executed")
    done(f"{len(contents)} notebooks with their outputs")
    source, extra = WORK / "source", WORK / "extra"
    for folder in (source, extra): shutil.rmtree(folder, ignore_errors=True)
    chapters(contents, source); done("chapters")
    write_pages(source, extra); done("pages")
    sphinx(source); done("site")
    if broken := broken_links(SITE): raise SystemExit("\n".join([*broken, f"{len(broken)} broken links."]))
    done(f"links hold: open {SITE / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", action="store_true", help="show notebooks as they are stored; run none")
    build(parser.parse_args().stored)
