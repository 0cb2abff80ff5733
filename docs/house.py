"""What is in the house, and the pages that say so: notebooks in reading order, rooms, papers, open questions, the table of contents."""
import json
import re
from pathlib import Path

from chapters import link_names
from records import stored_tables, title

HERE = Path(__file__).parent
ROOT = HERE.parent
NBS = ROOT / "nbs"
ROOMS = ("data", "models", "losses", "metrics", "training", "systems", "workbook")
PAPERS = {"selfsup": "000", "laviter": "001", "embedmap": "002", "gxn": "003", "sdn": "004"}
OPEN = re.compile(r"^## What the paper leaves open\n(.*?)(?=\n## |\Z)", re.DOTALL | re.MULTILINE)


def notebooks() -> list[Path]:
    "Every notebook, as paths inside nbs/, in reading order; index last."
    found = [path.relative_to(NBS) for path in NBS.rglob("*.ipynb")]
    found = [path for path in found if not any(part.startswith((".", "_")) for part in path.parts)]
    return sorted(found, key=lambda path: (path.stem == "index", path))


def in_room(room: str) -> list[Path]: return [path for path in notebooks() if path.parent.name == room]


def cells(notebook: Path, kind: str) -> list[str]:
    "The source of a notebook's cells of a kind."
    content = json.loads((NBS / notebook).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


def heading(notebook: Path) -> tuple[str, str]:
    "Title and one-line summary."
    first = cells(notebook, "markdown")[0]
    name, summary = re.match(r"#\s+(.*)", first), re.search(r"^>\s+(.*)", first, re.MULTILINE)
    if name is None: raise ValueError(f"nbs/{notebook} does not begin with a title: expected '# ...', found {first[:60]!r}.")
    return name[1].strip(), summary[1].strip() if summary else ""


def module(notebook: Path) -> str:
    "What a notebook exports; empty if nothing."
    found = (re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.MULTILINE) for source in cells(notebook, "code"))
    return next((match[1] for match in found if match), "")


def page(path: Path) -> str:
    "A notebook's page, from the site's root."
    return f"/{path.as_posix()}"


def toctree(entries, caption: str = "") -> str:
    "Hidden: the sidebar shows it, and each page says in its own words what it leads to."
    return "\n".join(["```{toctree}", *[f":caption: {caption}"] * bool(caption), ":hidden:", ":maxdepth: 1", "", *entries, "```"])


def listing(paths) -> str:
    return "\n".join(f"- [{name}]({page(path)}): {link_names(summary)}" for path in paths for name, summary in [heading(path)])


# Papers

def systems() -> list[str]: return sorted(PAPERS, key=PAPERS.get)


def pages_of(system: str) -> list[Path]:
    "A paper's chapter, then the workbook's page with its tables and figures."
    return [path for room in ("systems", "workbook") for path in in_room(room) if path.stem.partition("_")[2] == system]


def chapter_of(system: str) -> Path:
    "Where a table's system is explained; `all` of them, where they stand together."
    return Path("workbook/14_together.ipynb") if system == "all" else pages_of(system)[0]


def paper_table() -> str:
    rows = ["| paper | system | chapter | | tables and figures |", "|---|---|---|---|---|"]
    for system in systems():
        chapter, *others = pages_of(system)
        (name, summary), stored = heading(chapter), [table for table, path in stored_tables(ROOT / "results").items() if path.stem.startswith(f"{system}_")]
        shown = [f"[{heading(path)[0].partition(': ')[2] or heading(path)[0]}]({page(path)})" for path in others]
        shown += [f"[{title(table).partition(', ')[2]}](/results/{table}.md)" for table in stored]
        rows.append(f"| {PAPERS[system]} | `{system}` | [{name}]({page(chapter)}) | {summary} | {', '.join(shown)} |")
    tree = toctree([page(path).removesuffix(".ipynb") for system in systems() for path in pages_of(system)])
    return "\n".join([*rows, "", tree])


def open_questions() -> str:
    "All tables `What the paper leaves open`; a system without one is an error."
    parts = []
    for system in systems():
        chapter = pages_of(system)[0]
        found = next((match[1] for text in cells(chapter, "markdown") if (match := OPEN.search(text))), "")
        if "|---" not in found: raise ValueError(f"nbs/{chapter} has no table under '## What the paper leaves open'.")
        parts += [f"## Paper {PAPERS[system]}: {heading(chapter)[0]}", f"From [the chapter of `{system}`]({page(chapter)}#what-the-paper-leaves-open).",
                  link_names(found.strip())]
    return "\n\n".join(parts)


# Rooms

def room_page(room: str, words: str) -> str:
    "A room: what it is for, and its notebooks. Those of a paper stand under the papers in the sidebar."
    papers = {path for system in systems() for path in pages_of(system)}
    return f"{words}\n\n{listing(in_room(room))}\n\n{toctree([page(path).removesuffix('.ipynb') for path in in_room(room) if path not in papers])}\n"


def contents() -> str:
    "The site's table of contents, for the start page."
    first = [path.stem for path in notebooks() if path.parent == Path(".") and path.stem not in ("index", "99_cli")]
    return "\n\n".join([toctree([*first, "howto"], "Begin"), toctree(["papers", "open", "results/index"], "Papers"),
                        toctree([*(f"rooms/{room}" for room in ROOMS), "99_cli"], "Rooms"), toctree(["api/index", "glossary", "about", "cite"], "Look up")])
