"""A notebook as a page of the site: nbdev's processors, then what MyST needs to know.

A page shows what a reader of the notebook sees: prose, code (exported code too, since it is the text of the book), figures. It does not
show cells under `#| hide`, progress bars, or what was written to stderr. Names in backticks become links to the reference.
"""
import ast
import re
from functools import cache
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, clean_magics, hide_, hide_line, populate_language, rm_header_dash, strip_ansi, strip_hidden_metadata

VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tag(cell, name: str):
    cell.metadata.setdefault("tags", []).append(name)


def without_code(cell):
    "`#| echo: false`, `#| hide_input`: a figure without the code that draws it."
    if cell.cell_type == "code" and (cell.directives_.get("echo:") == ["false"] or "hide_input" in cell.directives_): tag(cell, "remove-input")


def fold_imports(cell):
    "A cell that only imports is folded away: it can be opened, and does not stand in the way."
    body = (cell.parsed_() or []) if cell.cell_type == "code" else []
    if len(body) > 1 and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body):
        tag(cell, "hide-input")
        cell.metadata["mystnb"] = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}


def drop_directives(cell):
    "What nbdev leaves standing: `#| echo: false` and its like. A cell that holds nothing else goes."
    if cell.cell_type != "code": return
    cell["source"] = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE).rstrip()
    if not cell.source: del cell["source"]


class Outputs(Processor):
    "Outputs for people: no stderr, no progress bars, no controls beside HTML that needs none, only widgets that are shown, a name for each figure."
    def begin(self):
        self.section = ""
        self.models = self.nb.metadata.get("widgets", {}).get(STATE, {}).get("state", {})

    def cell(self, cell):
        if cell.cell_type == "markdown": self.section = next(iter(re.findall(r"^#+ (.*)", cell.source, re.MULTILINE)[::-1]), self.section)
        else:
            for output in cell.outputs:
                if "text/html" in output.get("data", {}): output["data"].pop(VIEW, None)        # `ShownTwice`: the controls need a kernel
            cell["outputs"] = [output for output in cell.outputs if self.wanted(output)]
            if any("image/png" in output.get("data", {}) for output in cell.outputs):
                words = re.sub(r"[$`\\*_{}]", "", self.section)
                cell.metadata["mystnb"] = {"image": {"alt": f"Figure: {words}"}}

    def wanted(self, output) -> bool:
        if output.output_type == "stream": return output.name != "stderr"
        view = output.get("data", {}).get(VIEW)
        return not view or bool(used := self.below(view["model_id"])) and not any("Progress" in self.models[id]["model_name"] for id in used)

    def below(self, model_id: str) -> set[str]:
        "A widget and all that it consists of; nothing if its state was not kept."
        found, open_ = set(), [model_id]
        while open_:
            id = open_.pop()
            if id not in self.models: return set()
            if id in found: continue
            found.add(id)
            open_ += re.findall(r"IPY_MODEL_(\w+)", str(self.models[id]["state"]))
        return found

    def end(self):
        views = [output.data[VIEW]["model_id"] for cell in self.nb.cells for output in cell.get("outputs", []) if VIEW in output.get("data", {})]
        kept = {id: self.models[id] for view in views for id in self.below(view)}
        self.nb.metadata.pop("widgets", None)
        if kept: self.nb.metadata["widgets"] = {STATE: {"version_major": 2, "version_minor": 0, "state": kept}}


# Names

