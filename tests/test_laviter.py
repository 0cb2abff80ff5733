"Paper 001's system as a user meets it: three phases as runs that stand on others, what learns in each, what is refused."
from dataclasses import replace

import numpy as np
import pytest
import torch

from crossmodal.data.captioned import CollectionSplit
from crossmodal.data.text import SPECIALS
from crossmodal.systems import laviter
from crossmodal.systems.base import pictures_of
from crossmodal.systems.experiments import load, resume, train
from crossmodal.systems.laviter import LAVITER_PRESETS, Joint, Laviter, LaviterConfig, Said, matching, short_texts, split_codes, what_is_true
from crossmodal.training.config import apply_preset
from crossmodal.training.loop import Interrupted, Loop, StopOnSignal
from crossmodal.training.runs import open_run

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = apply_preset(LaviterConfig(), LAVITER_PRESETS, "smoke")
SOME = range(0, 480, 20)                                    # captions of many species, some of them twice


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return train("laviter", preset="smoke", out=tmp_path_factory.mktemp("chain") / "whole", quiet=True)


def built(model: str, **changes) -> tuple[Laviter, object]:
    config = replace(SMOKE, model=model, **changes)
    data = Laviter.open_data(config, "birds", "train")
    torch.manual_seed(0)
    return Laviter(config, data.vocabulary), data


def test_the_full_model_stands_on_both_assistants_and_these_on_the_encoders(chain):
    beside = [open_run(path) for path in chain.folder.parent.iterdir() if path != chain.folder]
    assert sorted(run.record["config"]["model"] for run in beside) == ["itm", "tim", "vta"]
    assert all(run.finished for run in beside)


def test_phase_two_leaves_the_encoders_as_they_were(chain):
    runs = {run.record["config"]["model"]: load(run.folder).state_dict() for run in map(open_run, chain.folder.parent.iterdir())}
    encoders = [name for name in runs["vta"] if name.startswith(("image.", "text."))]
    for assistant in ("tim", "itm"): assert all(runs[assistant][name].equal(runs["vta"][name]) for name in encoders)
    assert not all(runs["full"][name].equal(runs["vta"][name]) for name in encoders)


def test_a_chain_that_was_stopped_goes_on_to_the_same_end(chain, tmp_path, monkeypatch):
    after_step, steps = StopOnSignal.after_step, []

    def stop(self, loop):
        steps.append(loop.phase.name)
        self.asked = self.asked or steps.count("together") == 3
        after_step(self, loop)
    monkeypatch.setattr(StopOnSignal, "after_step", stop)
    with pytest.raises(Interrupted): train("laviter", preset="smoke", out=tmp_path / "whole", quiet=True)
    monkeypatch.setattr(StopOnSignal, "after_step", after_step)
    again = resume(tmp_path / "whole", quiet=True)
    ours, theirs = (load(run.folder).state_dict() for run in (again, chain))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("model, moves", [("vta-frozen", {"image.region", "image.vector", "text"}),
                                          ("vta-trainable", {"image.region", "image.vector", "image.end", "text"}),
                                          ("img2txt", {"image.region", "image.vector", "image.end", "text", "writer"}),
                                          ("txt2img", {"image.region", "image.vector", "image.end", "text", "augmentation", "generator", "judges"})])
def test_phase_three_moves_what_its_row_says_and_nothing_else(model, moves):
    system, data = built(model)
    before = {name: weight.clone() for name, weight in system.named_parameters()}
    phase = system.phases(data, data)[0]
    Loop(system, [phase])                                   # gives the phase its device
    phase.accelerator = Loop(system, []).accelerator
    phase.begin()
    system.train()
    phase.step(data[SOME])
    moved = {name for name, weight in system.named_parameters() if not weight.equal(before[name])}
    groups = {".".join(name.split(".")[:2]) if name.startswith("image.") else name.split(".")[0] for name in moved}
    assert groups == moves


def test_the_written_sentence_teaches_the_encoders_but_not_the_writer():
    "A choice of words has no slope: with every other term at 0, the writer's gradient is 0 and the text encoder's is not."
    system, data = built("img2txt", weight_rr=0., weight_cap=0., weight_ft=1.)
    phase = system.phases(data, data)[0]
    phase.accelerator = Loop(system, []).accelerator
    phase.begin()
    phase.step(data[SOME])
    size = lambda module: sum(float(weight.grad.abs().sum()) for weight in module.parameters() if weight.grad is not None)
    assert size(system.writer) == 0 and size(system.text) > 0 and size(system.image) > 0


def test_the_drawn_picture_teaches_the_painter_through_a_resting_front():
    system, data = built("txt2img", weight_rr=0., weight_gen=0., weight_fi=1.)
    phase = system.phases(data, data)[0]
    phase.accelerator = Loop(system, []).accelerator
    phase.begin()
    phase.step(data[SOME])
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in system.generator.heads[-1].parameters())


