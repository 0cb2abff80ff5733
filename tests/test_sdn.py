"Paper 004's system as a user meets it: runs on a shared reader and teacher, stops that leave no trace, losses written out, what is refused."
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crossmodal.data.batch import spread
from crossmodal.losses.distillation import best_picture
from crossmodal.metrics.fidelity import Extractor
from crossmodal.models.mirror import VGG19, Teacher, vgg_layers
from crossmodal.systems import base, experiments, sdn
from crossmodal.systems.base import pictures_of
from crossmodal.systems.experiments import evaluate, load, resume, train
from crossmodal.systems.sdn import SDN_PRESETS, Distil, Model, Sdn, SdnConfig, caption_codes, drawing_scores, store_codes, stored_codes
from crossmodal.training.config import apply_preset
from crossmodal.training.loop import Interrupted, Loop, StopOnSignal
from crossmodal.training.runs import Run, RunError, open_run
from crossmodal.workbook.plots import Gallery, Things, codes_by_epoch
from crossmodal.workbook.tables import answer, build_table, sdn_table1, sdn_table3

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = apply_preset(SdnConfig(), SDN_PRESETS, "smoke")
TEXTS = ["a red bird with a black crown", "a quixotic zeppelin", "漢字 and <xml>, née Ünknown", "x"]
EPOCH = 14                                                  # steps: 820 captions, 60 at a time
FALLING = {"falling": True, "first_epochs": 2, "calibrated": True, "normalize": True}


