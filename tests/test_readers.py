"Readers of published datasets: tiny folders in each layout, then the same folders broken; and the real sets, where `CROSSMODAL_DATA` has them."
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossmodal.data.coco import is_coco, is_flickr8k, is_karpathy, read_coco, read_flickr8k, read_karpathy
from crossmodal.data.collection import tally
from crossmodal.data.cub import CUB_TEST, is_cub, read_cub
from crossmodal.data.flowers import is_flowers, read_flowers
from crossmodal.data.folder import is_folder, read_folder

BIRDS = {number: f"{number:03}.Bird_{number}" for number in (1, 2, 3, 5)}     # 1 is one of the published test classes


def write(path, content):
    "A file with the folders above it."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (90, 120, 60)).save(path, "jpeg")


def edit(path, old, new):
    "Replace a part of a file that is there."
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new))


def kinds(collection): return sorted(problem.kind for problem in collection.problems)


# One builder for each layout: two pictures a class, or a split, with two captions each.

def cub(folder):
    home, rows = folder / "CUB_200_2011", []
    for label, name in BIRDS.items():
        for letter in "ab":
            rows.append((10 * label + ord(letter) - 96, f"{name}/{letter}.jpg", label))
            draw(home / "images" / rows[-1][1])
            if label != 5: write(folder / "text" / name / f"{letter}.txt", f"a bird called {letter}.\nit is grey.\n")
    write(home / "images.txt", "".join(f"{id} {name}\n" for id, name, _ in rows))
    write(home / "image_class_labels.txt", "".join(f"{id} {label}\n" for id, _, label in rows))
    write(home / "bounding_boxes.txt", "".join(f"{id} 2.0 3.0 20.0 10.0\n" for id, _, _ in rows))
    write(home / "classes.txt", "".join(f"{label} {name}\n" for label, name in BIRDS.items()))
    write(folder / "attributes.txt", "1 has_wing_color::blue\n2 has_wing_color::red\n")
    write(home / "attributes/class_attribute_labels_continuous.txt", "100.0 0.0\n50.0 25.0\n0.0 0.0\n10.0 90.0\n")
    return folder


def flowers(folder):
    from scipy.io import savemat
    labels = [1, 1, 2, 2, 3, 3]
    for k, label in enumerate(labels, start=1):
        draw(folder / f"jpg/image_{k:05}.jpg")
        write(folder / f"text_c10/class_{label:05}/image_{k:05}.txt", f"flower {k} is pink.\nits petals are soft.\n")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    return folder


def entry(name, split): return {"filename": name, "split": split, "sentences": [{"tokens": ["a", name[0]], "raw": f"A {name[0]}."}] * 2}


def karpathy(folder):
    images = [entry("1.jpg", "train"), entry("101.jpg", "restval"), entry("102.jpg", "val"), entry("2100.jpg", "test")]
    for image in images: draw(folder / "images" / image["filename"])
    write(folder / "dataset.json", json.dumps({"dataset": "ucm", "images": images}))
    return folder


def coco(folder):
    for part, ids in (("train2014", (9, 25)), ("val2014", (42,))):
        images = [{"id": id, "file_name": f"COCO_{part}_{id}.jpg"} for id in ids]
        for image in images: draw(folder / part / image["file_name"])
        captions = [{"image_id": id, "caption": f"Picture {id}, {k}."} for k in range(2) for id in ids]
        write(folder / f"annotations/captions_{part}.json", json.dumps({"images": images, "annotations": captions}))
    return folder


def flickr8k(folder):
    for name, split in (("a.jpg", "train"), ("b.jpg", "dev"), ("c.jpg", "test")):
        draw(folder / "Flicker8k_Dataset" / name)
        write(folder / f"Flickr_8k.{split}Images.txt", f"{name}\n")
    write(folder / "Flickr8k.token.txt", "".join(f"{name}.jpg#{k}\tThe {name} , again {k} .\n" for name in "abc" for k in range(2)))
    return folder


def own(folder):
    rows = [f"images/{name}.jpg,{text}" for name in "abcd" for text in (f'"a {name}, and blue"', f"its letter is {name}")]
    for name in "abcd": draw(folder / f"images/{name}.jpg")
    write(folder / "captions.csv", "picture,caption\n" + "".join(f"{row}\n" for row in rows))
    return folder


