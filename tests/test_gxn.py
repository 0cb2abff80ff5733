"Paper 003's system as a user meets it: runs that stand on others, a folder of one's own with unknown words, rewards that end sentences."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from crossmodal.data.text import END
from crossmodal.losses.ranking import described
from crossmodal.metrics.captions import CiderD
from crossmodal.metrics.retrieval import retrieval_ranks
from crossmodal.systems import experiments, gxn
from crossmodal.systems.base import pictures_of
from crossmodal.systems.experiments import evaluate, load, resume, train
from crossmodal.systems.gxn import GXN_PRESETS, Gxn, GxnConfig, rank_codes, split_codes
from crossmodal.training.config import apply_preset
from crossmodal.training.loop import Interrupted, Loop, StopOnSignal
from crossmodal.training.runs import open_run

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = apply_preset(GxnConfig(), GXN_PRESETS, "smoke")


@pytest.fixture(scope="module", autouse=True)
def no_judges():
    "How drawn pictures look is measured elsewhere."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gxn, "imagined_scores", lambda system, test: {})
        yield


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return train("gxn", preset="smoke", out=tmp_path_factory.mktemp("chain") / "whole", quiet=True)


def test_the_full_model_leaves_its_grounds_beside_it(chain):
    beside = {path.name: open_run(path) for path in chain.folder.parent.iterdir() if path != chain.folder}
    models = {name: run.record["config"]["model"] for name, run in beside.items()}
    assert sorted(models.values()) == ["fine-tune", "frozen", "i2t-mix", "i2t-xe", "t2i"]
    assert sorted(models[name] for name in chain.record["stands_on"]) == ["i2t-mix", "t2i"]
    assert all(run.finished and run.record["measured"] == "test" for run in beside.values())


def test_grounds_are_trained_once(chain, monkeypatch):
    trained = []
    fit = experiments.fit_run
    monkeypatch.setattr(experiments, "fit_run", lambda run, *args: trained.append(run.record["config"]["model"]) or fit(run, *args))
    train("gxn", preset="smoke", out=chain.folder.parent / "longer", changes={"model": "longer"}, quiet=True)
    assert trained == ["longer"]


def stopped_and_resumed(monkeypatch, phase, out, changes):
    "A training that is stopped after the second step of a phase; the command that is offered finishes everything."
    steps = []

    def stop(self, loop, after_step=StopOnSignal.after_step):
        steps.append(loop.phase.name)
        self.asked = self.asked or steps.count(phase) == 2
        after_step(self, loop)
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "after_step", stop)
        with pytest.raises(Interrupted): train("gxn", preset="smoke", out=out, changes=changes, quiet=True)
    return load(resume(out, quiet=True).folder).state_dict()


def test_a_chain_that_was_stopped_in_its_second_ground_goes_on_to_the_same_end(chain, tmp_path, monkeypatch):
    ours, theirs = stopped_and_resumed(monkeypatch, "fine-tune", tmp_path / "whole", {}), load(chain.folder).state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_folder_of_other_words_can_be_measured(chain, karpathy):
    scores = evaluate(chain.folder, karpathy)
    assert len(scores["image-to-text R@1"].values) == 3 and all(np.isfinite(score.values).all() for score in scores.values())
    words = Gxn.open_data(chain_config := load(chain.folder).config, karpathy, "test", load(chain.folder).vocabulary)
    assert chain_config.model == "i2t+t2i" and (words.captions == words.vocabulary.numbers["<unk>"]).sum() >= 3 * 5 * 3


def test_without_test_pictures_the_validation_split_is_measured_and_said(karpathy, tmp_path):
    content = json.loads((karpathy / "dataset.json").read_text())
    for entry in content["images"]: entry["split"] = "train" if entry["split"] == "test" else entry["split"]
    (karpathy / "dataset.json").write_text(json.dumps(content))
    run = train("gxn", karpathy, "smoke", tmp_path / "run", {"model": "gru"}, quiet=True)
    assert run.record["measured"] == "val" and len(run.record["scores"]["image-to-text R@1"]["values"]) == 1


def test_words_and_pairs_begin_at_a_regression_once_and_are_handed_on(tmp_path):
    run = train("gxn", preset="smoke", out=tmp_path / "run", changes={"model": "fine-tune", "pairs": True}, quiet=True)
    first, second = load(tmp_path / run.record["stands_on"][0]), load(run.folder)
    train_split = Gxn.open_data(first.config, "birds", "train")
    vocabulary, none = train_split.vocabulary, torch.iinfo(torch.long).max
    begun, empty = Gxn(first.config, vocabulary), Gxn(second.config, vocabulary)
    for system in (begun, empty): system.prepare(train_split)
    assert (begun.matcher.pairs.terms < none).sum() > 500 and (empty.matcher.pairs.terms == none).all()      # the second has them from the first
    assert first.matcher.pairs.terms.equal(begun.matcher.pairs.terms) and second.matcher.pairs.terms.equal(begun.matcher.pairs.terms)
    drift = [(system.matcher.words.weight - begun.matcher.words.weight).detach().abs().mean() for system in (first, second, Gxn(first.config, vocabulary))]
    assert 0 < drift[0] < drift[2] / 3 and 0 < drift[1] < drift[2] / 3                                       # learned on from there


DRAFT = {"model": "t2i", "draft": True, "guidance": 2.}


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    return train("gxn", preset="smoke", out=tmp_path_factory.mktemp("drafted") / "run", changes=DRAFT, quiet=True)