@pytest.fixture(scope="module", autouse=True)
def hasty_judge():
    "How drawn pictures look is measured elsewhere: this judge looks at eight pixels, and knows three classes."
    look = lambda images: (images[:, 0, ::8, ::4].flatten(1), images.mean((2, 3)).softmax(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "backbone_extractor", lambda backbone: Extractor(backbone.name, look, torch.device("cpu")))
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Every row of both tables, by model, and what each system drew of `TEXTS` when its training ended."
    drew, measure = {}, Sdn.evaluate

    def remember(self, test):
        if self.config.model not in ("text", "teacher"): drew[self.config.model] = draw(self)
        return measure(self, test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sdn, "evaluate", remember)
        folder = tmp_path_factory.mktemp("table")
        answer(sdn_table1() + sdn_table3(), preset="smoke", folder=folder, quiet=True)
    return by_model(folder), drew


@pytest.fixture(scope="module")
def falling(tmp_path_factory):
    "The same, with rates that fall, layers that are weighed, and two epochs of Stage I."
    folder = tmp_path_factory.mktemp("falling")
    train("sdn", preset="smoke", out=folder / "whole", changes=FALLING, quiet=True)
    return by_model(folder)


def by_model(folder) -> dict[str, Run]:
    runs = [open_run(path) for path in folder.iterdir()]
    assert len({run.record["config"]["model"] for run in runs}) == len(runs) and all(run.finished for run in runs)
    return {run.record["config"]["model"]: run for run in runs}


def draw(system: Sdn, codes: torch.Tensor | None = None) -> torch.Tensor:
    with torch.random.fork_rng():                           # what the GANs' noise costs
        torch.manual_seed(0)
        return system.images_from_embeddings(system.embed_texts(TEXTS) if codes is None else codes)


def beside_grounds(runs: dict[str, Run], folder) -> Path:
    "A place for another run, which finds its reader and its teacher there."
    for model in ("text", "teacher"): shutil.copytree(runs[model].folder, folder / runs[model].name)
    return folder / "again"


def built(model: str, **changes) -> tuple[Sdn, object]:
    config = replace(SMOKE, model=model, text="words", **changes)
    data = Sdn.open_data(config, "birds", "train")
    torch.manual_seed(0)
    return Sdn(config, data.vocabulary), data


def begun(system: Sdn, data):
    phase = system.phases(data, data)[0]
    phase.accelerator = Loop(system, []).accelerator
    phase.begin()
    system.train()
    return phase


def log(run: Run) -> list[dict]:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_end(run: Run, whole: Run):
    ours, theirs = (load(each.folder).state_dict() for each in (run, whole))
    assert [name for name in theirs if not theirs[name].equal(ours[name])] == [] and ours.keys() == theirs.keys()
    assert run.finished and run.record["scores"] == whole.record["scores"] and log(run) == log(whole)


def test_all_rows_stand_on_one_reader_and_one_teacher(table):
    runs, _ = table
    stands_on = {model: [name for name in ("text", "teacher") if runs[name].name in run.record["stands_on"]] for model, run in runs.items()}
    assert stands_on == {"text": [], "teacher": [], "image": ["text"], "gan-int-cls": ["text"], "stackgan": ["text"]} | {
        model: ["text", "teacher"] for model in ("stage1", "stage2", "joint", "diverse", "sdn")}


def test_a_row_that_is_trained_again_trains_itself_alone_and_ends_the_same(table, tmp_path, monkeypatch):
    trained, fit = [], experiments.fit_run
    monkeypatch.setattr(experiments, "fit_run", lambda run, *args: trained.append(run.record["config"]["model"]) or fit(run, *args))
    again = train("sdn", preset="smoke", out=beside_grounds(table[0], tmp_path), changes={"model": "stage2"}, quiet=True)
    assert trained == ["stage2"]
    assert_same_end(again, table[0]["stage2"])


@pytest.mark.parametrize("cells", [sdn_table1, sdn_table3])
def test_every_cell_of_the_tables_has_its_figure(table, cells):
    found = build_table(cells(), [run.record for run in table[0].values()])
    assert not found["metric"].str.contains("inception_v3").any()                   # of photographs alone
    assert found["ours"].notna().all() and np.isfinite(found[["ours", "low", "high"]]).all(axis=None) and (found["runs"].str.len() > 0).all()
    assert len(found) == 6 * (3 if cells is sdn_table1 else 6)


def test_measuring_leaves_torch_its_threads(table):
    "numba would set its own number for all of OpenMP, and sums would be added in another order from then on."
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("model, step", [("sdn", 7), ("sdn", EPOCH), ("sdn", EPOCH + 9), ("diverse", EPOCH + 9), ("gan-int-cls", EPOCH + 3), ("stackgan", 5)])
def test_stopped_it_goes_on_to_the_same_end(table, tmp_path, monkeypatch, model, step):
    "In Stage I, at the seam, in Stage II, and in either game."
    stop_and_go(table[0], tmp_path, monkeypatch, step, {"model": model}, False)


@pytest.mark.parametrize("step, killed", [(7, False), (EPOCH + 9, False), (2 * EPOCH + 5, False), (EPOCH + 9, True), (2 * EPOCH + 5, True)])
def test_so_do_rates_that_fall(falling, tmp_path, monkeypatch, step, killed):
    "Killed, a run goes back to its last checkpoint, a whole epoch; stopped, to the middle of one."
    stop_and_go(falling, tmp_path, monkeypatch, step, FALLING, killed)


def stop_and_go(runs, folder, monkeypatch, step, changes, killed):
    after_step, place = StopOnSignal.after_step, beside_grounds(runs, folder)

    def stop(self, loop):
        if killed and loop.total == step: raise MemoryError
        self.asked = loop.total == step
        after_step(self, loop)
    with monkeypatch.context() as patch, pytest.raises(MemoryError if killed else Interrupted):
        patch.setattr(StopOnSignal, "after_step", stop)
        train("sdn", preset="smoke", out=place, changes=changes, quiet=True)
    assert_same_end(resume(place, quiet=True), runs[changes.get("model", "sdn")])


def test_rates_fall_along_half_a_cosine():
    system, data = built("stage1", falling=True, rate=.5, batch=400)                # three steps an epoch, two epochs
    phase, rates = begun(system, data), []
    for _ in range(6):
        phase.step(data[range(8)])
        rates.append(phase.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([.5 * (1 + np.cos(np.pi * k / 6)) / 2 for k in range(6)])


def test_a_loaded_system_draws_what_the_trained_one_drew(table):
    "Sentences of unknown words and letters among them."
    runs, drew = table
    assert len(drew) == 8
    for model, pictures in drew.items():
        assert draw(load(runs[model].folder)).equal(pictures) and pictures.shape == (len(TEXTS), 3, 16, 16) and pictures.abs().max() <= 1


def test_teacher_and_reader_rest(table):
    "Bit for bit, running statistics too; and no other model has a teacher."
    states = {model: load(run.folder).state_dict() for model, run in table[0].items()}
    teacher = {name.removeprefix("classifier."): value for name, value in states["teacher"].items() if name.startswith("classifier.teacher.")}
    assert any(name.endswith("running_mean") and value.abs().sum() > 0 for name, value in teacher.items())
    for model, state in states.items():
        if model == "teacher": continue
        resting = states["text"] | (teacher if model in ("stage1", "stage2", "joint", "diverse", "sdn") else {})
        assert all(state[name].equal(value) for name, value in resting.items())
        assert any(name.startswith("teacher.") for name in state) == any(name.startswith("teacher.") for name in resting)


def test_pixels_alone_need_no_teacher(monkeypatch):
    monkeypatch.setattr(Teacher, "__init__", lambda *args: pytest.fail("a teacher was built"))
    system, data = built("image", calibrated=True)
    assert begun(system, data).step(data[range(8)]).keys() == {"image"}
    with pytest.raises(pytest.fail.Exception, match="was built"): built("stage1")


@pytest.mark.parametrize("model, shown", [("stage1", 3.), ("gan-int-cls", 1.), ("stackgan", 1.)])
def test_guidance_is_the_students_alone(model, shown):
    plain, data = built(model)
    begun(plain, data)                                      # learns where the middle of the codes is
    guided = built(model, guidance=3.)[0]
    guided.load_state_dict(plain.state_dict())
    embed = plain.embed_texts(TEXTS[:3])
    drew = [draw(system.eval(), codes) for system, codes in ((guided, embed), (plain, plain.middle + shown * (embed - plain.middle)))]
    assert torch.allclose(*drew, atol=1e-5)


def test_codes_do_not_depend_on_dice():
    "Words drop out while reading is learned, not while it is used; a phase begins in training mode."
    system, data = built("stage1", dropout=.5)
    codes = caption_codes(system, data)
    assert caption_codes(system.train(), data).equal(codes) and begun(system, data).codes.equal(system.standardize(codes))
    reader = built("text", dropout=.5)[0].train()
    assert not reader.embed_texts(TEXTS).equal(reader.embed_texts(TEXTS))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("model", ["image", "stage1", "stage2", "joint", "diverse"])
def test_losses_are_those_of_plain_loops(model, calibrated):
    "Eqs. 1 to 5, a picture and a layer at a time."
    system, data = built(model, calibrated=calibrated, pictures=3)
    stages = [Distil(system, stage, 1, data, data) for stage in (("stage1", "stage2") if model == "diverse" else (model,))]
    batch = data[range(0, 820, 140)]
    for phase in stages:
        phase.accelerator = Loop(system, []).accelerator
        phase.begin()
        with torch.no_grad():
            drawn, levels = system.student(phase.codes[batch.ids])
            losses = phase.distances(batch.images, drawn, levels)
            held = [] if model == "image" else system.teacher(batch.images)
            some = pictures_of(data, spread(data.positions, 64))
            weights = [1.] * len(held)
            if calibrated and held: weights = [float(some.abs().mean() / len(held) / level.abs().mean()) for level in system.teacher(some)]
            wanted = {name: [] for name in losses}
            for b in range(len(batch)):
                near = [float((drawn[b, p] - batch.images[b]).abs().mean()) for p in range(drawn.shape[1])]
                if "image" in wanted: wanted["image"].append(min(near))
                if "stage 1" in wanted: wanted["stage 1"].append(
                    min(near) + sum(w * float((h[b] - level[b]).abs().mean()) for w, h, level in zip(weights, held, levels, strict=True)))
                if "stage 2" in wanted:
                    again = [system.teacher(drawn[b, p][None]) for p in range(drawn.shape[1])]
                    wanted["stage 2"].append(min(near[p] + sum(w * float((h[b] - a[0]).abs().mean()) for w, h, a in zip(weights, held, again[p], strict=True))
                                                 for p in range(drawn.shape[1])))
        assert wanted.keys() == {"image": {"image"}, "stage1": {"stage 1"}, "stage2": {"stage 2"}, "joint": {"stage 1", "stage 2"}}[phase.stage]
        assert drawn.shape[1] == (3 if model == "diverse" else 1)
        for name, value in losses.items(): assert float(value) == pytest.approx(np.mean(wanted[name]), rel=1e-4)


def test_stage_2_counts_what_it_lets_learn():
    "The output whose whole bracket is smallest, whatever its pixels alone say."
    system, data = built("diverse", pictures=3)
    first, second = (Distil(system, stage, 1, data, data) for stage in ("stage1", "stage2"))
    batch = data[range(0, 820, 140)]
    for phase in (first, second):
        phase.accelerator = Loop(system, []).accelerator
        phase.begin()
    first.step(batch)
    assert not system.chosen.any()
    with torch.no_grad(): drawn, _ = system.train().student(second.codes[batch.ids])
    best = best_picture(system.teacher(batch.images), system.teacher(drawn.flatten(0, 1)), batch.images, drawn)
    second.step(batch)
    assert system.chosen.equal(torch.bincount(best, minlength=3))


def test_the_output_that_was_nearest_most_often_is_drawn(table):
    system = load(table[0]["diverse"].folder)
    assert system.chosen.sum() == 820 and len(system.chosen) == 2                   # Stage II's choice, every caption
    codes = system.embed_texts(TEXTS)
    for k in range(2):
        system.chosen.copy_(torch.tensor([k == 0, k == 1]))
        assert system.images_from_embeddings(codes).equal(system.draw(codes)[:, k])


@pytest.mark.parametrize("text", ["words", "gru", "pairs", "char-cnn-rnn"])
def test_sentences_of_unknown_words_alone_are_read(text):
    system = Sdn(replace(SMOKE, model="image", text=text), Sdn.open_data(SMOKE, "birds", "train").vocabulary).eval()
    first, second = system.embed_texts(["zeppelin gizmo", "quixotic flummery"])
    assert first.isfinite().all() and first.equal(second) == (text != "char-cnn-rnn")       # words nobody knows are all alike; letters are not
    with pytest.raises(ValueError, match="no character of the alphabet" if text == "char-cnn-rnn" else "text 0 has no word"): system.embed_texts(["", "a bird"])


def codes_file(folder, **changes) -> str:
    counts = {split: len(Sdn.open_data(SMOKE, "birds", split).lengths) for split in ("train", "val", "test")}
    tensors = {split: torch.randn(changes.get(split, (count, SMOKE.width))) for split, count in counts.items() if changes.get(split, True)}
    save_file(tensors, folder / "codes.safetensors")
    return str(folder / "codes.safetensors")


def test_a_reader_without_epochs_is_shown_before_and_after(tmp_path):
    run = train("sdn", preset="smoke", out=tmp_path / "reader", changes={"model": "text", "text": "pairs"}, quiet=True)
    things = Things(Gallery(Sdn.open_data(SMOKE, "birds", "test"), 20), range(4), range(3))
    shown = codes_by_epoch(run.folder, things)
    assert list(shown) == ["before training", "read"]
    assert torch.allclose(shown["read"], things.codes(load(run.folder)), atol=1e-5) and not torch.allclose(*shown.values(), atol=.1)


def test_codes_can_be_any_systems(table, tmp_path):
    reader, file = load(table[0]["text"].folder), str(tmp_path / "codes.safetensors")
    splits = [Sdn.open_data(SMOKE, "birds", split, reader.vocabulary) for split in ("train", "val", "test")]
    store_codes(reader, splits, file)
    for split in splits: torch.testing.assert_close(stored_codes(replace(SMOKE, text_vectors=file), split), caption_codes(reader, split))


def test_codes_from_a_file_need_no_reader(tmp_path):
    file = codes_file(tmp_path)
    run = train("sdn", preset="smoke", out=tmp_path / "run", changes={"model": "image", "text_vectors": file}, quiet=True)
    assert run.record["stands_on"] == [] and np.isfinite(run.record["scores"]["drawn SSIM"]["values"]).all()
    assert {name: score.values for name, score in evaluate(run.folder).items()}["drawn error"] == pytest.approx(
        run.record["scores"]["drawn error"]["values"], abs=1e-4)
    with pytest.raises(ValueError, match="leave text_vectors out"): built("text", text_vectors=file)


@pytest.mark.parametrize("changes, message", [({"train": (819, 16)}, r"split 'train': expected \(820, 16\).*found \(819, 16\)"),
                                              ({"train": (820, 8)}, r"width=16\), found \(820, 8\)"), ({"train": ()}, "no codes for split 'train', only"),
                                              (None, "codes.safetensors")])
def test_codes_that_do_not_fit_are_refused_and_leave_nothing_behind(tmp_path, changes, message):
    file = str(tmp_path / "codes.safetensors") if changes is None else codes_file(tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train("sdn", preset="smoke", out=tmp_path / "run", changes={"model": "image", "text_vectors": file}, quiet=True)
    assert not (tmp_path / "run").exists()


def test_classes_must_be_enough(tmp_path):
    go = lambda classes: train("sdn", preset="smoke", out=tmp_path / "run", changes={"model": "teacher", "classes": classes}, quiet=True)
    with pytest.raises(ValueError, match="has a class 29, but classes=29: set it to 30 or more"): go(29)
    assert not (tmp_path / "run").exists() and go(30).finished


@pytest.mark.parametrize("model", get_args(Model))
def test_every_model_can_be_built_at_the_papers_size(monkeypatch, model):
    "On the meta device, which holds shapes alone; ImageNet's weights are not asked for."
    monkeypatch.setattr(sdn, "vgg19_teacher", lambda: Teacher(vgg_layers(VGG19, normalise=False)).freeze())
    config = replace(apply_preset(SdnConfig(), SDN_PRESETS, "paper"), model=model)
    vocabulary = Sdn.open_data(SMOKE, "birds", "train").vocabulary
    with torch.device("meta"):
        system, codes = Sdn(config, vocabulary), torch.empty(2, config.width)
        if model not in ("text", "teacher"): assert system.draw(codes).shape == (2, config.drawn, 3, 224, 224)
        if model == "gan-int-cls": assert system.judges(system.painter(codes)[-1], codes).shape == (2,)
        if model == "stackgan":
            *drawn, mean, _ = system.painter(codes, cloud=True)
            assert [judge(picture, mean).conditional.shape for judge, picture in zip(system.judges, drawn, strict=True)] == [(2,), (2,)]


def test_stackgan_draws_in_evaluation_what_it_draws_in_training():
    "A point of the cloud, not the middle."
    painter, codes, dice = built("stackgan")[0].painter.eval(), torch.randn(2, SMOKE.width), torch.get_rng_state()
    with torch.no_grad():
        *trained, _, _ = painter(codes, cloud=True)
        torch.set_rng_state(dice)
        assert all(one.equal(other) for one, other in zip(painter(codes), trained, strict=True))


def test_one_test_picture_has_no_chance_beside_it(karpathy, table):
    found = drawing_scores(load(table[0]["image"].folder), Sdn.open_data(SMOKE, karpathy, "val"))
    assert {name: (len(score.values), score.chance) for name, score in found.items()} == dict.fromkeys(("drawn SSIM", "drawn FSIM", "drawn error"), (1, None))


def test_runs_of_different_teachers_share_no_cell(table):
    record = table[0]["sdn"].record
    other = record | {"config": record["config"] | {"teacher": "vgg7"}, "seed": 1}
    with pytest.raises(RunError, match="teachers cannot share a cell"): build_table(sdn_table1(), [record, other])


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="multiple of 8, found 20"): built("sdn", side=20)
    with pytest.raises(ValueError, match="4 or 7 doubled.* not 96"): built("stackgan", side=96)
    with pytest.raises(ValueError, match="does not draw: train one of image"): built("text")[0].images_from_texts(TEXTS)
    with pytest.raises(ValueError, match="a teacher does not read"): built("teacher")[0].embed_texts(TEXTS)


@pytest.mark.parametrize("model", ["sdn", "stackgan"])
def test_pictures_without_classes_are_classes_of_their_own(karpathy, tmp_path, model):
    "The teacher learns to tell them apart; nobody is told how well it names classes that there are none of."
    run = train("sdn", karpathy, "smoke", tmp_path / "runs" / "run", {"model": model}, quiet=True)
    runs = by_model(run.folder.parent)
    assert "teacher" not in runs or (runs["teacher"].record["scores"] == {} and not any("classes" in row for row in log(runs["teacher"])))
    assert len(run.record["scores"]["drawn SSIM"]["values"]) == 3 and "drawn attributes" not in run.record["scores"]
    assert load(run.folder).images_from_texts(TEXTS[:2]).shape == (2, 3, 16, 16)