def test_nothing_shrinks_a_painter_that_has_nothing_to_learn():
    "In phase 3 too, weight decay is for encoders and writer: with every term of the painter at 0, it stays where it was."
    system, data = built("full", weight_gen=0., weight_fi=0., weight_decay=1.)
    before = {name: weight.clone() for name, weight in system.named_parameters()}
    phase = system.phases(data, data)[0]
    phase.accelerator = Loop(system, []).accelerator
    phase.begin()
    phase.step(data[SOME])
    moved = {name.split(".")[0] for name, weight in system.named_parameters() if not weight.equal(before[name])}
    assert moved == {"image", "text", "writer", "judges"}
    assert [group["betas"] for group in phase.optimizers[0].param_groups] == [(.9, .999), (.5, .999)]


def test_the_papers_decay_is_for_painter_and_judges_too():
    for model in ("tim", "full"):
        system, data = built(model, painter_decay=.5)
        phase = system.phases(data, data)[0]
        phase.accelerator = Loop(system, []).accelerator
        phase.begin()
        theirs = [group for optimizer in phase.optimizers for group in optimizer.param_groups if group["betas"] == (.5, .999)]
        assert [group["weight_decay"] for group in theirs] == [.5, .5]
        drawing = [system.augmentation, system.generator, system.judges]
        assert sum(len(group["params"]) for group in theirs) == sum(len(list(module.parameters())) for module in drawing)


def test_data_of_one_class_teach_nothing_and_are_refused():
    system, data = built("vta")
    data.classes = torch.zeros_like(data.classes)
    with pytest.raises(ValueError, match="same_class=False"): system.phases(data, data)
    assert built("vta", same_class=False)[0].phases(data, data)


@pytest.mark.parametrize("kinds, tops", [(1, set()), (2, {1})])
def test_a_split_of_two_pictures_is_asked_what_it_can_answer(kinds, tops):
    "Two captions: there is no first three of two. One class and no attributes: nothing has a margin, so there is none."
    system, data = built("vta")
    whole = Laviter.open_data(system.config, "birds", "test", data.vocabulary).collection
    rows = whole.positions("test")
    chosen = [rows[0], next(row for row in rows[1:] if (whole.pictures[row].label == whole.pictures[rows[0]].label) == (kinds == 1))]
    pictures = [replace(one, split="test" if row in chosen else "train", captions=one.captions[:1]) for row, one in enumerate(whole.pictures)]
    few = replace(whole, pictures=tuple(pictures), attributes=None, attribute_names=())
    test = CollectionSplit(few, "test", data.transform, items="captions", vocabulary=data.vocabulary, specials=SPECIALS)
    scores = laviter.alignment_scores(system.eval(), test)
    assert {top for top in (1, 3) if f"R-precision, top {top}" in scores} == tops
    assert all(score.values for score in scores.values()) and "mean recall" in scores


def test_pairs_of_one_class_are_no_negatives():
    "Captions of one class only: nothing is left to be told apart, so the loss is 0; without the mask it is not."
    system, data = built("vta")
    batch = data[SOME[:8]]
    phase = system.phases(data, data)[0]
    with torch.no_grad(): seen, said = phase.see(batch), system.eval().hear(*phase.read(batch))
    one = torch.zeros(8, dtype=torch.long)
    assert float(matching(SMOKE, seen, said, one)) == pytest.approx(0, abs=1e-6)
    assert float(matching(replace(SMOKE, same_class=False), seen, said, one)) > .1


def test_codes_of_a_split_are_those_of_its_pictures_and_sentences(chain):
    "The road through kept features, and the one that strangers' pictures take."
    system = load(chain.folder)
    test = Laviter.open_data(system.config, "birds", "test", system.vocabulary)
    images, texts, owners = split_codes(system, test)
    assert owners.tolist() == np.repeat(np.arange(len(test.positions)), 10).tolist()
    assert (system.embed_texts([text for captions in test.texts[:2] for text in captions]) - texts[:20]).abs().max() < 1e-5
    strangers = torch.nn.functional.cosine_similarity(system.embed_images(pictures_of(test, range(6))), images[:6])
    assert strangers.mean() > .8                            # drawn at another size, so not the same to the last digit


def test_words_beyond_the_longest_are_cut_and_unknown_ones_are_heard(chain):
    system = load(chain.folder)
    long = " ".join(["bird"] * 40)
    assert system.embed_texts([long]).allclose(system.embed_texts([" ".join(["bird"] * system.config.longest)]), atol=1e-6)
    assert system.embed_texts(["quixotic zeppelin"]).isfinite().all()
    weights, words = system.attend(torch.zeros(1, 3, 32, 32), [long])
    assert len(words[0]) == system.config.longest == weights.shape[1]


def test_a_model_says_what_it_cannot_do():
    system, _ = built("vta")
    with pytest.raises(ValueError, match="does not write: train one of itm"): system.texts_from_images(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="does not draw: train one of tim"): system.images_from_texts(["a bird"])
    with pytest.raises(ValueError, match="is not cut"): Laviter(replace(SMOKE, backbone="efficientnet_lite0_middle"), system.vocabulary)


