"""Results, from what is stored: a page for each table in results/, the paper's figure beside ours, and the record of every run behind it."""
import html
import json
import re
from pathlib import Path

import pandas as pd

from crossmodal.systems.experiments import SYSTEMS
from crossmodal.workbook.tables import plot_table, read_table, readable

WORDS = Path(__file__).parent / "tables"    # what is to be said of a table, where something is


def stored_tables(results: Path) -> dict[str, Path]:
    "Name -> file of all tables: those of the main data, then those of others, which lie in a folder of their own (`cub/sdn_table3`)."
    files = [*sorted(results.glob("*.csv")), *sorted(results.glob("*/*.csv"))]
    return {path.relative_to(results).with_suffix("").as_posix(): path for path in files}


def title(name: str) -> str:
    "laviter_table2 -> laviter, table 2; cub/sdn_table3 -> sdn, table 3, of cub; all_birds -> all systems, birds"
    *data, stem = name.split("/")
    return ", of ".join([re.sub(r"^all_", "all systems_", re.sub(r"table(\d)", r"table \1", stem)).replace("_", ", ", 1), *data])


def listed(values: pd.Series) -> str: return "; ".join(sorted(values.dropna().unique()))


def result_page(name: str, csv: Path, chapter: str, pictures: Path) -> str:
    "Every measure of a stored table as text, and as a figure where the paper has one; then the records."
    table, stem = read_table(csv), csv.stem
    words, system = WORDS / f"{name}.md", stem.partition("_")[0]
    parts = [f"# {title(name)}", *([words.read_text(encoding="utf-8").strip()] if words.exists() else [])]
    about = "Beyond the papers, by measures that all systems share: [how](" if system == "all" else f"`{system}`, {SYSTEMS[system].title}: [its chapter]("
    parts.append(f"{about}/{chapter}). Data: {listed(table['data'])}; preset {listed(table['preset'])}. "
                 "A cell is ours, its 95 % interval in brackets, and the paper's figure in parentheses where there is one. "
                 f"As a file: <a href=\"{csv.name}\">{csv.name}</a>.")
    for k, metric in enumerate(dict.fromkeys(table["metric"])):
        lines = table[table["metric"] == metric]
        parts += [f"## {metric}", readable(table, metric).to_html(border=0)]
        if lines["ours"].notna().any() and (lines["paper"].notna().any() or k == 0):
            plot_table(table, metric).savefig(pictures / f"{stem}-{k}.png", dpi=80)
            beside = "beside the paper's" if lines["paper"].notna().any() else "with their intervals"
            parts.append(f"![{metric}: our figures {beside}]({stem}-{k}.png)")
    names = sorted({name for runs in table["runs"].dropna() for name in str(runs).split()})
    parts += ["## Records", "What each run was asked, on what it ran, and what came out: one JSON file each.",
              record_table([csv.parent / f"runs/{name}.json" for name in names])]
    return "\n\n".join(parts) + "\n"


def record_table(paths: list[Path]) -> str:
    "Runs, with what tells them apart."
    rows = []
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        people = record.get("study")            # asked; then nothing ran
        where = f"{people['raters']} raters" if people else ", ".join(record["machine"]["gpus"]) or f"{record['machine']['cores']} CPU cores"
        rows.append({"run": f'<a href="runs/{path.name}">{html.escape(path.stem)}</a>', "data": record["data"]["name"], "preset": record["preset"],
                     "seed": record["seed"], "minutes": "" if people else round(record["seconds"] / 60, 1), "machine": where,
                     "commit": "" if people else record["commit"]})
    return pd.DataFrame(rows).to_html(border=0, index=False, escape=False)
