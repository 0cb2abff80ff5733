"""The workbook's tools without a browser: every system through its abilities, what is kept, what is refused, what may stand in a page."""

import io
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import crossmodal
from crossmodal.data.captioned import open_dataset
from crossmodal.data.digits import MNIST_FILES
from crossmodal.metrics.reading import DigitReader
from crossmodal.systems.base import ABILITIES, Score, abilities
from crossmodal.systems.experiments import SYSTEMS, train
from crossmodal.training.runs import RunError
from crossmodal.workbook import explorers, plots, tables, together
from crossmodal.workbook.explorers import Explorer, Interpolation, Watch, between, index_gallery, interpolation_film, read_metrics, read_upload
from crossmodal.workbook.plots import Film, Gallery, Things, codes_by_epoch, embedding_map, lay_out, open_gallery, who_can
from crossmodal.workbook.tables import COLUMNS, SORT, TableView, all_systems, answer, as_latex, as_markdown, build_table, check_table, table_html, write_table

QUICKEST = {"selfsup": {}, "embedmap": {"autoencoder": "mlp-ae"}, "embedmap-direct": {}, "gxn": {"model": "t2i"}, "laviter": {"model": "txt2img"},
            "sdn": {"model": "image"}, "selfsup-baseline": {"autoencoder": "com-rec"}}
STRANGE = "</script><img src=x onerror=alert(1)> & \"q\" 'p' \u2028 |"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A finished run of every system, each a second or a few long."
    place = tmp_path_factory.mktemp("runs")
    return {name: train(name, preset="smoke", out=place / name, changes=changes, quiet=True) for name, changes in QUICKEST.items()}


@pytest.fixture(scope="module")
def systems(runs): return {name: crossmodal.load(run.folder) for name, run in runs.items()}


@pytest.fixture(scope="module")
def galleries():
    birds, digits = open_gallery("birds", side=64, per_species=3), Gallery(open_dataset("digits", "test", per_number=2))
    return {name: digits if SYSTEMS[name].home == "digits" else birds for name in SYSTEMS}


class Tags(HTMLParser):
    "The elements of a page, in order; scripts are text."
    def __init__(self, text):
        super().__init__()
        self.found, self.alts, self.handlers = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append(tag)
        if tag == "img": self.alts.append(dict(attributes).get("alt"))
        self.handlers |= {value for name, value in attributes if name.startswith("on")}


def question_for(gallery): return gallery.captions[1][0]


# ---- through abilities, whatever the system

def test_every_system_is_among_the_quick_ones(): assert set(QUICKEST) == set(SYSTEMS)


@pytest.mark.parametrize("name", QUICKEST)
def test_an_explorer_answers_or_says_what_is_missing(systems, galleries, name):
    system, gallery = systems[name], galleries[name]
    explorer = Explorer({name: system}, gallery)
    able = abilities(system)
    for question in (question_for(gallery), 2, gallery.images([0])[0]):
        answer_ = explorer.make(question, explorer.find(question))[name]
        kind = "embeds sentences" if isinstance(question, str) else "embeds pictures"
        assert bool(answer_.pictures) == (kind in able and "embeds pictures" in able)
        assert bool(answer_.sentences) == (kind in able and "embeds sentences" in able)
        makes = "sentence to picture" if isinstance(question, str) else "picture to sentence"
        if makes not in able: assert any("that takes a run of" in line or "Take a run of" in line for line in answer_.missing)
        assert answer_.pictures or answer_.drawn or answer_.written or answer_.missing
    assert Tags(explorer._repr_html_()).found.count("details") == 4


@pytest.mark.parametrize("name", QUICKEST)
def test_a_walk_is_drawn_or_shown_or_refused(systems, galleries, name):
    system, gallery = systems[name], galleries[name]
    able = abilities(system)
    ends = question_for(gallery), gallery.captions[-1][0]
    if "embeds sentences" not in able:
        with pytest.raises(ValueError, match="Take a run of"): between(system, *ends, 3, gallery)
        return
    rows, said = between(system, *ends, 3, gallery)
    assert ("drawn" in rows) == ("embedding to picture" in able) and "nearest picture" in rows and len(said) == 3
    assert not any(said) or "embedding to sentence" in able
    rows, _ = between(system, 0, ends[1], 3, gallery)                               # a picture and a sentence
    assert all(len(frames) == 3 for frames in rows.values())


