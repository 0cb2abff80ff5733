"Every phase of every system learns in half precision: each step is finite, and the weights stay single."
import pytest
import torch

from crossmodal.systems.experiments import find_system
from crossmodal.training.config import apply_preset, override
from crossmodal.training.loop import Loop

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"selfsup": {"gan_epochs": 1, "mmd_epochs": 1, "text_file": "news.txt"}, "embedmap": {"autoencoder_images": 400, "mapping_images": 400},
         "embedmap-direct": {"mapping_images": 400}, "gxn": {"per_species": 1}, "laviter": {"per_species": 1},
         "sdn": {"text": "words", "calibrated": True, "normalize": True, "falling": True}}
MODELS = {"gxn": ("gru", "fine-tune", "i2t-mix", "i2t+t2i"), "laviter": ("vta", "damsm", "tim", "itm", "vta-trainable", "full"),
          "sdn": ("text", "teacher", "sdn", "diverse", "gan-int-cls", "stackgan")}
CASES = [
    ("selfsup", {}), ("selfsup", {"colour_weight": 1., "wrong_pictures": True, "one_sided_weight": 16., "image_code": "sample"}),
    *(("selfsup-baseline", {"autoencoder": kind}) for kind in ("resnet", "com-rec", "compressive")), ("embedmap", {}), ("embedmap-direct", {}),
    *((name, {"model": model}) for name, models in MODELS.items() for model in models), ("laviter", {"model": "full", "tuned": "all"})]


@pytest.mark.parametrize("name, changes", CASES, ids=[" ".join([name, *map(str, changes.values())]) for name, changes in CASES])
def test_half_precision_trains(tmp_path, monkeypatch, name, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "news.txt").write_text("a zeppelin crossed the channel .\nnobody saw it .\n")
    kind = find_system(name)
    config = override(apply_preset(kind.Config(), kind.presets, "smoke"), SHORT.get(name, {}) | changes | {"precision": "bf16"})
    data = kind.open_data(config, kind.home, "train")
    torch.manual_seed(0)
    system = kind(config, data.vocabulary)
    system.prepare(data)
    phases, learned = system.phases(data, data), set()
    for phase in phases:
        def step(batch, phase=phase, step=phase.step):
            losses = step(batch)
            assert losses and all(torch.isfinite(value) for value in losses.values()), phase.name
            learned.add(phase.name)
            return losses
        phase.step = step
    Loop(system, phases, precision=config.precision).fit()
    assert learned == {phase.name for phase in phases}
    assert all(value.isfinite().all() and value.dtype not in (torch.bfloat16, torch.float16) for value in system.state_dict().values())