LAYOUTS = {"cub": (cub, read_cub, is_cub, 8), "flowers": (flowers, read_flowers, is_flowers, 6), "karpathy": (karpathy, read_karpathy, is_karpathy, 4),
           "coco": (coco, read_coco, is_coco, 3), "flickr8k": (flickr8k, read_flickr8k, is_flickr8k, 3),
           "own": (own, read_folder, is_folder, 4)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sound_folder_has_no_problems(name, tmp_path):
    build, read, is_it, count = LAYOUTS[name]
    collection = read(build(tmp_path))
    assert collection.problems == () and len(collection.pictures) == count
    assert [collection.pixels.read(k).shape for k in range(count)] == [(20, 30, 3)] * count
    assert {picture.split for picture in collection.pictures} >= {"train", "test"}
    assert [other for other, (_, _, is_other, _) in LAYOUTS.items() if is_other(tmp_path)] == [name]
    assert collection.fingerprint == read(tmp_path).fingerprint


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_folder_says_what_is_missing(name, tmp_path):
    _, read, is_it, _ = LAYOUTS[name]
    assert not is_it(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no"): read(tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_windows_line_ends_change_nothing(name, tmp_path):
    build, read, _, _ = LAYOUTS[name]
    before = read(build(tmp_path))
    for path in [*tmp_path.rglob("*.txt"), *tmp_path.rglob("*.json"), *tmp_path.rglob("*.csv")]: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    after = read(tmp_path)
    assert after.fingerprint == before.fingerprint and after.problems == ()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_picture_is_named_and_left_out(name, tmp_path):
    build, read, _, count = LAYOUTS[name]
    gone = sorted(build(tmp_path).rglob("*.jpg"))[0]
    gone.unlink()
    collection = read(tmp_path)
    assert kinds(collection) == ["missing picture"] and collection.problems[0].where.endswith(gone.name)
    assert len(collection.pictures) == count - 1 == len(collection.pixels.names)
    assert collection.pixels.read(0).shape == (20, 30, 3)


CAPTION_FILES = {"cub": "text/002.Bird_2/a.txt", "flowers": "text_c10/class_00002/image_00003.txt", "karpathy": "dataset.json",
                 "coco": "annotations/captions_train2014.json", "flickr8k": "Flickr8k.token.txt", "own": "captions.csv"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_captions_in_another_encoding_are_noted_and_kept(name, tmp_path):
    build, read, _, count = LAYOUTS[name]
    path = build(tmp_path) / CAPTION_FILES[name]
    edit(path, b"again 0" if name == "flickr8k" else b"Picture 9" if name == "coco" else b'"1"' if name == "karpathy" else b" is ", "é".encode("latin-1") * 2)
    if name == "karpathy": edit(path, "é".encode("latin-1") * 2, b'"\xe9\xe9"')
    collection = read(tmp_path)
    assert kinds(collection) == ["not UTF-8"] and path.name in collection.problems[0].where
    assert len(collection.pictures) == count and any("\ufffd" in caption for picture in collection.pictures for caption in picture.captions)


@pytest.mark.parametrize("name, file", [("karpathy", "dataset.json"), ("coco", "annotations/captions_val2014.json"), ("flowers", "imagelabels.mat")])
@pytest.mark.parametrize("part", [0, .3, .9])
def test_a_torn_structure_is_an_error_with_a_remedy(name, file, part, tmp_path):
    build, read, _, _ = LAYOUTS[name]
    path = build(tmp_path) / file
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path.name}.*(https://|torchvision)"): read(tmp_path)


@pytest.mark.parametrize("name", ["cub", "flowers"])
def test_faults_of_caption_files(name, tmp_path):
    build, read, _, count = LAYOUTS[name]
    path = build(tmp_path) / CAPTION_FILES[name]
    for content, kind in (("", "empty caption file"), ("\n \n", "empty caption file"), ("one.\n\ntwo.\n", "empty caption")):
        path.write_text(content)
        collection = read(tmp_path)
        assert kinds(collection) == [kind] and str(path.relative_to(tmp_path).as_posix()) in collection.problems[0].where
    path.rename(path.with_name("nobody.txt"))
    assert kinds(read(tmp_path)) == ["captions without picture", "picture without captions"]
    assert len(read(tmp_path).pictures) == count


@pytest.mark.parametrize("name", ["cub", "flowers"])
def test_a_class_without_captions_is_a_note(name, tmp_path):
    build, read, _, count = LAYOUTS[name]
    shutil.rmtree((build(tmp_path) / CAPTION_FILES[name]).parent)
    collection = read(tmp_path)
    assert collection.problems == () and any("have no captions" in note for note in collection.notes)
    assert sum(not picture.captions for picture in collection.pictures) == (4 if name == "cub" else 2)


@pytest.mark.parametrize("file, old, new, expected", [
    ("image_class_labels.txt", b"21 2\n", b"", ["missing label"]),
    ("image_class_labels.txt", b"21 2\n", b"21 77\n", ["unknown class"]),
    ("image_class_labels.txt", b"21 2\n", b"21 x\n", ["bad line", "missing label"]),
    ("bounding_boxes.txt", b"21 2.0 3.0 20.0 10.0\n", b"", ["missing box"]),
    ("bounding_boxes.txt", b"21 2.0 3.0 20.0", b"21 2.0 3.0 0.0", ["bad box"]),
    ("bounding_boxes.txt", b"21 2.0 3.0 20.0", b"21 2.0 3.0", ["bad line", "missing box"]),
    ("images.txt", b"22 002", b"21 002", ["captions without picture", "duplicate id"]),
    ("images.txt", b"22 002.Bird_2/b", b"22 002.Bird_2/a", ["captions without picture", "duplicate picture"]),
    ("attributes/class_attribute_labels_continuous.txt", b"50.0 25.0", b"50.0", ["bad line"]),
    ("attributes/class_attribute_labels_continuous.txt", b"50.0 25.0\n", b"", ["bad line"]),
])
def test_faults_of_cubs_tables(file, old, new, expected, tmp_path):
    edit(cub(tmp_path) / "CUB_200_2011" / file, old, new)
    collection = read_cub(tmp_path)
    assert kinds(collection) == expected
    boxed = {picture.name: picture.box for picture in collection.pictures}
    if file == "image_class_labels.txt": assert "002.Bird_2/a.jpg" not in boxed                       # on which side would it be?
    if file == "bounding_boxes.txt": assert boxed["002.Bird_2/a.jpg"] is None and sum(box is None for box in boxed.values()) == 1
    assert all(label == int(name[:3]) for name, label in ((picture.name, list(BIRDS)[picture.label]) for picture in collection.pictures))


def test_a_missing_table_of_cub_is_an_error(tmp_path):
    cub(tmp_path)
    for name in ("bounding_boxes.txt", "classes.txt", "images.txt"):
        (tmp_path / "CUB_200_2011" / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {name}.*caltech"): read_cub(tmp_path)


def test_cub_with_its_parts_beside_or_inside(tmp_path):
    beside = read_cub(cub(tmp_path))
    home = tmp_path / "CUB_200_2011"
    shutil.move(tmp_path / "text", home / "text_c10")
    shutil.move(tmp_path / "attributes.txt", home / "attributes/attributes.txt")
    assert read_cub(home).fingerprint == read_cub(tmp_path).fingerprint == beside.fingerprint
    (home / "attributes/attributes.txt").unlink()
    assert read_cub(tmp_path).attributes is None and "no attributes: attributes.txt is not here" in read_cub(tmp_path).notes


def test_cub_splits_by_the_copys_own_list_first(tmp_path):
    sides = lambda: {BIRDS[label]: {picture.split == "test" for picture in read_cub(tmp_path).pictures if picture.label == k} for k, label in enumerate(BIRDS)}
    cub(tmp_path)
    assert [name[:3] for name, test in sides().items() if test == {True}] == ["001"]                 # published
    write(tmp_path / "testclasses.txt", "002.Bird_2\n005.Bird_5\n")
    assert [name[:3] for name, test in sides().items() if test == {True}] == ["002", "005"]
    write(tmp_path / "testclasses.txt", "005.Bird_5\n")                                              # has no captions: nothing could be tested
    assert sum(test == {True} for test in sides().values()) == 1 and sides()["005.Bird_5"] == {False}
    assert any("our own" in note for note in read_cub(tmp_path).notes)


def test_cubs_own_attributes_of_pictures(tmp_path):
    path = cub(tmp_path) / "CUB_200_2011/attributes/image_attribute_labels.txt"
    path.write_text("11 1 1 4 3.5\n11 2 0 1 2.0\n12 1 0 2 0 4.5\n12 2 1 3 1.0\n99 1 1 4 1.0\n21 one 1 4 1.0\n21 2 3 4 1.0\n21 7 1 4 1.0\n21 1\n")
    collection = read_cub(tmp_path)
    assert collection.attribute_level == "picture" and collection.attributes.shape == (8, 2)
    np.testing.assert_array_equal(collection.attributes[:3], [[1, np.nan], [0, 1], [np.nan, np.nan]])
    assert [problem.where for problem in collection.problems] == [f"image_attribute_labels.txt, line {k}" for k in (6, 7, 8, 9)]


def test_faults_of_flower_labels(tmp_path):
    from scipy.io import savemat
    flowers(tmp_path)
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 1, 0, 2, 3]], np.uint8)})
    collection = read_flowers(tmp_path)
    assert kinds(collection) == ["captions without picture"] * 2 + ["missing label", "unknown class"]
    savemat(tmp_path / "imagelabels.mat", {"numbers": np.array([[1]])})
    with pytest.raises(ValueError, match="array `labels`"): read_flowers(tmp_path)