@pytest.mark.parametrize("name", QUICKEST)
def test_a_map_of_pictures_sentences_and_words(systems, galleries, name):
    system, gallery = systems[name], galleries[name]
    things = Things(gallery, range(12), range(0, 12, 2), gallery.captions[0][:1])
    if "embeds pictures" not in abilities(system):
        with pytest.raises(ValueError, match="Take a run of"): things.codes(system)
        return
    shown = embedding_map(things, things.codes(system))
    data = shown.data()
    assert len(data["kind"]) == 19 and data["kind"].count(1) == 6 and len(data["frames"][0]["xy"]) == 38
    assert all(name for name in (entry["name"] for entry in data["classes"]))


@pytest.mark.parametrize("name", QUICKEST)
def test_words_of_the_own_table(systems, galleries, name):
    system = systems[name]
    words = [word for word in system.vocabulary.words if not word.startswith("<")][:8]
    things = Things(galleries[name], words=words, table=True)
    if "embeds words" in abilities(system): assert len(things.codes(system)) == 8
    else:
        with pytest.raises(ValueError, match="embed_words"): things.codes(system)


def test_every_ability_is_somebody_s(): assert all(who_can(ability) for ability in ABILITIES)


def test_own_scores_and_cosines_find_the_same_order_as_the_system(systems, galleries):
    system, gallery = systems["gxn"], galleries["gxn"]
    index, code = index_gallery(system, gallery), system.embed_texts([question_for(gallery)])
    found = explorers.find_nearest(system, index, gallery, question_for(gallery), 5)
    assert [row for row, _ in found.pictures] == system.similarity(index.images, code)[:, 0].topk(5).indices.tolist()


# ---- what is kept