def test_the_whole_network_can_learn_but_for_its_first_layers():
    "The paper's reading of phase 3, with a small backbone."
    system, data = built("vta-trainable", tuned="all")
    phase = system.phases(data, data)[0]
    phase.accelerator = Loop(system, []).accelerator
    phase.begin()
    system.train()
    before = {name: weight.clone() for name, weight in system.image.own_front.named_parameters()}
    phase.step(data[SOME[:8]])
    moved = [name for name, weight in system.image.own_front.named_parameters() if not weight.equal(before[name])]
    assert moved and not any(name.startswith(("network.0.", "network.1.", "network.3.", "network.4.", "network.5.")) for name in moved)
    assert not isinstance(phase, Joint) and isinstance(system.hear(*phase.read(data[range(2)])), Said)


def test_a_front_that_learns_sees_another_part_each_time_and_the_middle_when_it_is_measured():
    system, data = built("vta-trainable", tuned="all", margin=1.5)
    rows = np.arange(4)
    see = lambda crops: laviter.looked_at(system.eval(), data, rows, 0, "cpu", crops)[0]
    with torch.no_grad(): middle, again, one, other = see(None), see(None), see((0, 0, rows)), see((0, 1, rows))
    assert middle.equal(again) and one.equal(see((0, 0, rows))) and not one.equal(middle) and not one.equal(other)


def test_what_nobody_has_said_of_a_picture_is_neither_true_nor_false():
    "AIMCoS of classes and of attributes; a text with an unknown word is not asked, and its column goes with it."
    _, data = built("vta")
    texts, familiar = short_texts(data)
    asked, present, known, over = what_is_true(data)
    assert asked == [text for text, sayable in zip(texts, familiar) if sayable] and len(asked) < len(texts) and over == "images"
    values = data.collection.attributes.copy()
    values[data.positions, np.flatnonzero(familiar)[3]] = np.nan
    data.collection = replace(data.collection, attributes=values)
    _, fewer, less, _ = what_is_true(data)
    assert known[:, 3].any() and not less[:, 3].any() and not fewer[:, 3].any()
    assert (np.delete(less, 3, 1) == np.delete(known, 3, 1)).all() and (np.delete(fewer, 3, 1) == np.delete(present, 3, 1)).all()
    data.collection = replace(data.collection, attributes=None, attribute_names=())
    data.class_names = ["zeppelin", *data.class_names[1:]]
    asked, present, known, over = what_is_true(data)
    assert "zeppelin" not in asked and present.shape == (len(data.positions), len(asked)) and known.all() and over == "texts"


@pytest.mark.parametrize("mask_pads", [True, False])
def test_a_code_does_not_depend_on_its_batch(mask_pads):
    system = built("vta", mask_pads=mask_pads)[0].eval()
    alone, beside = system.embed_texts(["a red bird"]), system.embed_texts(["a red bird", "a small bird that has a black bill and a white belly"])
    assert alone[0].allclose(beside[0], atol=1e-6)
    shorter = system.listen(["a bird"])
    assert shorter.words.shape[1] == (2 if mask_pads else system.config.longest) and shorter.lengths.tolist() == [2]


@pytest.mark.parametrize("changes", [{"said": "forced"}, {"wide_heads": True}, {"mask_pads": False}, {"mismatched": False}, {"root": True},
                                     {"longer": "subset", "longest": 6}, {"match_weight": 0.}, {"pixel_weight": 1.}, {"word": 8}, {"same_class": False},
                                     {"writer_norm_first": False}, {"uniform_noise": True}, {"margin": 1.25}])
def test_every_other_reading_takes_a_step(changes):
    "The flags of the table at the end of the system's notebook: each changes something, and nothing breaks."
    system, data = built("full", **changes)
    usual, _ = built("full")
    losses = []
    for one in (system, usual):
        phase = one.phases(data, data)[0]
        phase.accelerator = Loop(one, []).accelerator
        phase.begin()
        torch.manual_seed(1)
        losses.append(phase.step(data[SOME]))
    assert all(np.isfinite(float(value)) for value in losses[0].values())
    if "match_weight" not in changes:                       # of phase 2 alone
        assert any(abs(float(losses[0][name]) - float(losses[1][name])) > 1e-6 for name in losses[1])


@pytest.mark.parametrize("draw_mean", [True, False])
def test_pictures_are_of_samples_unless_the_middle_is_asked_for(draw_mean, monkeypatch):
    system, sampled = built("tim", draw_mean=draw_mean)[0].eval(), []
    monkeypatch.setattr(system.augmentation, "sample", lambda mean, log_variance: sampled.append(len(mean)) or mean)
    system.images_from_texts(["a red bird", "a bird"])
    assert sampled == ([] if draw_mean else [2])


def test_published_word_vectors_begin_the_embedding(tmp_path):
    "A file in GloVe's format, of another width than the space: they are projected."
    system, data = built("vta", word=4, word_vectors=str(tmp_path / "vectors.txt"))
    word = data.vocabulary.words[5]
    (tmp_path / "vectors.txt").write_text(f"{word} 1 2 3 4\n")
    system.prepare(data)
    assert system.text.words.weight[6].tolist() == [1, 2, 3, 4] and data.vocabulary.numbers[word] == 6
    assert system.embed_texts([word]).shape == (1, SMOKE.width)