def test_a_draft_is_a_regression_from_the_codes_it_began_with_and_rests(drafted):
    ground, system = load(drafted.folder.parent / drafted.record["stands_on"][0]), load(drafted.folder)
    train_split = Gxn.open_data(system.config, "birds", "train")
    with torch.no_grad(): codes = ground.matcher.texts(train_split.captions.long(), train_split.lengths, "low")
    pictures = pictures_of(train_split, range(len(train_split.counts)))[train_split.picture_of].flatten(1)
    expected = Ridge(alpha=1.).fit(codes.double(), pictures.double()).predict(codes.double())
    assert np.abs(system.painter.draft(codes).detach().numpy() - expected).max() < 1e-3
    assert torch.allclose(system.painter.middle, codes.mean(0), atol=1e-5)


def test_guidance_goes_further_from_the_mean_in_drawings_and_not_in_training(drafted):
    system = load(drafted.folder)
    plain = Gxn(replace(system.config, guidance=1.), system.vocabulary).eval()
    plain.load_state_dict(system.state_dict())
    codes = torch.nn.functional.normalize(torch.randn(5, system.config.joint), dim=1)
    def paint(painter, mean_only):
        torch.manual_seed(0)
        with torch.no_grad(): return painter(codes, mean_only)[0]
    assert paint(system.painter, False).equal(paint(plain.painter, False))
    with torch.no_grad(): further = system.painter.draft(codes - system.painter.middle) - system.painter.draft.bias
    inside = lambda images: images.abs() < 1                    # what neither has cut off
    louder, quiet = paint(system.painter, True).flatten(1), paint(plain.painter, True).flatten(1)
    both = inside(louder) & inside(quiet)
    assert both.float().mean() > .5 and torch.allclose((louder - quiet)[both], further[both], atol=1e-4)


def test_a_painter_with_a_draft_that_was_stopped_goes_on_to_the_same_end(drafted, tmp_path, monkeypatch):
    ours, theirs = stopped_and_resumed(monkeypatch, "painter alone", tmp_path / "run", DRAFT), load(drafted.folder).state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("similarity", ["order", "cosine"])
def test_ranks_of_joined_codes_are_those_of_the_weighted_scores(similarity):
    "Against eq. 3 written out, on a whole split."
    config = replace(SMOKE, model="frozen", similarity=similarity, balance=.3)
    test = Gxn.open_data(config, "birds", "test")
    system = Gxn(config, test.vocabulary).eval()
    matcher, vectors = system.matcher, gxn.vector_table(system, test)[:, 0]
    with torch.no_grad():
        scores = 0
        for branch, weight in (("high", .3), ("low", .7)):
            v, t = matcher.images(vectors, branch).double(), matcher.texts(test.captions.long(), test.lengths, branch).double()
            scores = scores + weight * (v @ t.T if similarity == "cosine" else -(t[None] - v[:, None]).clamp(min=0).pow(2).sum(2))
    owners = split_codes(system, test)[2]
    plain, ours = retrieval_ranks(scores, owners), rank_codes(config, *split_codes(system, test))
    assert (plain.text_to_image - ours.text_to_image).abs().mean() < .02 and (plain.image_to_text - ours.image_to_text).abs().mean() < .02


def test_every_sentence_that_is_rewarded_ends_or_is_cut(chain):
    "The end is a word of the reward: a caption that stops short of it scores less."
    system = load(chain.folder)
    numbers = system.vocabulary.numbers
    reward = CiderD([["a red bird"], ["a blue bird"], ["a green beak"]], system.vocabulary, end=True)
    said = torch.tensor([[numbers["a"], numbers["red"], numbers["bird"], numbers[END]], [numbers["a"], numbers["red"], numbers["bird"], 0]])
    ended, cut = reward.score(said, [0, 0])
    assert ended > cut


def test_wrong_pairs_are_never_right_ones():
    said, sentences = torch.tensor([[4, 6], [4, 6], [7, 4], [7, -1]]), torch.tensor([4, 6, 7, 7])
    usable = ~described(said, sentences)[torch.arange(4), torch.arange(4).roll(1)]
    assert usable.tolist() == [True, False, True, False]


def test_nothing_of_the_frozen_part_is_in_a_checkpoint(chain):
    names = set(load(chain.folder).state_dict())
    assert any(name.startswith("end.") for name in names)
    assert not any("_conv_stem" in name or "front" in name for name in names)


def test_a_model_says_what_it_cannot_do():
    system = Gxn(replace(SMOKE, model="frozen"), Gxn.open_data(SMOKE, "birds", "test").vocabulary)
    with pytest.raises(ValueError, match="does not write: train one of i2t-xe"): system.texts_from_images(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="does not draw: train one of t2i"): system.images_from_texts(["a bird"])


def test_rates_fall_once_also_in_a_run_that_was_resumed():
    "All slow down in the second half of a phase, and not again when their states come back from a checkpoint."
    config = replace(SMOKE, model="i2t+t2i", joint_epochs=4, decay=.1, tuned_on=False)
    train = Gxn.open_data(config, "birds", "train")
    system = Gxn(config, train.vocabulary)

    def begun():
        phase = system.phases(train, train)[0]
        phase.accelerator = Loop(system, []).accelerator
        phase.begin()
        return phase

    def rates(phase, epoch):
        train.epoch = epoch
        phase.set_rates()
        return [[round(group["lr"] / rate, 6) for group, rate in zip(optimizer.param_groups, of)] for optimizer, of in zip(phase.optimizers, given)]

    phase = begun()
    given = [[group["lr"] for group in optimizer.param_groups] for optimizer in phase.optimizers]
    early, late = [[1.], [1., 1.], [1.], [1., 1.]], [[.1], [.1, .1], [.1], [.1, .1]]     # matcher; its picture half and writer; judge; its words and painter
    assert [rates(phase, epoch) for epoch in range(4)] == [early, early, late, late]
    again = begun()
    for optimizer, old in zip(again.optimizers, phase.optimizers): optimizer.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert rates(again, 3) == late
