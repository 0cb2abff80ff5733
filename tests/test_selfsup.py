"Paper 000's system: every reading runs and makes a difference, a run can be loaded, and one that was stopped in any phase ends as if it had not been."
import json
import shutil

import numpy as np
import pytest
import torch

import crossmodal
from crossmodal.data.captioned import open_dataset
from crossmodal.systems import selfsup
from crossmodal.systems.base import abilities
from crossmodal.systems.experiments import resume, train
from crossmodal.systems.selfsup import SELFSUP_PRESETS, WAYS, GanPhase, MmdPhase, PicturePhase, SelfSup, SelfSupConfig
from crossmodal.training.checkpoint import latest_checkpoint
from crossmodal.training.config import apply_preset, override
from crossmodal.training.loop import EarlyStop, Interrupted, Loop, Metrics, StopOnSignal
from crossmodal.training.runs import RunError

pytestmark = pytest.mark.usefixtures("one_thread")
CHANGES = {"image_epochs": 2, "text_epochs": 2, "gan_epochs": 3, "mmd_epochs": 3, "text_batch": 270, "gan_batch": 27, "mmd_batch": 27}


@pytest.fixture(scope="module", autouse=True)
def no_judging():
    "How good anything is after a second of training is not asked here."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfsup, "rebuilding_scores", lambda system, test: {})
        patch.setattr(selfsup, "attribute_scores", lambda system, test: {})
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train("selfsup", preset="smoke", out=tmp_path_factory.mktemp("whole") / "run", changes=CHANGES, quiet=True)


def tiny(**changes):
    "A fresh system, its configuration and its training pictures."
    config = override(apply_preset(SelfSupConfig(), SELFSUP_PRESETS, "smoke"), changes)
    torch.manual_seed(0)
    data = SelfSup.open_data(config, "birds", "train")
    return SelfSup(config, data.vocabulary), config, data


def first_losses(phase_of, **changes):
    "The losses of one step."
    system, _, data = tiny(**changes)
    system.prepare(data)
    phase = phase_of(system, data)
    phase.accelerator = Loop(system, [phase]).accelerator
    dataset = phase.begin()
    torch.manual_seed(1)
    system.train()
    return {name: float(value) for name, value in phase.step(dataset[range(12)]).items()}


def pictures(system, data): return PicturePhase(system, data, data)
def gan(system, data): return GanPhase(system, data, 1, 12)
def mmd(system, data): return MmdPhase(system, data, 1, 12)


@pytest.mark.parametrize("phase, changes", [
    (pictures, {"bounded": True}), (pictures, {"wrong_pictures": True}), (pictures, {"colour_weight": 40.}), (pictures, {"pixel_weight": 10.}),
    (pictures, {"kl_weight": 0.}), (pictures, {"augment": False}), (pictures, {"branches": 1}), (pictures, {"branches": 3}), (gan, {"image_code": "sample"}),
    (gan, {"image_code": "mean"}), (gan, {"matched": True}), (gan, {"pads_count": True}), (mmd, {"image_code": "mean"}), (mmd, {"matched": True}),
    (mmd, {"one_sided_weight": 16.}), (mmd, {"mmd_root": True})])
def test_every_reading_runs_and_makes_a_difference(phase, changes):
    default, other = first_losses(phase), first_losses(phase, **changes)
    assert np.isfinite([*default.values(), *other.values()]).all()
    assert default != other
    assert first_losses(phase) == default                       # it is the reading, not the dice


def test_a_text_file_is_learned_first_and_brings_its_words(tmp_path):
    (tmp_path / "news.txt").write_text("a zeppelin crossed the channel .\nnobody saw it .\n" + "long " * 80 + "\n")
    system, config, data = tiny(text_file=str(tmp_path / "news.txt"))
    assert "zeppelin" in data.vocabulary.words and "bird" in data.vocabulary.words
    phase = system.phases(data, data)[1]
    assert (phase.name, len(phase.train)) == ("any text", 2)    # the third line is too long
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no line of 1 to 73 words"): selfsup.file_sentences(tmp_path / "empty.txt", data.vocabulary)


def test_word_vectors_are_taken_and_stay(tmp_path, capsys):
    (tmp_path / "vectors.txt").write_text("bird " + " ".join(["0.5"] * 100) + "\nzeppelin " + " ".join(["1"] * 100) + "\n")
    system, _, data = tiny(word_vectors=str(tmp_path / "vectors.txt"))
    system.prepare(data)
    assert "1 of" in capsys.readouterr().out
    assert torch.equal(system.texts.words.weight[data.vocabulary.numbers["bird"]], torch.full((100,), .5))
    assert not system.texts.words.weight.requires_grad
    assert tiny(word_vectors=str(tmp_path / "vectors.txt"), freeze_words=False)[0].texts.words.weight.requires_grad     # the paper only begins with them
    assert tiny()[0].texts.words.weight.requires_grad


def test_a_single_picture_at_the_end_of_an_epoch():
    system, _, data = tiny()
    phase = pictures(system, data)
    phase.accelerator = Loop(system, [phase]).accelerator
    dataset = phase.begin()
    assert all(value.isfinite() for value in phase.step(dataset[[len(dataset) - 1]]).values())


