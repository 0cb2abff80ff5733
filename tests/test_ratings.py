"Rating sheets without a browser: fair plans, a database that refuses what is wrong, raters killed in the middle, and figures that can be found again."

import contextlib
import io
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from crossmodal.metrics.human import mean_opinion, mean_rank
from crossmodal.workbook import studies
from crossmodal.workbook.studies import Item, Refused, Study, StudyError, assign, balanced_orders, create_study, dots, shared_out

WITNESS = Path(__file__).with_name("study_version_1.sql")       # dumped from a study that format 1 wrote
HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"quotes\" and 'quotes'", "'); DROP TABLE mark; --", "{{ 7 * 7 }} $x$ %s \\n",
           "nul \x00 inside", "\u202eright to left\u202c", "emoji \U0001f426 and \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "line\nbreak\ttab", "long " * 100_000]


def marks(folder, n=6, raters=3, **options):
    "A study of marks; item k shows k % 9 + 1 dots."
    return create_study(folder, "scores", [Item(f"sentence {k}", {"painter": dots(k % 9 + 1, 12)}) for k in range(n)], raters, **{"share": 0, **options})


def orders(folder, n=6, raters=3, systems=("a", "b", "c"), **options):
    items = [Item(f"sentence {k}", {name: dots(1 + (k + j) % 9, 12) for j, name in enumerate(systems)}) for k in range(n)]
    return create_study(folder, "correlation", items, raters, **{"share": 0, **options})


def agreed(study, rater=None):
    "Sheets of all raters, or of one, who have agreed."
    sheets = {number: study.sheet(token) for number, token in study.invite([rater] if rater else ()).items()}
    for sheet in sheets.values(): sheet.agree()
    return sheets[rater] if rater else sheets


def rows(study, query, *values): return [tuple(row) for row in study.db.execute(query, values)]


# Plans