def test_flower_names_do_not_move_the_split(tmp_path):
    before = [picture.split for picture in read_flowers(flowers(tmp_path)).pictures]
    write(tmp_path / "cat_to_name.json", json.dumps({str(k): f"kind {k}" for k in range(1, 103)}))
    after = read_flowers(tmp_path)
    assert [picture.split for picture in after.pictures] == before and after.class_names[2] == "kind 3" and after.problems == ()


def test_faults_of_karpathys_entries(tmp_path):
    path = karpathy(tmp_path) / "dataset.json"
    content = json.loads(path.read_text())
    bad = [entry("1.jpg", "train"), entry("103.jpg", "dev"), {"split": "train"}, None, {"filename": "x.jpg", "split": "val", "sentences": [{"tokens": []}]}]
    draw(tmp_path / "images/x.jpg")
    path.write_text(json.dumps(content | {"images": content["images"] + bad}))
    collection = read_karpathy(tmp_path)
    assert kinds(collection) == ["bad entry", "bad entry", "duplicate picture", "empty caption", "missing label", "picture without captions", "unknown split"]
    assert [picture.label for picture in collection.pictures] == [0, 1, 1, 20, -1]
    for other in ('{"images": 3}', "[]", '{"images": []}'):
        path.write_text(other)
        with pytest.raises(ValueError): read_karpathy(tmp_path)


