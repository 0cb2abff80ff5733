"""Every figure in results/ comes out of the records beside it, and one that does not is refused."""

import json
import shutil
from pathlib import Path

import pytest

from crossmodal.workbook.tables import COLUMNS, TABLES, UnbackedFigure, check_table, find_table, read_table, table_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
STORED = [key for key in TABLES if (RESULTS / f"{table_name(*key)}.csv").exists()]      # a table of a system that is not measured yet has no file
PRINTED = ("Inception Score (inception_v3)", "FID (inception_v3)")    # by a judge that no stored run has
ALL = [pytest.param(key, id=table_name(*key)) for key in STORED]


@pytest.fixture
def copy(tmp_path) -> Path:
    "A copy of results/ that a test may spoil."
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def test_every_file_is_a_table_that_is_known():
    assert {path.stem for path in RESULTS.glob("*.csv")} == {table_name(*key) for key in STORED}
    assert {("embedmap", "1"), ("embedmap", "speakers")} <= set(STORED)


@pytest.mark.parametrize("key", ALL)
def test_every_stored_figure_is_backed(key):
    table = check_table(find_table(*key), RESULTS / f"{table_name(*key)}.csv")
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
    named = {name for key in STORED for cell in read_table(RESULTS / f"{table_name(*key)}.csv")["runs"].dropna() for name in cell.split()}
    assert {path.stem for path in (RESULTS / "runs").glob("*.json")} == named


@pytest.mark.parametrize("key", ALL)
@pytest.mark.parametrize("column, value", [("ours", 99.9), ("low", 0.1), ("n", 1), ("chance", 77.0), ("preset", "paper"), ("data", "other")])
def test_an_altered_figure_is_refused(copy, key, column, value):
    path = copy / f"{table_name(*key)}.csv"
    table = read_table(path)
    table.loc[0, column] = value
    table.to_csv(path, index=False)
    with pytest.raises(UnbackedFigure, match=f"{column} is {value}"):
        check_table(find_table(*key), path)


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
        for key in STORED:
            check_table(find_table(*key), copy / f"{table_name(*key)}.csv")


def test_a_missing_line_is_refused(copy):
    path = copy / "embedmap_table1.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UnbackedFigure, match="lacks 1 cells"):
        check_table(find_table("embedmap", "1"), path)
