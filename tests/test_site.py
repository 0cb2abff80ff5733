"How notebooks become pages: links, names, outputs, reference, and the check that finds a broken link. Building the whole site is `make docs`."
import ast
import configparser
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from execnb.nbio import dict2nb, mk_cell

from crossmodal.workbook.tables import read_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import build  # noqa: E402
import chapters  # noqa: E402
import house  # noqa: E402
import reference  # noqa: E402

NBS = ROOT / "nbs"


# Links

def test_links_between_notebooks_are_pages_and_anchors_are_spelt_as_headings_are():
    here = NBS / "losses/03_ranking.ipynb"
    assert chapters.site_link("../metrics/01_retrieval.ipynb", here) == "/metrics/01_retrieval.ipynb"
    assert chapters.site_link("#What-the-paper-leaves-open", here) == "#what-the-paper-leaves-open"
    assert chapters.site_link("https://arxiv.org/abs/1710.04087", here) == "https://arxiv.org/abs/1710.04087"


def test_links_of_the_start_page_begin_at_the_projects_folder():
    assert chapters.site_link("nbs/systems/02_embedmap.ipynb", NBS / "index.ipynb") == "/systems/02_embedmap.ipynb"
    assert chapters.site_link("CITATION.cff", NBS / "index.ipynb") == "/cite.md"
    assert re.match(r"https://.*/tree/main/results$", chapters.site_link("results", NBS / "index.ipynb"))


def test_a_link_to_nothing_stops_the_build():
    with pytest.raises(ValueError, match="03_ranking.ipynb links to 'nothing.ipynb'"): chapters.site_link("nothing.ipynb", NBS / "losses/03_ranking.ipynb")


def test_every_link_of_every_notebook_leads_somewhere():
    for notebook in house.notebooks():
        for text in house.cells(notebook, "markdown"): chapters.link_pages(text, NBS / notebook)


# Names

@pytest.mark.parametrize("before, after", [
    ("see `order_similarity`", "see {py:obj}`order_similarity <crossmodal.metrics.retrieval.order_similarity>`"),
    ("`losses.ranking`.", "{py:mod}`losses.ranking <crossmodal.losses.ranking>`."),
    ("`Batch` or `System.phases`", "{py:obj}`Batch <crossmodal.data.batch.Batch>` or {py:obj}`System.phases <crossmodal.systems.base.System.phases>`"),
    ("`mean_opinion()`", "{py:obj}`mean_opinion() <crossmodal.metrics.human.mean_opinion>`"),
    ("the split `train`", "the split `train`"),                         # a function too, but who knows
    ("[`order_similarity`](x.md)", "[`order_similarity`](x.md)"),       # a link already
    ("## `order_similarity`", "## `order_similarity`"),
    ("    `order_similarity`", "    `order_similarity`"),
    ("{py:obj}`order_similarity`", "{py:obj}`order_similarity`"),
    ("`no_such_name`", "`no_such_name`"),
])
def test_names_in_backticks_lead_to_the_reference(before, after): assert chapters.link_names(before) == after


def test_names_in_code_blocks_stay():
    text = "```python\n`order_similarity`\n```\n`order_similarity`"
    assert chapters.link_names(text).count("{py:obj}") == 1


# Outputs

def processed(*cells, widgets=None):
    "A notebook of these cells as the site shows it."
    nb = dict2nb(cells=list(cells), metadata={"notebook": "losses/03_ranking.ipynb"} | ({"widgets": {chapters.STATE: {"state": widgets}}} if widgets else {}),
                 nbformat=4, nbformat_minor=5)
    chapters.Chapters()(nb)
    return nb


def with_outputs(source, *outputs):
    cell = mk_cell(source)
    cell.outputs = list(outputs)
    return cell


def view(id): return {"output_type": "display_data", "metadata": {}, "data": {chapters.VIEW: {"model_id": id}, "text/plain": "widget"}}


MODELS = {"bar": {"model_name": "HBoxModel", "state": {"children": ["IPY_MODEL_fill"]}}, "fill": {"model_name": "FloatProgressModel", "state": {}},
          "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_slider"]}}, "slider": {"model_name": "IntSliderModel", "state": {"value": 3}}}


def test_progress_bars_and_stderr_go_and_other_widgets_stay():
    stream = lambda name: {"output_type": "stream", "name": name, "text": "words"}
    nb = processed(mk_cell("# A", "markdown"), with_outputs("1", view("bar"), view("box"), view("lost"), stream("stderr"), stream("stdout")), widgets=MODELS)
    outputs = nb.cells[-1].outputs
    assert [output.get("name") or output.data[chapters.VIEW]["model_id"] for output in outputs] == ["box", "stdout"]
    assert set(nb.metadata["widgets"][chapters.STATE]["state"]) == {"box", "slider"}