def test_faults_of_cocos_annotations(tmp_path):
    path = coco(tmp_path) / "annotations/captions_train2014.json"
    content = json.loads(path.read_text())
    content["images"] += [{"id": 9, "file_name": "COCO_train2014_25.jpg"}, {"id": 3}]
    content["annotations"] = [{"image_id": 25, "caption": " "}, {"image_id": 8, "caption": "Nobody."}, {"image_id": 9}, {"image_id": 9, "caption": "A bowl."}]
    path.write_text(json.dumps(content))
    collection = read_coco(tmp_path)
    assert kinds(collection) == ["bad entry", "bad entry", "captions without picture", "duplicate id", "empty caption", "picture without captions"]
    path.unlink()
    only_val = read_coco(tmp_path)
    assert {picture.split for picture in only_val.pictures} == {"test"} and "captions_train2014.json is not here, and none of its pictures" in only_val.notes


def test_faults_of_flickr8ks_lists(tmp_path):
    flickr8k(tmp_path)
    with open(tmp_path / "Flickr8k.token.txt", "a") as file: file.write("a.jpg#2\t \nno tab here\nz.jpg.1#0\tA cat .\n")
    with open(tmp_path / "Flickr_8k.testImages.txt", "a") as file: file.write("a.jpg\n")
    collection = read_flickr8k(tmp_path)
    assert kinds(collection) == ["bad line", "duplicate picture", "empty caption"]
    assert any("z.jpg.1" in note for note in collection.notes)
    (tmp_path / "Flickr_8k.testImages.txt").unlink()
    assert "no test: Flickr_8k.testImages.txt is not here" in read_flickr8k(tmp_path).notes


@pytest.mark.parametrize("name", ["karpathy", "flickr8k"])
def test_pictures_may_be_elsewhere_but_not_half_there(name, tmp_path):
    build, read, _, count = LAYOUTS[name]
    build(tmp_path)
    place = next(path for path in tmp_path.iterdir() if path.is_dir())
    for path in place.iterdir(): path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{place.name}.*captions alone"): read(tmp_path)
    place.rmdir()
    alone = read(tmp_path)
    assert alone.pixels is None and len(alone.pictures) == count and alone.problems == ()
    assert len(alone.fingerprint) == 12


def test_an_own_table_in_other_peoples_dialects(tmp_path):
    before = read_folder(own(tmp_path))
    text = (tmp_path / "captions.csv").read_text()
    (tmp_path / "captions.csv").unlink()
    for old, new in (("picture,caption", "File_Name;Text"), (".jpg,", ".jpg;"), ("images/", ".\\images\\")): text = text.replace(old, new)
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8-sig")
    after = read_folder(tmp_path)
    assert after.problems == () and after.fingerprint == before.fingerprint