def test_bounded_critics_stay_bounded():
    system, config, data = tiny(gan_epochs=2)
    Loop(system, [gan(system, data)]).fit()
    weights = [weight.abs().max() for weight in system.mappings["gan"]["text-to-image"]["critic"].parameters()]
    assert max(weights) <= config.critic_bound
    assert max(weight.abs().max() for weight in system.mappings["gan"]["image-to-text"]["critic"].parameters()) > config.critic_bound


def test_a_run_is_loaded_with_all_its_abilities(whole):
    system = crossmodal.load(whole.folder)
    assert abilities(system) == ["embeds pictures", "embeds sentences", "sentence to picture", "picture to sentence", "embedding to picture",
                                 "embedding to sentence", "embeds words"]
    texts = ["a small red bird with a long bill", "this bird is blue"]
    drawn = system.images_from_texts(texts)
    assert drawn.shape == (2, 3, 32, 32) and drawn.abs().max() <= 1
    said = system.texts_from_images(drawn)
    assert len(said) == 2 and all(isinstance(text, str) for text in said)
    assert system.embed_images(drawn).shape == system.embed_texts(texts).shape == (2, 100)
    assert torch.equal(system.embed_texts(texts), system.embed_texts(texts))
    assert system.vocabulary == open_dataset("birds", "train", per_species=2, specials=("<start>", "<end>", "<unk>")).vocabulary


@pytest.mark.parametrize("ask, complaint", [
    (lambda system: system.embed_texts(["a red bird", "xyzzy plugh"]), "no word of 'xyzzy plugh' is known"),
    (lambda system: system.images_from_embeddings(torch.zeros(2, 32)), r"codes are \(b, 100\), found shape \(2, 32\)"),
    (lambda system: system.texts_from_embeddings(torch.zeros(100)), r"found shape \(100,\)"),
    (lambda system: system.images_from_images(torch.zeros(1, 1, 32, 32)), "grey ones are shown with"),
    (lambda system: system.texts_from_images(torch.zeros(1, 3, 4, 32)), "4 x 32 pixels are too small")])
def test_bad_input_is_named(whole, ask, complaint):
    with pytest.raises(ValueError, match=complaint): ask(crossmodal.load(whole.folder))


def test_words_that_do_not_fit_the_weights(whole, tmp_path):
    copy = shutil.copytree(whole.folder, tmp_path / "run")
    record = json.loads((copy / "run.json").read_text())
    record["data"]["vocabulary"]["words"].pop()
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="do not fit the configuration and the words"): crossmodal.load(copy)


def test_splits_share_the_words_of_a_run(tmp_path):
    (tmp_path / "news.txt").write_text("a zeppelin crossed the channel\n")
    _, config, data = tiny(text_file=str(tmp_path / "news.txt"))
    (tmp_path / "news.txt").unlink()                            # elsewhere a run must do without the file
    test = SelfSup.open_data(config, "birds", "test", data.vocabulary)
    assert test.vocabulary == data.vocabulary and int(test.captions.max()) < len(data.vocabulary)


def test_pictures_without_captions_train_what_they_can(capsys):
    system, _, data = tiny()
    data.captions, data.lengths = data.captions[:0], data.lengths[:0]
    assert [phase.name for phase in system.phases(data, data)] == ["pictures"]
    assert "has no captions here" in capsys.readouterr().out


def test_a_text_file_is_learned_to_its_end_where_no_caption_says_when_to_stop(tmp_path):
    (tmp_path / "news.txt").write_text("a zeppelin crossed the channel .\nnobody saw it .\n")
    system, _, data = tiny(text_file=str(tmp_path / "news.txt"), pretrain_epochs=3, text_patience=1)
    data.captions, data.lengths = data.captions[:0], data.lengths[:0]
    phase = system.phases(data, data)[1]
    loop, ended = Loop(system, [phase], [metrics := Metrics(tmp_path), EarlyStop(metrics)]), []
    phase.validate = lambda validate=phase.validate: ended.append(validate()) or ended[-1]
    loop.fit()
    assert ended == [{}] * 3 and system.texts.out.weight.isfinite().all()


@pytest.mark.parametrize("step", [2, 7, 11, 15])               # pictures (6 steps), captions (4), gan (6), mmd (6)
def test_stopped_in_any_phase_and_resumed(whole, tmp_path, monkeypatch, step):
    def stop(self, loop): self.asked = self.asked or loop.total == step
    after = StopOnSignal.after_step
    monkeypatch.setattr(StopOnSignal, "after_step", lambda self, loop: (stop(self, loop), after(self, loop)))
    with pytest.raises(Interrupted): train("selfsup", preset="smoke", out=tmp_path / "run", changes=CHANGES, quiet=True)
    monkeypatch.undo()
    run = resume(tmp_path / "run", quiet=True)
    ours, theirs = (latest_checkpoint(folder / "checkpoints").model for folder in (run.folder, whole.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run.record["scores"] == whole.record["scores"]
    assert {f"{kind} {way} class accuracy" for kind in ("gan", "mmd") for way in WAYS} <= set(run.record["scores"])
