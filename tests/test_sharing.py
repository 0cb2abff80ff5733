"Systems for others: out and back for all five, the hub's calls, exported encoders beside the systems that they came from."
import json

import pytest
import torch

import crossmodal
from crossmodal.data.text import Vocabulary
from crossmodal.systems.experiments import SYSTEMS, plan
from crossmodal.systems.sharing import export_encoder
from crossmodal.training.runs import RunError

FEW = {"per_species": 2}
SMALL = {"embedmap": {"autoencoder": "conv-vae"}, "selfsup": FEW, "gxn": FEW, "laviter": FEW, "sdn": FEW}
SCORES = {"drawn attributes": {"values": [0., 50., 100.], "unit": "%", "chance": 18.4, "n": None},
          "FID": {"values": [123.], "unit": "", "chance": None, "n": 99}}
RECORD = {"data": {"name": "birds", "items": 1234}, "preset": "smoke", "seed": 0, "seconds": 12.3, "versions": {"crossmodal": "0.1.0"}, "commit": "abc",
          "measured": "test", "scores": SCORES}


@pytest.fixture(scope="module", params=SMALL)
def system(request):
    "Untrained, with pictures and sentences of its own data."
    made, kind = plan(request.param, preset="smoke", changes=SMALL[request.param]), SYSTEMS[request.param]
    torch.manual_seed(0)
    system = kind(made.config, Vocabulary.from_json(made.data["vocabulary"])).eval().requires_grad_(False)
    split = kind.open_data(made.config, kind.home, "val")
    batch = split[[0, 1, 2]]
    images = batch.images[-1] if isinstance(batch.images, tuple) else batch.images
    return system, images, split.vocabulary.decode(batch.captions)


def test_out_and_back(system, tmp_path):
    system, images, texts = system
    system.record = RECORD
    system.save_pretrained(tmp_path / "shared", "somebody/thing")
    for again in (crossmodal.load(tmp_path / "shared"), type(system).from_pretrained(tmp_path / "shared")):
        assert type(again) is type(system) and again.config == system.config and again.record == RECORD and not again.training
        assert torch.equal(again.embed_images(images), system.embed_images(images)) and torch.equal(again.embed_texts(texts), system.embed_texts(texts))
    card = (tmp_path / "shared" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: crossmodal\n") and "| drawn attributes | 50.00 % |" in card and "| 3 | 18.40 |" in card
    assert "| FID | 123.00  |  | 99 |  |" in card and 'crossmodal.load(\'somebody/thing\')' in card and "`seed`" not in card
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["README.md", "config.json", "model.safetensors", "run.json"]


def test_exported_pictures(system, tmp_path):
    system, images, _ = system
    assert export_encoder(system, system.embed_images, (images,), tmp_path / "images.pt2") < 1e-4
    found = torch.export.load(tmp_path / "images.pt2").module()(images[:2])
    torch.testing.assert_close(found, system.embed_images(images[:2]), rtol=0, atol=1e-4)


def test_exported_sentences(system, tmp_path):
    system, _, texts = system
    numbers = system.number(texts)
    assert export_encoder(system, system.embed_numbers, numbers, tmp_path / "texts.pt2") < 1e-4
    found = torch.export.load(tmp_path / "texts.pt2").module()(*[part[:2] for part in numbers])
    torch.testing.assert_close(found, system.embed_numbers(*[part[:2] for part in numbers]), rtol=0, atol=1e-4)


@pytest.fixture
def shared(tmp_path):
    made = plan("embedmap", preset="smoke")
    torch.manual_seed(0)
    return SYSTEMS["embedmap"](made.config, Vocabulary.from_json(made.data["vocabulary"])).save_pretrained(tmp_path / "shared")


@pytest.mark.parametrize("change, message", [
    (lambda about: about | {"format": 99}, "has format 99; this version of crossmodal reads format 1"),
    (lambda about: about | {"class": "Gxn"}, "^the stored configuration lacks"),
    (lambda about: about | {"class": "os.system"}, "which crossmodal does not know: SelfSup, "),
    (lambda about: about | {"config": about["config"] | {"autoencoder": "vq-vae"}}, "autoencoder='vq-vae'"),
    (lambda about: about | {"sha256": "0" * 64}, "expected SHA-256 000000000000"),
], ids=["format", "another class", "no class", "configuration", "checksum"])
def test_a_folder_that_is_not_right_is_refused(shared, change, message):
    path = shared / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message): crossmodal.load(shared)


def test_another_class_is_refused(shared):
    with pytest.raises(ValueError, match="holds a system of class EmbedMap, not Gxn"): SYSTEMS["gxn"].from_pretrained(shared)


def test_to_the_hub_and_from_it(shared, tmp_path, monkeypatch):
    "With a hub that is a folder: what is asked of the library, and what it gets."
    import huggingface_hub
    calls = []

    class Hub:
        def __init__(self, token=None): calls.append(("token", token))

        def create_repo(self, repo, private, exist_ok): calls.append(("create", repo, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            import shutil
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"hub/{repo_id}/commit/1"
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, revision, allow_patterns: str(tmp_path / "hub" / name))
    system = crossmodal.load(shared)
    assert system.push_to_hub("somebody/thing", private=True, token="secret") == "hub/somebody/thing/commit/1"
    assert calls == [("token", "secret"), ("create", "somebody/thing", True, True)]
    again = crossmodal.load("somebody/thing")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in system.state_dict().items())


def test_without_a_hub_the_error_says_what_to_check(monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__): raise ConnectionError("no route")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"somebody/nothing is no folder here, and cannot be fetched from the hub \(ConnectionError\)"):
        crossmodal.load("somebody/nothing")


def test_a_slip_in_the_name_of_a_run_does_not_ask_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def asked(*_, **__): raise AssertionError("the hub was asked")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text("{}")
    with pytest.raises(RunError, match="runs/mime is not a run folder"): crossmodal.load("runs/mime")