@cache
def definitions() -> dict[str, tuple[str, ...]]:
    "What each module offers, from its source: the names of `__all__`, and its classes' methods. (nbdev's index skips notebooks with `auto` in their name.)"
    package, found = get_config().lib_path, {}
    for path in sorted(package.rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        public = next((ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"), ())
        made = {name.id for node in body for name in ast.walk(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(name, ast.Name)}
        made |= {node.name for node in body if isinstance(node, DEFINITIONS)}
        public = [name for name in public if name in made]         # not what is only passed on
        methods = [f"{node.name}.{part.name}" for node in body if isinstance(node, ast.ClassDef) and node.name in public for part in node.body
                   if isinstance(part, DEFINITIONS) and not part.name.startswith("_") and ast.get_docstring(part)]
        if public: found[".".join(["crossmodal", *path.relative_to(package).with_suffix("").parts])] = (*public, *methods)
    return found


@cache
def public_names() -> dict[str, str]:
    "What may stand in backticks, and the full name that it means: modules, and functions and classes where only one has that name."
    found: dict[str, set[str]] = {}
    for module, names in definitions().items():
        for form in (module, module.partition(".")[2]): found.setdefault(form, set()).add(module)
        for name in names:
            full = f"{module}.{name}"
            for form in (name, f"{module.rpartition('.')[2]}.{name}", full, full.partition(".")[2]): found.setdefault(form, set()).add(full)
    return {form: names.pop() for form, names in found.items() if len(names) == 1}


def link_name(match: re.Match) -> str:
    "`order_similarity` -> a link to its place in the reference. A plain lower-case word (`train`) may mean anything and stays as it is."
    name = match[1]
    telling = "_" in name or "." in name or name[:1].isupper() or match[0].endswith("()`")
    full = public_names().get(name)
    if not (full and telling): return match[0]
    call = "()" if match[0].endswith("()`") else ""
    role = "py:mod" if full in definitions() else "py:obj"
    return f"{{{role}}}`{name}{call} <{full}>`"


def link_names(text: str) -> str:
    "Markdown with its backticked names turned into links, but not in code blocks, headings, formulas or links that stand there already."
    fence, lines = False, []
    for line in text.split("\n"):
        if line.lstrip().startswith("```"): fence = not fence
        skip = fence or line.startswith(("    ", "#"))
        lines.append(line if skip else re.sub(r"(?<![\[`}])`([A-Za-z_][\w.]*)(?:\(\))?`(?![`\]])", link_name, line))
    return "\n".join(lines)


# Links

def slug(heading: str) -> str:
    "A heading's anchor, as MyST makes it."
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def repository_link(path: str) -> str:
    cfg = get_config()
    return f"{cfg.git_url}/{'tree' if Path(cfg.config_path, path).is_dir() else 'blob'}/{cfg.branch}/{path}"


def site_link(target: str, notebook: Path) -> str:
    "A link as a notebook has it, from the page that the notebook becomes. `index.ipynb` is README.md, whose links begin at the project's folder."
    if re.match(r"\w+:", target): return target
    root = get_config().config_path
    path, _, place = target.partition("#")
    if not path: return f"#{slug(place)}"
    base = root if notebook.name == "index.ipynb" else notebook.parent
    found = (base / path).resolve()
    if not found.exists(): raise ValueError(f"{notebook.relative_to(root)} links to {target!r}, and {found} is not there.")
    nbs = get_config().nbs_path.resolve()
    if found.suffix == ".ipynb" and nbs in found.parents:
        return "/" + found.relative_to(nbs).as_posix() + (f"#{slug(place)}" if place else "")
    if found.name == "CITATION.cff": return "/cite.md"
    if found.suffix in (".png", ".svg", ".jpg"): return f"/pictures/{found.name}"
    return repository_link(found.relative_to(root.resolve()).as_posix())


def link_pages(text: str, notebook: Path) -> str:
    change = lambda match: f"{match[1]}({site_link(match[2], notebook)})"
    return re.sub(r"(!?\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\])\(([^)\s]+)\)", change, text)


class FrontPage(Processor):
    "The start page is README.md, which shows what its code prints and not the code."
    def cell(self, cell):
        if self.nb.metadata.get("notebook") == "index.ipynb" and cell.cell_type == "code": tag(cell, "remove-input")


class Links(Processor):
    "Links between notebooks, from names to the reference, and from the reference to the cell that defines a name."
    def begin(self):
        self.notebook = get_config().nbs_path.resolve() / self.nb.metadata.pop("notebook")
        self.module = next((args[0] for cell in self.nb.cells for key, args in cell.directives_.items() if key == "default_exp"), "")
        exported = [cell for cell in self.nb.cells if {"export", "exports"} & cell.directives_.keys()]
        for cell in reversed(exported):
            names = [node.name for node in cell.parsed_() or [] if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]
            if names: self.nb.cells.insert(cell.idx_, mk_cell("\n".join(f"({anchor(self.module, name)})=" for name in names), "markdown"))
        if self.module: self.nb.cells.insert(1, mk_cell(f"Reference: {{py:mod}}`{self.module} <crossmodal.{self.module}>`", "markdown"))

    def cell(self, cell):
        if cell.cell_type == "markdown": cell["source"] = link_names(link_pages(cell.source, self.notebook))


def anchor(module: str, name: str) -> str:
    "Anchors know no capitals, so a class (`Agreement`) is told from a function (`agreement`)."
    return f"{'class' if name[0].isupper() else 'def'}-{module}.{name}"


class Chapters(FilterDefaults):
    "nbdev's default processors hide exported code and run the notebook again to print its signatures; a chapter keeps the code and has its outputs."
    def base_procs(self):
        return [populate_language, strip_ansi, FrontPage, Links, hide_, hide_line, rm_header_dash, without_code, fold_imports, clean_magics, drop_directives,
                strip_hidden_metadata, Outputs]