def test_an_index_is_computed_once_and_again_for_other_weights(runs, galleries, monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSMODAL_CACHE", str(tmp_path))
    system, gallery, calls = crossmodal.load(runs["embedmap"].folder), galleries["embedmap"], []
    original = type(system).embed_images
    monkeypatch.setattr(type(system), "embed_images", lambda self, images: calls.append(len(images)) or original(self, images))
    first = index_gallery(system, gallery)
    assert sum(calls) == len(gallery)
    assert torch.equal(index_gallery(system, gallery).images, first.images) and sum(calls) == len(gallery)
    with torch.no_grad(): system.normalize.mean.add_(1.) if hasattr(system.normalize, "mean") else next(system.autoencoder.parameters()).add_(.1)
    index_gallery(system, gallery)
    assert sum(calls) == 2 * len(gallery)


@pytest.mark.parametrize("name", ["gxn", "laviter", "sdn", "embedmap"])
def test_codes_of_a_training_that_is_done_again_end_where_it_ended(runs, galleries, name, monkeypatch, tmp_path):
    things = Things(galleries[name], range(6), range(6))
    record = (runs[name].folder / "run.json").read_text()
    epochs = codes_by_epoch(runs[name].folder, things)
    last = list(epochs)[-1]
    assert list(epochs)[0] == "before training" and torch.allclose(epochs[last], things.codes(crossmodal.load(runs[name].folder)), atol=1e-5)
    assert (runs[name].folder / "run.json").read_text() == record                   # nothing was written to the run
    monkeypatch.setattr(plots, "train_again", lambda *_: pytest.fail("trained twice"))
    assert list(codes_by_epoch(runs[name].folder, things)) == list(epochs)
    later = json.loads(record) | {"started": "2100-01-01T00:00:00+00:00"}          # of the same name, perhaps by other code: its codes are its own
    (shutil.copytree(runs[name].folder, tmp_path / runs[name].name) / "run.json").write_text(json.dumps(later))
    with pytest.raises(pytest.fail.Exception, match="trained twice"): codes_by_epoch(tmp_path / runs[name].name, things)


# ---- what may stand in a page

def strange(gallery):
    "The same gallery, with captions and classes that nobody should trust."
    copy = Gallery.__new__(Gallery)
    copy.__dict__ |= gallery.__dict__ | {"captions": [(STRANGE,)] * len(gallery), "sentences": [STRANGE] * len(gallery.sentences),
                                         "class_names": [STRANGE] * len(gallery.class_names)}
    return copy


def test_no_text_can_break_out_of_a_page(systems, galleries):
    gallery = strange(galleries["gxn"])
    explorer = Explorer({STRANGE: systems["gxn"]}, galleries["gxn"])
    explorer.gallery, explorer.examples = gallery, [STRANGE, 1]
    table = pd.DataFrame([[STRANGE, STRANGE, STRANGE, 1., 2., 1.5, 2.5, 3, .1, "0", "smoke", STRANGE, STRANGE]], columns=COLUMNS)
    pages = {"map": plots.EmbeddingMap(Things(gallery, range(6), range(2), (STRANGE,)), {STRANGE: np.random.default_rng(0).normal(size=(9, 2))})._repr_html_(),
             "film": Film({STRANGE: galleries["gxn"].images([0, 1])}, [STRANGE, STRANGE])._repr_html_(), "explorer": explorer._repr_html_(),
             "table": table_html(table, STRANGE)}
    for kind, text in pages.items():
        tags = Tags(text)
        assert tags.found.count("script") == (kind == "map"), kind
        assert all(tags.alts), f"{kind}: a picture without words for those who do not see it"
        assert tags.handlers <= {plots.FILM_MOVE, SORT}, kind


def test_pages_ask_no_network(systems, galleries):
    explorer = Explorer({"gxn": systems["gxn"]}, galleries["gxn"])
    shown = embedding_map(Things(galleries["gxn"], range(8)), torch.randn(8, 4))
    for text in (explorer._repr_html_(), shown._repr_html_()): assert not re.findall(r"(?:src|href)=[\"']?https?:|url\([\"']?https?:|@import|fetch\(", text)


def test_a_map_of_thousands_is_small_enough_to_carry():
    gallery = open_gallery("birds", "train", side=64, per_species=30)
    rows = range(len(gallery))
    text = plots.EmbeddingMap(Things(gallery, rows), {"one": np.random.default_rng(0).normal(size=(len(rows), 2))}, tile=32)._repr_html_()
    assert len(text) / len(rows) < 1200                                              # bytes a point, its picture and two captions included


# ---- limits and faults

def test_layouts(one_thread):
    codes = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    a, b = lay_out(codes, seed=1), lay_out(codes, seed=1)
    assert np.array_equal(a, b)
    again = lay_out(codes, start=a)
    assert np.corrcoef(a[:, 0], again[:, 0])[0, 1] > .8                              # begun where the last one ended, and not turned
    with pytest.raises(ValueError, match="choose t-SNE or UMAP"): lay_out(codes, "PCA")


def test_uploads_of_all_kinds():
    for mode, size in (("RGBA", (40, 30)), ("L", (20, 90)), ("P", (64, 64)), ("CMYK", (30, 30))):
        file = io.BytesIO()
        Image.new(mode, size, 200 if mode in "LP" else None).save(file, "PNG" if mode != "CMYK" else "TIFF")
        for shape in ((3, 64, 64), (1, 28, 56)):
            found = read_upload(file.getvalue(), shape)
            assert tuple(found.shape) == shape and -1 <= found.min() and found.max() <= 1
    with pytest.raises(ValueError, match="not a picture"): read_upload(b"\x89PNG torn", (3, 8, 8))


def test_a_tool_shows_itself_with_and_without_a_kernel(runs, systems, galleries):
    gallery = galleries["sdn"]
    tools = [Explorer({"sdn": systems["sdn"]}, gallery), Interpolation({"sdn": systems["sdn"]}, *gallery.captions[0][:2], gallery), Watch(runs["sdn"].folder)]
    for tool in tools:
        bundle = tool._repr_mimebundle_()
        assert {"text/html", "application/vnd.jupyter.widget-view+json"} <= set(bundle) and "<" in bundle["text/html"]


def test_walks_refuse_what_they_cannot_do(systems, galleries):
    with pytest.raises(ValueError, match="no. 9999"): between(systems["sdn"], 9999, "a bird", 3, galleries["sdn"])
    with pytest.raises(ValueError, match="give a gallery"): between(systems["sdn"], 0, "a bird", 3)
    with pytest.raises(ValueError, match="Take a run of embedmap"): interpolation_film({"sdn": systems["sdn"]}, torch.zeros(2, 13), "a bird", 3)


def test_watching_a_folder_at_every_stage(runs, tmp_path):
    assert "nothing yet" in Watch(tmp_path / "later")._repr_html_()
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "run.json").write_text((runs["gxn"].folder / "run.json").read_text().replace('"finished"', '"running"'))
    assert "no figures yet" in Watch(folder)._repr_html_()
    lines = (runs["gxn"].folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines[:-20])                               # torn in the last line
    assert 0 < len(read_metrics(folder)) < len(read_metrics(runs["gxn"].folder)) and "<img" in Watch(folder)._repr_html_()


# ---- tables

def test_a_table_can_be_taken_along(tmp_path):
    row = ["a_b & c|d", "x -> y", "hits (%)", 50., 61.234, 60., 62., 7, 10., "0 1", "quick", "birds", "r1 r2"]
    table = pd.DataFrame([row], columns=COLUMNS)
    assert as_markdown(table).splitlines()[2:] == ["|  | x -> y |", "| --- | --- |", "| a_b & c\\|d | 61.2 [60.0, 62.0] (50) |"]
    assert r"a\_b \& c|d & 61.2 [60.0, 62.0] (50) \\" in as_latex(table) and r"\caption{hits (\%); seeds 0 1, n 7, ignoring its input 10}" in as_latex(table)
    text = table_html(table, "mine")
    assert 'download="mine.csv"' in text and "\u25b2" in text and "2 runs behind it" in text


