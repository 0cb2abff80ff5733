"""StackGAN-v2's networks beside a plain transcription of their description: functional calls, the condition tiled, weights taken by name."""
import pytest
import torch
from torch.nn import functional as F

from crossmodal.models.blocks import conditioned_conv3x3, conv3x3, initialize, with_condition
from crossmodal.models.stackgan import ConditioningAugmentation, StackDiscriminator, StackGenerator


def prepared(network, seed=0):
    "Weights as in training's first step, running statistics and biases that are not their starting values, double precision."
    torch.manual_seed(seed)
    initialize(network)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean") or name.endswith("bias"): tensor.normal_(0, .3)
        if name.endswith("running_var"): tensor.uniform_(.5, 2)
    return network.double()


def glu(x):
    half = x.shape[1] // 2
    return x[:, :half] * (1 / (1 + torch.exp(-x[:, half:])))


def leaky(x): return torch.where(x > 0, x, .2 * x)


def tile(c, side): return c.reshape(*c.shape, 1, 1).repeat(1, 1, side, side)


class Plain:
    "A network's tensors by name, and the layers of the description that use them."
    def __init__(self, network, training):
        self.tensors, self.training = {name: tensor.clone() for name, tensor in network.state_dict().items()}, training

    def conv(self, x, name, **options): return F.conv2d(x, self.tensors[name + ".weight"], self.tensors.get(name + ".bias"), **options)

    def norm(self, x, name):
        t = lambda part: self.tensors[f"{name}.{part}"].reshape(1, -1, *[1] * (x.dim() - 2))
        over = [k for k in range(x.dim()) if k != 1]
        mean, variance = (x.mean(over, keepdim=True), x.var(over, correction=0, keepdim=True)) if self.training else (t("running_mean"), t("running_var"))
        return (x - mean) / torch.sqrt(variance + 1e-5) * t("weight") + t("bias")

    def gated(self, x, conv, norm): return glu(self.norm(self.conv(x, conv, padding=1), norm))

    def up(self, x, name): return self.gated(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.1", f"{name}.2")


def plain_generator(network, c, z, width, sizes, residuals, training):
    p = Plain(network, training)
    times = {8: 1, 16: 2, 64: 4}[sizes[0]]
    x = glu(p.norm(torch.cat([c, z], 1) @ p.tensors["first.0.weight"].T, "first.1")).reshape(len(c), width * 2 ** times, 4, 4)
    for k in range(times): x = p.up(x, f"first.{4 + k}")
    pictures = [torch.tanh(p.conv(x, "heads.0.0", padding=1))]
    for stage in range(len(sizes) - 1):
        name = f"refinements.{stage}"
        x = p.gated(torch.cat([tile(c, x.shape[2]), x], 1), f"{name}.join.layers.0", f"{name}.join.layers.1")
        for k in range(residuals):
            block = f"{name}.layers.{k}.layers"
            x = x + p.norm(p.conv(p.gated(x, f"{block}.0", f"{block}.1"), f"{block}.3", padding=1), f"{block}.4")
        x = p.up(x, f"{name}.layers.{residuals}")
        pictures.append(torch.tanh(p.conv(x, f"heads.{stage + 1}.0", padding=1)))
    return pictures


def plain_discriminator(network, images, c, size, width, training):
    p, channels = Plain(network, training), width
    x = leaky(p.conv(images, "body.0", stride=2, padding=1))
    layer = 2
    while x.shape[2] > 4:
        x = leaky(p.norm(p.conv(x, f"body.{layer}.0", stride=2, padding=1), f"body.{layer}.1"))
        layer, channels = layer + 1, 2 * channels
    while channels > 8 * width:
        x = leaky(p.norm(p.conv(x, f"body.{layer}.0", padding=1), f"body.{layer}.1"))
        layer, channels = layer + 1, channels // 2
    assert x.shape[1:] == (channels, 4, 4) and f"body.{layer}.0.weight" not in p.tensors
    joint = leaky(p.norm(p.conv(torch.cat([tile(c, 4), x], 1), "conditional.0.0", padding=1), "conditional.0.1"))
    return p.conv(x, "unconditional").reshape(-1), p.conv(joint, "conditional.1").reshape(-1)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("width,sizes,residuals", [(4, (64, 128, 256), 2), (4, (16, 32), 3), (3, (8,), 1), (8, (8, 16, 32, 64), 1), (4, (16, 32), 0)])
def test_generator(width, sizes, residuals, training):
    network = prepared(StackGenerator(5, 7, width, sizes, residuals)).train(training)
    c, z = torch.randn(3, 5).double(), torch.randn(3, 7).double()
    with torch.no_grad(): expected, found = plain_generator(network, c, z, width, sizes, residuals, training), network(c, z)
    assert [picture.shape[2] for picture in found] == list(sizes)
    for ours, theirs in zip(found, expected): torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    if not training:
        with torch.no_grad(): found = network.float()(c.float(), z.float())
        for ours, theirs in zip(found, expected): torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("size", [8, 16, 64, 128, 256])
def test_discriminator(size, training):
    network = prepared(StackDiscriminator(5, size, width=4)).train(training)
    images, c = torch.rand(3, 3, size, size).double() * 2 - 1, torch.randn(3, 5).double()
    with torch.no_grad(): expected, found = plain_discriminator(network, images, c, size, 4, training), network(images, c)
    for ours, theirs in zip(found, expected): torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    if not training:
        with torch.no_grad(): found = network.float()(images.float(), c.float())
        for ours, theirs in zip(found, expected): torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


def test_verdict_order():
    network, images, c = prepared(StackDiscriminator(5, 16, width=4)).eval(), torch.randn(3, 3, 16, 16).double(), torch.randn(3, 5).double()
    unconditional, conditional = plain_discriminator(network, images, c, 16, 4, False)
    verdict = network(images, c)
    torch.testing.assert_close((verdict.unconditional, verdict.conditional), (unconditional, conditional))


def test_conditioning_augmentation():
    network = ConditioningAugmentation(6, 4).double()
    code, layer = torch.randn(5, 6).double(), network.layers[0]
    q = code @ layer.weight.T + layer.bias
    mean, log_variance = network(code)
    torch.testing.assert_close(mean, q[:, :4] * q[:, 8:12].sigmoid())
    torch.testing.assert_close(log_variance, q[:, 4:8] * q[:, 12:].sigmoid())
    torch.manual_seed(3); drawn = network.eval().sample(mean, log_variance)
    torch.manual_seed(3); noise = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(drawn, mean + torch.exp(log_variance / 2) * noise)


@pytest.mark.parametrize("side", [(2, 2), (2, 9), (3, 3), (16, 5)])
def test_condition_without_tiles(side):
    conv = conv3x3(6 + 3, 4).double()
    maps, c = torch.randn(2, 3, *side).double().requires_grad_(), torch.randn(2, 6).double().requires_grad_()
    plain, fast = conv(with_condition(maps, c)), conditioned_conv3x3(conv, maps, c)
    torch.testing.assert_close(fast, plain, atol=1e-12, rtol=0)
    towards = torch.randn_like(plain)
    for a, b in zip(*[torch.autograd.grad(out, (maps, c, conv.weight), towards) for out in (plain, fast)]): torch.testing.assert_close(b, a, atol=1e-11, rtol=0)
    assert torch.autograd.gradcheck(lambda maps, c: conditioned_conv3x3(conv, maps, c), (maps, c))