@pytest.mark.parametrize("seed", range(40))
def test_every_plan_is_fair(seed):
    dice = random.Random(seed)
    raters = dice.randint(1, 9)
    each, places, checks = dice.randint(1, raters), dice.randint(1, 6), dice.randint(0, 5)
    sources = [f"s{k}" for k in range(dice.randint(1, 60)) for _ in range(dice.choice((1, 1, 3)))]
    plan = assign(sources, checks, places, raters, each, seed)
    assert plan == assign(sources, checks, places, raters, each, seed)
    judges = Counter(item for sheet in plan for item, _ in sheet)
    assert all(judges[item] == (each if item < len(sources) else raters) for item in range(len(sources) + checks))
    for sheet in plan:
        asked = sorted((item, order) for item, order in sheet if item < len(sources))
        assert len({item for item, _ in sheet}) == len(sheet) and all(sorted(order) == list(range(places)) for _, order in sheet)
        mine = {sources[item] for item, _ in asked}
        assert [item for item, source in enumerate(sources) if source in mine] == [item for item, _ in asked]      # all of a source, or none
        every = len(balanced_orders(places))                    # after each round of the square every system has been everywhere equally often
        seen = Counter((place, entry) for _, order in asked[:len(asked) // every * every] for place, entry in enumerate(order))
        assert len(set(seen.values())) <= 1
    assert np.ptp(shared_out(len(set(sources)), raters, each, seed).sum(1)) <= 1


def test_another_seed_is_another_plan():
    plans = [assign([str(k) for k in range(30)], 2, 3, 4, 2, seed) for seed in range(20)]
    assert len({repr(plan) for plan in plans}) == 20


def test_checks_are_spread_over_the_whole_sheet():
    for sheet in assign([str(k) for k in range(400)], 8, 1, 5, 5, 3):
        at = [place for place, (item, _) in enumerate(sheet) if item >= 400]
        assert all(slot * 51 - 15 <= place <= slot * 51 + 66 for slot, place in enumerate(at))


def test_the_plan_does_not_depend_on_who_comes_first(tmp_path):
    plans = []
    for name, order in (("a", (1, 2, 3)), ("b", (3, 1, 2))):
        with Study(orders(tmp_path / name, seed=5, share=.2)) as study:
            for rater in order: agreed(study, rater).click(1, 1)
            plans.append(rows(study, "SELECT * FROM assignment ORDER BY rater, place"))
    assert plans[0] == plans[1]


# Nothing tells who drew what


def test_pictures_are_their_pixels_and_nothing_else(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("Software", "SecretPainter")
    file = io.BytesIO()
    Image.fromarray(dots(3)).save(file, "PNG", pnginfo=note)
    told, plain = Image.open(io.BytesIO(file.getvalue())), dots(3)
    assert b"SecretPainter" in file.getvalue()
    create_study(tmp_path / "s", "correlation", [Item("x", {"SecretPainter": told, "Other": plain})], 1, share=0)
    [picture] = (tmp_path / "s" / "pictures").iterdir()             # equal pixels are one file
    assert b"SecretPainter" not in picture.read_bytes() and "Secret" not in picture.name
    with Study(tmp_path / "s") as study:
        task = agreed(study, 1).task(1)
        assert "Secret" not in repr(task) and (np.asarray(Image.open(io.BytesIO(task.pictures[0]))) == plain).all()


def test_a_picture_that_was_exchanged_is_noticed(tmp_path):
    with Study(marks(tmp_path / "s", 1, 1)) as study:
        sheet = agreed(study, 1)
        next((tmp_path / "s" / "pictures").iterdir()).write_bytes(b"another")
        with pytest.raises(StudyError, match="not the picture"): sheet.task(1)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_comes_back_unharmed_and_is_shown_as_text(tmp_path, text):
    from crossmodal.workbook.ratings import RatingSheet
    create_study(tmp_path / "s", "scores", [Item(text, {text[:500]: dots(1)})], 1, share=0, consent=text)
    with Study(tmp_path / "s") as study:
        sheet, [token] = agreed(study, 1), study.invite([1]).values()
        assert sheet.task(1).text == text and sheet.consent_text == text and rows(study, "SELECT name FROM system") == [(text[:500],)]
    page = RatingSheet(tmp_path / "s", token)
    assert "<script" not in page.head.value and "<img src=x" not in page.head.value
    assert page.head.value.count("<blockquote") == 1


# The database refuses


REFUSED = {
    "a mark off the scale": "INSERT INTO mark VALUES (1, 1, 1, 1, 5)",
    "a mark of nought": "INSERT INTO mark VALUES (1, 1, 1, 1, 0)",
    "a mark that is a word": "INSERT INTO mark VALUES (1, 1, 1, 1, 'high')",
    "a second mark in the same turn": "INSERT INTO mark VALUES (1, 1, 1, 1, 3)",
    "a mark without a click": "INSERT INTO mark VALUES (1, 2, 1, 1, 3)",
    "the same turn again": "INSERT INTO click VALUES (1, 1, 1, 'now', NULL)",
    "a turn too far": "INSERT INTO click VALUES (1, 1, 3, 'now', NULL)",
    "an item that is not there": "INSERT INTO click VALUES (1, 99, 1, 'now', NULL)",
    "time that runs backwards": "INSERT INTO click VALUES (1, 1, 2, 'now', -1.0)",
    "a rater who has not agreed": "INSERT INTO click VALUES (2, 1, 1, 'now', NULL)",
    "a rater who is not there": "INSERT INTO click VALUES (9, 1, 1, 'now', NULL)",
    "another answer in place of the old": "UPDATE mark SET value = 4",
    "another time": "UPDATE click SET said = 'then'",
    "an answer that vanishes": "DELETE FROM mark",
    "a click that vanishes": "DELETE FROM click",
    "another question": "UPDATE study SET question = 'Is it pretty?'",
    "another threshold, afterwards": "UPDATE study SET attention = 0",
    "another system behind a picture": "UPDATE entry SET system = NULL",
    "another sheet": "UPDATE assignment SET shown = '1'",
    "an item the less": "DELETE FROM assignment",
    "a rater the less": "DELETE FROM rater WHERE rater = 3",
    "a second study": "INSERT INTO study SELECT 2, kind, question, scale, top, each, attention, consent, seed, made FROM study",
    "withdrawing before agreeing": "UPDATE rater SET withdrawn = 'now' WHERE rater = 2",
    "a token that is no digest": "UPDATE rater SET token = x'00' WHERE rater = 2",
    "one token for two": "UPDATE rater SET token = (SELECT token FROM rater WHERE rater = 1) WHERE rater = 2",
}


@pytest.fixture(scope="module")
def one_answer(tmp_path_factory):
    study = Study(marks(tmp_path_factory.mktemp("study") / "s"))
    sheet = agreed(study, 1)
    [place] = [place for place, item in rows(study, "SELECT place, item FROM assignment WHERE rater = 1") if item == 1]
    sheet.click(place, 2)
    yield study
    study.close()


@pytest.mark.parametrize("what", REFUSED)
def test_the_database_refuses(one_answer, what):
    before = list(one_answer.db.iterdump())
    with pytest.raises(sqlite3.IntegrityError): one_answer.db.execute(REFUSED[what])
    assert list(one_answer.db.iterdump()) == before


def test_of_an_order_no_place_is_given_twice(tmp_path):
    with Study(orders(tmp_path / "s")) as study:
        agreed(study, 1)
        item = rows(study, "SELECT item FROM assignment WHERE rater = 1")[0][0]
        study.db.execute("INSERT INTO click VALUES (1, ?, 1, 'now', NULL)", (item,))
        study.db.execute("INSERT INTO mark VALUES (1, ?, 1, 1, 2)", (item,))
        for entry, value in ((1, 1), (2, 2), (2, 4), (4, 1)):
            with pytest.raises(sqlite3.IntegrityError): study.db.execute("INSERT INTO mark VALUES (1, ?, 1, ?, ?)", (item, entry, value))


def test_the_journal_is_durable_and_the_folder_is_private(tmp_path):
    with Study(marks(tmp_path / "s")) as study:
        assert [rows(study, f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")] == ["wal", 2, 1, 1]
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("said, options", [
    ("item 0 has 2 pictures: one at a time is marked", dict(items=[Item("x", {"a": dots(1), "b": dots(2)})])), ("a study needs items", dict(items=[])),
    ("a has several items of one source", dict(items=[Item("x", {"a": dots(1)}), Item("x", {"a": dots(2)})])),
    ("uint8|bytes|float64", dict(items=[Item("x", {"a": np.zeros((4, 4, 3))})])), ("every item has 5 judges of 2", dict(each=5)),
    (r"share lies in \[0, 1\)", dict(share=1.)), ("checks are 50% of a sheet, and 0 were given", dict(checks=[], share=.5)),
    ("a check has 1 pictures and expects something", dict(checks=[Item("x", {"a": dots(1)})] * 9, share=.3)),
    ("unknown kind 'beauty'", dict(kind="beauty")),
])
def test_a_study_that_cannot_be_asked_is_not_made(tmp_path, said, options):
    usual = dict(kind="scores", items=[Item(f"{k}", {"a": dots(1)}) for k in range(4)], raters=2)
    with pytest.raises(ValueError, match=said): create_study(tmp_path / "s", **{**usual, **options})
    assert not list(tmp_path.iterdir())


def test_orders_need_the_same_systems_everywhere(tmp_path):
    with pytest.raises(StudyError, match="same two to nine systems"):
        create_study(tmp_path / "s", "quality", [Item("", {"a": dots(1), "b": dots(2)}, "1"), Item("", {"a": dots(1), "c": dots(2)}, "2")], 1)


# Opening


def test_a_study_of_version_1_is_upgraded_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "_picture", lambda folder, digest: b"")                  # the witness has none
    old = sqlite3.connect(tmp_path / "study.sqlite")
    old.executescript(WITNESS.read_text())
    kept = {table: old.execute(f"SELECT * FROM {table}").fetchall() for table in ("study", "system", "item", "entry", "rater", "assignment", "mark", "click")}
    old.close()
    with Study(tmp_path) as study:
        assert rows(study, "PRAGMA user_version") == [(len(studies.MIGRATIONS),)] and len(studies.MIGRATIONS) > 1
        for table, before in kept.items(): assert [row[:len(before[0])] for row in rows(study, f"SELECT * FROM {table}")] == before
        assert rows(study, "SELECT DISTINCT seconds FROM click") == [(None,)] and rows(study, "PRAGMA integrity_check") == [("ok",)]
        sheet = agreed(study, 1)
        assert sheet.progress == (2, 3)
        sheet.click(sheet.next, 4, 1.5)
        assert sheet.progress == (3, 3)
    with Study(tmp_path) as study: assert rows(study, "SELECT MAX(seconds) FROM click") == [(1.5,)]


def test_many_may_open_an_old_study_at_once(tmp_path):
    with sqlite3.connect(tmp_path / "study.sqlite") as old: old.executescript(WITNESS.read_text())
    code = f"from crossmodal.workbook.studies import Study; print(len(Study({str(tmp_path)!r}).progress()))"
    crowd = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(5)]
    assert [one.communicate()[0].strip() for one in crowd] == ["2"] * 5


@pytest.mark.parametrize("spoil, message", [
    (lambda db: db.execute("PRAGMA user_version = 99"), "newer crossmodal"), (lambda db: db.execute("PRAGMA application_id = 1"), "not a study's")])
def test_what_this_program_cannot_read_is_left_alone(tmp_path, spoil, message):
    marks(tmp_path / "s")
    with sqlite3.connect(tmp_path / "s" / "study.sqlite", isolation_level=None) as db: spoil(db)
    db.close()
    before = (tmp_path / "s" / "study.sqlite").read_bytes()
    with pytest.raises(StudyError, match=message): Study(tmp_path / "s")
    assert (tmp_path / "s" / "study.sqlite").read_bytes() == before


def test_what_is_no_study_says_so(tmp_path):
    with pytest.raises(StudyError, match="no study.sqlite"): Study(tmp_path)
    (tmp_path / "study.sqlite").write_text("not a database, but long enough to be taken for one " * 100)
    with pytest.raises(StudyError, match="cannot be read"): Study(tmp_path)
    with pytest.raises(StudyError, match="not empty"): marks(tmp_path)
    assert not list(tmp_path.glob("*.part"))


# Raters


def test_no_token_no_sheet(tmp_path):
    with Study(marks(tmp_path / "s")) as study:
        tokens = study.invite()
        assert len(set(tokens.values())) == 3 and all(len(token) >= 43 for token in tokens.values()) and study.invite() == {}
        mine = tokens[1]
        forged = ["", " ", "1", mine[:-1], mine + "a", mine.swapcase(), mine + "\x00", "\udc80", studies._digest(mine).hex(), "a" * 10 ** 6]
        messages = set()
        for token in forged:
            with pytest.raises(Refused) as refused: study.sheet(token)
            messages.add(str(refused.value))
        assert len(messages) == 1                               # nobody learns why
        files = b"".join(path.read_bytes() for path in (tmp_path / "s").iterdir() if path.is_file())
        assert not any(token.encode() in files for token in tokens.values())


def test_a_sheet_reaches_nobody_else(tmp_path):
    with Study(marks(tmp_path / "s")) as study:
        first, second, _ = agreed(study).values()
        first.click(1, 4); second.click(1, 2); second.click(2, 3)
        assert first.progress == (1, 6) and second.progress == (2, 6)
        assert first.task(1).marks == (4,) and second.task(1).marks == (2,)
        for place in (0, 7, -1, 10 ** 9):
            with pytest.raises(StudyError, match="no place"): first.click(place, 1)
        for choice in (0, 5, -1, 1.5, "1", None, True + 9):
            with pytest.raises(StudyError): first.click(2, choice)


def test_withdrawing_takes_everything_back_and_nothing_else(tmp_path):
    with Study(marks(tmp_path / "s")) as study:
        sheets = agreed(study)
        for sheet in sheets.values():
            while sheet.next: sheet.click(sheet.next, 3)
        sheets[2].withdraw()
        for table in ("click", "mark"): assert rows(study, f"SELECT rater, COUNT(*) FROM {table} GROUP BY rater") == [(1, 6), (3, 6)]
        assert (tmp_path / "s" / "study.sqlite-wal").stat().st_size == 0
        assert sheets[2].state == "withdrawn" and sheets[1].progress == (6, 6)
        with pytest.raises(sqlite3.IntegrityError): sheets[2].click(1, 1)
        sheet = study.sheet(study.invite([2])[2])               # the seat is free for somebody else, who starts from nothing
        assert sheet.state == "new" and sheet.progress == (0, 6)


def test_two_pages_of_one_rater_do_not_double_an_answer(tmp_path):
    marks(tmp_path / "s", 40, 1)
    with Study(tmp_path / "s") as study: [token] = study.invite().values()
    code = f"""from crossmodal.workbook.studies import Study
sheet = Study({str(tmp_path / 's')!r}).sheet({token!r}); sheet.agree()
for place in range(1, 41): sheet.click(place, 1 + place % 4)"""
    pages = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [page.wait() for page in pages] == [0, 0, 0]
    with Study(tmp_path / "s") as study: assert rows(study, "SELECT COUNT(*), MAX(turn) FROM click") == [(40, 1)]


def test_presses_may_come_in_threads(tmp_path):
    "As they do from JupyterLab, which handles every widget's messages in a thread of its own."
    from crossmodal.workbook.ratings import RatingSheet
    marks(tmp_path / "s", 20, 1)
    with Study(tmp_path / "s") as study: [token] = study.invite().values()
    page = RatingSheet(tmp_path / "s", token)
    page.buttons[0].click()                                     # agrees
    while (place := page.sheet.next) is not None:
        crowd = [threading.Thread(target=button.click) for button in page.buttons if {"xm-key-1", "xm-key-4"} & set(button._dom_classes)]
        for one in crowd: one.start()
        for one in crowd: one.join()
        assert len(crowd) == 2 and page.sheet.task(place).marks in ((1,), (4,))
    assert "Thank you" in page.head.value
    with Study(tmp_path / "s") as study: assert rows(study, "SELECT COUNT(DISTINCT item), MAX(turn) <= 2 FROM mark") == [(20, 1)]


def test_seconds_count_from_when_an_item_came_to_the_screen(tmp_path, monkeypatch):
    "Not from the click before: of an order the last click tells how long the whole took. Reading what one agrees to does not count."
    from crossmodal.workbook import ratings
    clock = [100.]
    monkeypatch.setattr(ratings, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    orders(tmp_path / "s", 2, 1)
    with Study(tmp_path / "s") as study: [token] = study.invite().values()
    page = ratings.RatingSheet(tmp_path / "s", token)

    def press(key, later):
        clock[0] += later
        next(button for button in page.buttons if f"xm-key-{key}" in button._dom_classes or key == button.description).click()
    press("I agree, begin", 60)
    for key, later in (("2", 1), ("1", 2), ("2", 4), ("back", 8), ("0", 16)): press(key, later)
    query = "SELECT place, seconds FROM click JOIN assignment USING (rater, item) ORDER BY place, turn"
    with Study(tmp_path / "s") as study: assert rows(study, query) == [(1, 1.), (1, 3.), (1, 16.), (2, 4.)]


def rate_until_killed(folder, token, number, log):
    "A rater who notes every answer that was acknowledged; the mark follows from rater and item."
    sheet = Study(folder).sheet(token)
    sheet.agree()
    with open(log, "a") as acknowledged:
        while place := sheet.next:
            while place == sheet.progress[1] and not (folder.parent / "go").exists(): time.sleep(.01)          # the last one, when enough have been killed
            mark = 1 + (int(sheet.task(place).text.split()[1]) * 7 + number) % 4
            assert sheet.click(place, mark).marks == (mark,)
            acknowledged.write(f"{number} {place} {mark}\n")
            acknowledged.flush()


def test_ten_raters_killed_in_the_middle_lose_nothing_and_double_nothing(tmp_path):
    n, dice = 100, random.Random(0)
    marks(tmp_path / "s", n, 10)
    with Study(tmp_path / "s") as study: tokens = study.invite()
    fresh = multiprocessing.get_context("forkserver")           # children of a process that has imported no more than this
    fresh.set_forkserver_preload(["crossmodal.workbook.studies"])
    start = lambda number: fresh.Process(target=rate_until_killed, args=(tmp_path / "s", tokens[number], number, tmp_path / f"log{number}"))
    crowd = {number: start(number) for number in tokens}
    for one in crowd.values(): one.start()
    killed, until = 0, time.monotonic() + 300
    while any(one.exitcode != 0 for one in crowd.values()) and time.monotonic() < until:
        time.sleep(dice.uniform(.02, .1))
        number = dice.choice(list(crowd))
        if killed < 30 and crowd[number].is_alive():
            with contextlib.suppress(ProcessLookupError): os.kill(crowd[number].pid, signal.SIGKILL)
            crowd[number].join()
            killed += crowd[number].exitcode == -signal.SIGKILL
            if killed >= 5: (tmp_path / "go").touch()
        for number, one in list(crowd.items()):
            if one.exitcode not in (None, 0):
                assert one.exitcode == -signal.SIGKILL
                crowd[number] = start(number)
                crowd[number].start()
    assert all(one.exitcode == 0 for one in crowd.values()) and killed >= 5
    acknowledged = [tuple(map(int, line.split())) for number in tokens for line in (tmp_path / f"log{number}").read_text().splitlines()]
    with Study(tmp_path / "s") as study:
        stored = rows(study, "SELECT rater, place, value FROM answer JOIN assignment USING (rater, item)")
        assert len(stored) == 10 * n == rows(study, "SELECT COUNT(*) FROM click")[0][0]            # all, and each once
        assert set(acknowledged) <= set(stored) and len(set(acknowledged)) == len(acknowledged)
        texts = {(rater, place): text for rater, place, text in rows(study, "SELECT rater, place, text FROM assignment JOIN item USING (item)")}
        assert all(value == 1 + (int(texts[rater, place].split()[1]) * 7 + rater) % 4 for rater, place, value in stored)
        assert rows(study, "PRAGMA integrity_check") == [("ok",)] and rows(study, "PRAGMA foreign_key_check") == []


def test_a_page_of_a_rater_does_not_load_torch():
    code = "import sys, crossmodal.workbook.ratings; print(*sorted({'torch', 'pandas', 'matplotlib', 'scipy', 'tyro'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


# Figures


def fill(study, choose, raters=None):
    for number, sheet in agreed(study).items():
        while raters in (None, number) and (place := sheet.next): sheet.click(place, choose(number, sheet.task(place)))


def test_means_are_those_of_the_answers(tmp_path):
    from crossmodal.workbook.verdicts import answer_table, answers_of, verdict, verdict_table
    items = [Item(f"sentence {k}", {name: dots(k % 9 + 1, 12)}) for k in range(8) for name in ("a", "b")]
    with Study(create_study(tmp_path / "s", "scores", items, 4, each=3, share=0)) as study:
        dice = random.Random(1)
        fill(study, lambda number, task: dice.randint(1, 4))
        table, said = answer_table(study), verdict(study)
        assert len(table) == 3 * 16 and set(table["rater"]) == {1, 2, 3, 4}
        for name, opinion in said.opinions.items():
            part = table[table["system"] == name]
            assert opinion.mean == pytest.approx(part["value"].mean()) and opinion.ratings == len(part) == 24
            wide = part.pivot(index="rater", columns="source", values="value").reindex(columns=answers_of(study).sources)
            assert (opinion.low, opinion.high) == (mean_opinion(wide.to_numpy()).low, mean_opinion(wide.to_numpy()).high)
        assert list(verdict_table(said)["system"]) == ["a", "b"] and verdict_table(said)["chance"].eq(2.5).all()


def test_ranks_are_places_whatever_lay_where(tmp_path):
    from crossmodal.workbook.verdicts import answers_of, verdict
    with Study(orders(tmp_path / "s", 12, 3)) as study:
        number_of = {digest: name for name, digest in rows(study, "SELECT system, picture FROM entry WHERE item = 1")}
        assert len(number_of) == 3

        def best_first(number, task):
            "a before b before c, whatever the screen shows: told by the dots."
            [item] = [item for item, text in rows(study, "SELECT item, text FROM item") if text == task.text]
            order = dict(rows(study, "SELECT picture, system FROM entry WHERE item = ?", item))
            names = [order[studies.hashlib.sha256(png).hexdigest()] for png in task.pictures]
            return 1 + names.index(min(name for name, mark in zip(names, task.marks) if mark is None))
        fill(study, best_first)
        said = verdict(study)
        assert {name: opinion.mean for name, opinion in said.opinions.items()} == {"a": 1, "b": 2, "c": 3}
        assert said.agreement.alpha == 1 and [opinion.mean for opinion in mean_rank(answers_of(study).values)] == [1, 2, 3]


def test_a_half_given_order_counts_for_nothing(tmp_path):
    from crossmodal.workbook.verdicts import answers_of, verdict
    with Study(orders(tmp_path / "s", 2, 1)) as study:
        sheet = agreed(study, 1)
        sheet.click(1, 2)
        assert np.isnan(answers_of(study).values).all()
        with pytest.raises(StudyError, match="no answers that count"): verdict(study)


def test_who_does_not_look_is_left_out_and_that_is_said(tmp_path):
    from crossmodal.workbook.verdicts import answers_of, readable_verdict, verdict
    with Study(marks(tmp_path / "s", 30, 3, share=.2, attention=.75)) as study:
        checks = {text for text, in rows(study, "SELECT text FROM item WHERE is_check")}
        assert rows(study, "SELECT COUNT(*) FROM item WHERE is_check") == [(8,)]
        count = lambda png: int((np.asarray(Image.open(io.BytesIO(png)))[20::40, 20::40, 0] < 128).sum())      # of dots on the card
        fill(study, lambda number, task: 1 if number == 2 or task.text not in checks else count(task.pictures[0]))
        found, said = answers_of(study), verdict(study)
        assert found.passed.tolist()[0::2] == [1, 1] and found.passed[1] < .75
        assert said.left_out == [2] and said.raters == [1, 3] and "rater 2" in readable_verdict(said)
        assert verdict(study, attention=0).raters == [1, 2, 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A trained system, whose measurement takes longer than its training and is not asked for here."
    from crossmodal.systems.embedmap import EmbedMap
    from crossmodal.systems.experiments import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbedMap, "evaluate", lambda self, test: {})
        return train("embedmap", "digits", "smoke", tmp_path_factory.mktemp("runs") / "run", {"autoencoder": "mlp-ae"}, quiet=True)


@pytest.mark.parametrize("way", ["text-to-image", "image-to-text"])
def test_a_trained_system_is_judged_by_what_it_can_do(run, tmp_path, way):
    from crossmodal.cli import main
    words = ["--new", "scores", "--runs", str(run.folder), "--way", way, "--items", "5", "--raters", "2", "--share", ".2"]
    assert main(["rate", str(tmp_path / "s"), *words]) == 0
    with Study(tmp_path / "s") as study:
        assert rows(study, "SELECT COUNT(*), SUM(is_check) FROM item") == [(7, 2)]
        [(name, origin)] = rows(study, "SELECT * FROM system")
        assert name == run.name and json.loads(origin)["config"]["autoencoder"] == "mlp-ae" and json.loads(origin)["way"] == way
        words = {word for text, in rows(study, "SELECT text FROM item") for word in text.split()}
        assert words <= set("zero one two three four five six seven eight nine".split())


def test_systems_that_cannot_be_compared_are_refused(run, tmp_path, capsys):
    from crossmodal.cli import main
    made = lambda *words: main(["rate", str(tmp_path / "s"), "--new", *words, "--items", "2", "--raters", "1"])
    folder = str(run.folder)
    for words, why in ((("quality", "--runs", folder), "at least two systems"), (("quality", "--runs", folder, folder), "is there twice"),
                       (("quality", "--runs", folder, "--way", "image-to-text"), "marked and not put in order"),
                       (("scores", "--runs", str(tmp_path)), "not a run folder"),
                       (("scores", "--runs", f"{folder},autoencoder=conv-vae"), "do not fit"), (("scores", "--runs", f"{folder},colours=1"), "Did you mean")):
        assert made(*words) == 2 and why in capsys.readouterr().err
    assert made("quality", "--runs", folder, f"{folder},patience=1") == 0      # the same weights, used in two ways


# Into the tables


def judged(folder, prefer, runs=("sdn", "stackgan", "gan-int-cls")):
    "A finished study of three models of paper 004, whose raters are dice."
    origin = lambda model: {"run": f"sdn-ucm-reduced-s0-{model}", "system": "sdn", "preset": "reduced", "seed": 0, "config": {"model": model},
                            "data": {"name": "ucm", "given": "ucm"}, "way": "text-to-image"}
    items = [Item("", {name: dots(1 + (k + j) % 9, 12) for j, name in enumerate(runs)}, str(k)) for k in range(10)]
    create_study(folder, "quality", items, 3, share=0, origins={name: origin(name) for name in runs})
    study, dice = Study(folder), random.Random(prefer)
    fill(study, lambda number, task: dice.choice([k for k, mark in enumerate(task.marks, 1) if mark is None]))
    return study


def test_a_finished_study_fills_the_table_and_nothing_else_does(tmp_path):
    import pandas as pd

    from crossmodal.cli import main
    from crossmodal.workbook.tables import UnbackedFigure, check_table, find_table
    from crossmodal.workbook.verdicts import verdict, write_records
    results, cells = tmp_path / "results", find_table("sdn", "2")
    made = lambda: main(["table", "sdn", "2", "--data", "ucm", "--preset", "reduced", "--results", str(results), "--force"])
    assert made() == 0 and pd.read_csv(results / "sdn_table2.csv")["ours"].isna().all()             # no study, no figure
    with judged(tmp_path / "s", prefer=1) as study:
        paths, said = write_records(study, results), verdict(study)
        assert made() == 0
        table = check_table(cells, results / "sdn_table2.csv").set_index(["row", "column"])
        for row, name in (("SDN", "sdn"), ("StackGAN", "stackgan"), ("GAN-INT-CLS", "gan-int-cls")):
            line, opinion = table.loc[row, "quality"], said.opinions[name]
            assert (line["ours"], line["low"], line["high"]) == pytest.approx((opinion.mean, opinion.low, opinion.high), abs=1e-3)
            assert line["chance"] == 2 and line["n"] == 30 and pd.isna(table.loc[row, "correlation"]["ours"])
        assert main(["table", "sdn", "2", "--data", "cub", "--preset", "reduced", "--results", str(tmp_path / "other")]) == 0      # of other data
        assert pd.read_csv(tmp_path / "other" / "sdn_table2.csv")["ours"].isna().all()
        record = json.loads(paths[0].read_text())
        ratings = next(iter(record["scores"].values()))["ratings"]
        ratings[0][0] = 4 - ratings[0][0] if ratings[0][0] != 2 else 1
        paths[0].write_text(json.dumps(record))
        with pytest.raises(UnbackedFigure): check_table(cells, results / "sdn_table2.csv")          # somebody improves a rating


def test_two_studies_do_not_share_a_cell(tmp_path, capsys):
    from crossmodal.cli import main
    from crossmodal.workbook.verdicts import write_records
    for seed in (1, 2):
        with judged(tmp_path / f"s{seed}", seed) as study: write_records(study, tmp_path / "results")
    assert main(["table", "sdn", "2", "--data", "ucm", "--preset", "reduced", "--results", str(tmp_path / "results")]) == 2
    assert "two studies" in capsys.readouterr().err


def test_an_unfinished_study_is_not_recorded(tmp_path):
    from crossmodal.workbook.verdicts import study_records
    with judged(tmp_path / "s", 1) as study:
        finished = study_records(study)
        assert [record["study"]["open"] for record in finished] == [0, 0, 0] and len({record["id"] for record in finished}) == 3
        agreed(study, 2).click(1, 0)
        with pytest.raises(StudyError, match="raters 2 are not done"): study_records(study)
        assert [record["study"]["open"] for record in study_records(study, unfinished=True)] == [1, 1, 1]