def test_controls_go_where_html_stands_beside_them():
    "`ShownTwice` offers both, and myst-nb would show the controls, which move nothing without a kernel."
    both = view("box")
    both["data"]["text/html"] = "<p>answers</p>"
    nb = processed(mk_cell("# A", "markdown"), with_outputs("1", both), widgets=MODELS)
    assert set(nb.cells[-1].outputs[0].data) == {"text/plain", "text/html"} and "widgets" not in nb.metadata


@pytest.mark.parametrize("source, shows", [
    ("x = 1\nx", True), ("if x: print(x)", True), ("fig, ax = plt.subplots()\nax.plot(x);", True), ("for x in y: display(x)", True), ("%time f()\nx", True),
    ("x = 1", False), ("f(x);", False), ("test_eq(x, 1)", False), ("def f(): print(1)", False), ("f = lambda: print(1)", False), ("", False),
    ("#| hide\nx", False), ("#| export\nx", False), ("#| eval: false\nx", False), ("#| hide_input\nx", True)])
def test_what_shows_something_is_told_by_its_source(source, shows):
    assert build.lacks_output(nbformat.v4.new_code_cell(source)) == shows
    assert not build.lacks_output(nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output("stream", text="1")]))


def test_a_notebook_with_gaps_is_run_and_keeps_what_is_stored(tmp_path, monkeypatch):
    "The figures of a paper's page are of long runs; what the site draws into its gaps is of short ones, and says so."
    (tmp_path / "workbook").mkdir()
    monkeypatch.setattr(build, "NBS", tmp_path)
    code, stream = nbformat.v4.new_code_cell, lambda text: nbformat.v4.new_output("stream", text=text)
    cells = [code("print(1)", outputs=[stream("stored")]), code("x = 1"), code("x")]
    for name in ("02_embedmap", "00_pictures"): nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"workbook/{name}.ipynb")

    def execute(path, environment):
        content = nbformat.read(path, as_version=4)
        content.cells[0].outputs, content.cells[2].outputs = [stream("run")], [nbformat.from_dict(view("box"))]
        content.metadata.widgets = {chapters.STATE: {"state": MODELS}}
        return content
    monkeypatch.setattr(build, "execute", execute)
    for _ in range(2):                      # run, and kept
        nb = build.executed(Path("workbook/02_embedmap.ipynb"), tmp_path / "kept", "code")
        assert nb.cells[0].outputs[0].text == "stored" and not nb.cells[1].outputs and nb.metadata.widgets[chapters.STATE].state == MODELS
        words, value = nb.cells[2].outputs
        assert "preset `smoke`" in words.data["text/markdown"] and chapters.VIEW in value.data
    nb = build.executed(Path("workbook/00_pictures.ipynb"), tmp_path / "kept", "code")
    assert nb.cells[0].outputs[0].text == "stored" and len(nb.cells[2].outputs) == 1


def test_what_is_hidden_goes_and_what_is_exported_stays():
    nb = processed(mk_cell("# A", "markdown"), mk_cell("#| default_exp losses.ranking"), mk_cell("#| hide\nsecret = 1"),
                   mk_cell("#| export\nimport os\nimport re"), mk_cell("#| export\ndef order_scores(): ..."),
                   mk_cell("#| echo: false\nprint(1)"), mk_cell("#| hide_input\nprint(2)"))
    text = [cell.source for cell in nb.cells]
    assert not any("secret" in source or "#|" in source for source in text)
    assert "(def-losses.ranking.order_scores)=" in text and "def order_scores(): ..." in text and any("crossmodal.losses.ranking" in source for source in text)
    tags = {cell.source: cell.metadata.get("tags", []) for cell in nb.cells}
    assert tags["import os\nimport re"] == ["hide-input"] and tags["print(1)"] == tags["print(2)"] == ["remove-input"]


def test_a_figure_is_named_after_its_section():
    png = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "aa"}}
    nb = processed(mk_cell("# A", "markdown"), mk_cell("## The `$k$` best", "markdown"), with_outputs("1", png))
    assert nb.cells[-1].metadata["mystnb"]["image"]["alt"] == "Figure: The k best"


# Reference