@pytest.mark.parametrize("rows, expected", [
    (["a.jpg,red, and blue"], ["bad line"]),
    (["a.jpg"], ["bad line"]),
    (["a.jpg,"], ["empty caption"]),
    ([",blue"], ["bad line"]),
    (["", "  ,  "], []),
    (["e.jpg,nowhere"], ["missing picture"]),
])
def test_faults_of_an_own_table(rows, expected, tmp_path):
    own(tmp_path)
    with open(tmp_path / "captions.csv", "a") as file: file.write("\n".join(rows) + "\n")
    collection = read_folder(tmp_path)
    assert kinds(collection) == expected and len(collection.pictures) == 4
    assert all("captions.csv, line 10" in problem.where for problem in collection.problems if problem.kind != "missing picture")


def test_an_own_table_that_is_no_table(tmp_path):
    own(tmp_path)
    for text, what in (("", "only nothing"), ("a.jpg,a bird\n", "must name the columns"), ("picture,caption\n", "found captions of 0")):
        write(tmp_path / "captions.csv", text)
        with pytest.raises(ValueError, match=what): read_folder(tmp_path)


def test_an_own_folder_named_like_a_dataset_is_not_that_dataset(tmp_path):
    from crossmodal.data.captioned import open_dataset
    (tmp_path / "birds").mkdir()
    assert open_dataset(own(tmp_path / "birds"), "train").source == "own birds"


# The real sets.

def real(name, is_it):
    folder = Path(os.environ.get("CROSSMODAL_DATA", "nowhere"), name)
    if not is_it(folder): pytest.skip(f"CROSSMODAL_DATA has no {name} in the published layout")
    return folder


def check_whole(collection):
    "A copy as large as the published set has the published counts."
    counts = tally(collection)
    found = {"pictures": len(collection.pictures), "captions": sum(row["captions"] for row in counts.values()),
             "trainval": len(collection.positions("trainval"))} | {split: row["pictures"] for split, row in counts.items()}
    wrong = {key: (found[key], value) for key, value in collection.official.items() if key in found and found[key] != value}
    assert not wrong, f"found and published: {wrong}"


def test_real_cub():
    collection = read_cub(real("cub", is_cub))
    assert collection.problems == () and len(collection.class_names) == 200 and len(collection.attribute_names) == 312
    labels = Counter(picture.label for picture in collection.pictures)
    captioned = {picture.label for picture in collection.pictures if picture.captions}
    assert all(len(picture.captions) in (0, 10) and picture.box for picture in collection.pictures)
    test = {picture.label for picture in collection.pictures if picture.split == "test"}
    assert test == {number - 1 for number in CUB_TEST} & set(labels)
    assert not test & {picture.label for picture in collection.pictures if picture.split != "test"}
    if len(labels) == 200: return check_whole(collection)
    if len(labels) == 40: assert (len(collection.pictures), len(captioned), len(test), len(test & captioned)) == (2290, 10, 15, 5)


def test_real_flowers():
    collection = read_flowers(real("flowers102", is_flowers))
    assert collection.problems == () and len(collection.pictures) == 8189
    labels = Counter(picture.label for picture in collection.pictures)
    assert (len(labels), min(labels.values()), max(labels.values())) == (102, 40, 258)
    assert len({picture.label for picture in collection.pictures if picture.split == "test"}) == 20


def test_real_ucm():
    collection = read_karpathy(real("ucm", is_karpathy))
    assert collection.problems == () and {len(picture.captions) for picture in collection.pictures} == {5}
    counts = {split: row["pictures"] for split, row in tally(collection).items()}
    assert (counts["train"], counts["val"]) == (1680, 210) and counts["test"] in (0, 210)
    assert all(row["classes"] == 21 for row in tally(collection).values() if row["pictures"])
    if counts["test"]: check_whole(collection)


def test_real_flickr8k():
    collection = read_flickr8k(real("flickr8k", is_flickr8k))
    assert collection.problems == ()
    check_whole(collection)


@pytest.mark.parametrize("name, read, is_it", [("coco", read_coco, is_coco), ("coco", read_karpathy, is_karpathy), ("flickr30k", read_karpathy, is_karpathy)])
def test_real_coco_and_flickr30k(name, read, is_it): check_whole(read(real(name, is_it)))
