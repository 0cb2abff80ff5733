"""Every figure in results/ comes out of the records beside it, and one that does not is refused."""

import json
import shutil
from pathlib import Path

import pytest

from crossmodal.workbook.tables import COLUMNS, TABLES, UnbackedFigure, check_table, find_table, read_table, table_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FOLDERS = [".", *sorted({path.parent.name for path in RESULTS.glob("*/*.csv")})]        # other data than the main ones have a folder of their own
STORED = {f"{folder}/{table_name(*key)}.csv": key for folder in FOLDERS for key in TABLES if (RESULTS / folder / f"{table_name(*key)}.csv").exists()}
PRINTED = ("Inception Score (inception_v3)", "FID (inception_v3)")    # by a judge that no stored run has
ALL = [pytest.param(name, id=name.removesuffix(".csv").removeprefix("./")) for name in STORED]


@pytest.fixture
def copy(tmp_path) -> Path:
    "A copy of results/ that a test may spoil."
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def test_every_file_is_a_table_that_is_known():
    assert set(RESULTS.rglob("*.csv")) == {RESULTS / name for name in STORED}
    assert {("embedmap", "1"), ("embedmap", "speakers")} <= set(STORED.values())


@pytest.mark.parametrize("name", ALL)
def test_every_stored_figure_is_backed(name):
    table = check_table(find_table(*STORED[name]), RESULTS / name)
    missing = table[table["ours"].isna()]
    assert list(table.columns) == COLUMNS and missing["runs"].fillna("").eq("").all()
    assert set(missing["metric"]) <= {"METEOR (%)", "human score (1 to 4)", *PRINTED}     # measured where Java is, and where people were asked


def test_the_front_page_shows_what_the_tables_say():
    "README.md holds the outputs of nbs/index.ipynb as they were stored; here its cell is run again."
    [cell] = [cell for cell in json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    shown, source = [], "".join(cell["source"]).replace("../results", str(RESULTS))
    exec(source.replace("import HTML, display", "import HTML"), {"display": shown.append})
    assert len(shown) == 1 and shown[0].data in (ROOT / "README.md").read_text()


def test_every_record_is_named_by_a_table():
    named = {RESULTS / Path(name).parent / "runs" / f"{run}.json" for name in STORED for cell in read_table(RESULTS / name)["runs"].dropna()
             for run in cell.split()}
    assert set(RESULTS.rglob("runs/*.json")) == named


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("column, value", [("ours", 99.9), ("low", 0.1), ("n", 1), ("chance", 77.0), ("preset", "paper"), ("data", "other")])
def test_an_altered_figure_is_refused(copy, name, column, value):
    path = copy / name
    table = read_table(path)
    table.loc[0, column] = value
    table.to_csv(path, index=False)
    with pytest.raises(UnbackedFigure, match=f"{column} is {value}"):
        check_table(find_table(*STORED[name]), path)


def test_a_record_of_another_row_is_refused(copy):
    path = copy / "embedmap_table1.csv"
    table = read_table(path)
    rows = table["row"] == "Proposed (mlp-ae)"
    table.loc[rows, "runs"] = table.loc[table["row"] == "Proposed (mlp-vae)", "runs"].values
    table.to_csv(path, index=False)
    with pytest.raises(UnbackedFigure, match="does not answer this cell"):
        check_table(find_table("embedmap", "1"), path)


def test_an_altered_record_is_refused(copy):
    record = next(iter(sorted((copy / "runs").glob("embedmap-mnist-*.json"))))
    text = record.read_text()
    start = text.index('"text_psnr": {"values": [') + len('"text_psnr": {"values": [')
    record.write_text(text[:start] + "60.0, " + text[text.index(", ", start) + 2:])
    with pytest.raises(UnbackedFigure):
        for name, key in STORED.items(): check_table(find_table(*key), copy / name)


def test_a_missing_line_is_refused(copy):
    path = copy / "embedmap_table1.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UnbackedFigure, match="lacks 1 cells"):
        check_table(find_table("embedmap", "1"), path)