def test_a_signature_keeps_its_shapes():
    node = ast.parse('def f(self, x: Float[Tensor, "n d"], *, k: int = 3) -> Float[Tensor, "n k"]: ...').body[0]
    assert reference.signature(node, bound=True) == "(x: Float[Tensor, 'n d'], *, k: int=3) -> Float[Tensor, 'n k']"


def test_the_page_of_a_module_has_shapes_comments_and_source():
    text = reference.page("losses.ranking", ROOT / "crossmodal/losses/ranking.py", "losses/03_ranking.ipynb", "One line.")
    assert ":::{py:function} ranking_loss(scores: Float[Tensor, 'n n']" in text
    assert "| `margin` | `float` | alpha; in units of the scores |" in text
    assert "def ranking_loss(" in text and "(#def-losses.ranking.ranking_loss)" in text


def test_fields_of_a_configuration_are_listed_with_their_comments():
    text = reference.page("systems.gxn", ROOT / "crossmodal/systems/gxn.py", "systems/03_gxn.ipynb", "")
    assert "| `hidden` | `Count` | `1024` |" in text


# The house

def test_every_notebook_has_a_title_and_a_place():
    placed = "\n".join([house.contents(), house.paper_table(), *(house.room_page(room, "") for room in house.ROOMS), build.how_to(house)])
    for notebook in house.notebooks():
        assert house.heading(notebook)[0]
        entry = notebook.with_suffix("").as_posix()
        if entry != "index": assert re.search(rf"^/?{re.escape(entry)}$", placed, re.MULTILINE), f"{notebook} is in no table of contents"


def test_all_open_questions_are_gathered():
    text = house.open_questions()
    for system in house.PAPERS: assert f"the chapter of `{system}`" in text
    assert len(re.findall(r"^\|---", text, re.MULTILINE)) == len(house.PAPERS) and "`reverse=True`" in text


def test_every_stored_table_has_a_chapter():
    for csv in (ROOT / "results").rglob("*.csv"): assert (NBS / house.chapter_of(csv.stem.partition("_")[0])).exists()


def test_tables_of_all_systems_and_of_other_data_have_pages(tmp_path, monkeypatch):
    (tmp_path / "results/runs").mkdir(parents=True)
    table = read_table(ROOT / "results/embedmap_speakers.csv").assign(runs=None)
    table.to_csv(tmp_path / "results/all_digits.csv", index=False)
    (tmp_path / "results/cub").mkdir()
    table.to_csv(tmp_path / "results/cub/sdn_table3.csv", index=False)                  # of other data than the main ones
    monkeypatch.setattr(build, "ROOT", tmp_path)
    build.write_results(tmp_path / "pages", tmp_path / "extra", house)
    text = (tmp_path / "pages/all_digits.md").read_text(encoding="utf-8")
    assert text.startswith("# all systems, digits") and "](/workbook/14_together.ipynb)" in text and (NBS / "workbook/14_together.ipynb").exists()
    assert (tmp_path / "pages/cub/sdn_table3.md").read_text(encoding="utf-8").startswith("# sdn, table 3, of cub")
    listed = (tmp_path / "pages/index.md").read_text(encoding="utf-8")
    assert "[all systems, digits](all_digits.md)" in listed and "[sdn, table 3, of cub](cub/sdn_table3.md)" in listed


# Links of a built site

def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="b.html#here">b</a><a href="b.html#gone">b</a><a href="c.html">c</a><a href="#top">a</a>'
                                     '<a href="https://example.org">out</a><img src="p.png"><img src="data:image/png;base64,AA"><script src="https://cdn.example.org/x.js"></script>'
                                     '<link rel="stylesheet" href="//fonts.example.org/f.css">')
    (tmp_path / "b.html").write_text('<p id="here">B</p>')
    assert [problem.split(": ", 1)[1] for problem in build.broken_links(tmp_path)] == [
        "https://cdn.example.org/x.js: is loaded from a network", "//fonts.example.org/f.css: is loaded from a network",
        "p.png: no such file", "b.html#gone: no such place in the page", "c.html: no such file"]


# What is declared

def test_the_lock_file_of_npm_names_no_registry():
    packages = json.loads((ROOT / "docs/package-lock.json").read_text())["packages"]
    assert all("resolved" not in package for package in packages.values())
    assert all(package.get("integrity") for name, package in packages.items() if name)


def test_the_citation_agrees_with_the_settings():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == settings["DEFAULT"]["version"] and cited["repository-code"] == settings["DEFAULT"]["git_url"]
    assert len(cited["references"]) == len(house.PAPERS)