def test_nothing_is_trained_for_cells_that_these_data_cannot_have(tmp_path, monkeypatch):
    "Table 4 has two figures of an Inception's judgement, of photographs only. They are no reason to train the whole model on birds a second time."
    asked = []

    def train(system, data, preset, place, wanted, quiet):
        asked.append(wanted)
        return SimpleNamespace(record={"system": system, "scores": {}})
    monkeypatch.setattr(tables, "train", train)
    answer(tables.laviter_table4(), preset="smoke", folder=tmp_path, quiet=True)
    assert [(wanted["model"], wanted["judge"]) for wanted in asked] == [(model, "efficientnet_lite0") for model in ("tim", "txt2img", "full")]
    assert len(tables.questions(tables.possible(tables.laviter_table4(), ["coco2014"]))) == 4


def test_all_systems_stand_on_records_like_any_table(tmp_path, monkeypatch):
    monkeypatch.setitem(together.SAME, "birds", together.SAME["birds"] | {"per_species": 5})        # 50 pictures instead of 400
    cells = [cell for cell in all_systems("birds") if cell.system == "sdn"]
    done = answer(cells, preset="smoke", folder=tmp_path / "runs", quiet=True)
    table = build_table(cells, [run.record for run in done])
    assert table["ours"].notna().all() and set(table["data"]) == {"birds"}
    path = write_table(table, done, "all_birds", tmp_path / "results")
    assert len(check_table(cells, path)) == len(cells)
    stored = json.loads((tmp_path / "results" / "runs" / f"{done[0].name}.json").read_text())
    assert {"shared FID", "drawn SSIM"} <= set(stored["scores"])                     # beside its own
    assert [run.name for run in answer(cells, preset="smoke", folder=tmp_path / "runs", quiet=True)] == [run.name for run in done]
    view = TableView(cells, [run.record for run in done])
    assert len(view.labels) == 1
    [run], record = done, done[0].record
    assert record["shared_on"]["pictures"] == len(record["scores"]["shared kind, picture to sentence"]["values"]) == 50       # though it learned from 3 of each

    # measured on other pictures: measured again; on unknown ones: no figure; a mix: refused
    good = record["scores"]["shared FID"]
    stale = {"shared FID": {"values": [1.], "unit": "", "chance": None, "n": 3}}
    run.save(shared_on=record["shared_on"] | {"fingerprint": "other"}, scores=record["scores"] | stale)
    again = answer(cells, preset="smoke", folder=tmp_path / "runs", quiet=True)[0].record
    assert again["scores"]["shared FID"]["n"] == 50 and again["scores"]["shared FID"]["values"] == pytest.approx(good["values"], rel=1e-3)
    assert build_table(cells, [{key: value for key, value in again.items() if key != "shared_on"}])["ours"].isna().all()
    other = again | {"id": "other", "system": "gxn", "config": again["config"] | {"model": "i2t+t2i", "hardest": False},
                     "shared_on": again["shared_on"] | {"fingerprint": "other"}}
    build_table(all_systems("birds"), [again, other | {"shared_on": again["shared_on"]}])
    with pytest.raises(RunError, match="different pictures"): build_table(all_systems("birds"), [again, other])


def test_a_folder_of_digits_is_one_test_for_all(tmp_path, monkeypatch):
    "What is overruled goes by what lies in the folder, not by how it was typed; the reader learns from that folder too."
    folder, rng, read = tmp_path / "mine", np.random.default_rng(0), []
    folder.mkdir()
    for (pictures, labels), count in zip(MNIST_FILES.values(), (200, 100)):
        for name, values in ((pictures, rng.integers(0, 256, (count, 28, 28))), (labels, np.arange(count) % 10)):
            head = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes()
            (folder / name).write_bytes(head + values.astype(np.uint8).tobytes())
    monkeypatch.setenv("CROSSMODAL_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(together, "digit_reader", lambda source: read.append(source) or DigitReader())
    monkeypatch.setattr(together, "fidelity_scores", lambda drawn, real, judge: {f"fid ({judge})": Score([0.], "", n=len(drawn))})
    cells = [cell for cell in all_systems("digits") if cell.system in ("embedmap", "sdn")]
    runs = answer(cells, str(folder), "smoke", folder=tmp_path / "runs", quiet=True)
    assert [run.record["shared_on"]["pictures"] for run in runs] == [160, 160] and runs[0].record["shared_on"] == runs[1].record["shared_on"]
    assert set(read) == {str(folder)} and build_table(cells, [run.record for run in runs])["ours"].notna().all()
