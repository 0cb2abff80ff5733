"""AttnGAN's attention and generator beside loops over places and words, and a transcription with functional calls and weights taken by name."""
import math

import pytest
import torch
from test_stackgan import Plain, glu, prepared

from crossmodal.losses.adversarial import generator_loss, pair_judge_loss
from crossmodal.models.attention_gan import AttentionGenerator, WordAttention
from crossmodal.models.stackgan import StackDiscriminator

pytestmark = pytest.mark.usefixtures("one_thread")


def loop_attention(maps, words, lengths, matrix):
    "One place after the other, one word after the other, real words only."
    context, shares = torch.zeros_like(maps), maps.new_zeros(len(maps), words.shape[1], *maps.shape[2:])
    for b, length in enumerate(lengths.tolist()):
        keys = [matrix @ words[b, i] for i in range(length)]
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                scores = [sum(p * q for p, q in zip(maps[b, :, y, x].tolist(), key.tolist())) for key in keys]
                parts = [math.exp(score - max(scores)) for score in scores]
                for i, (part, key) in enumerate(zip(parts, keys)):
                    shares[b, i, y, x] = part / sum(parts)
                    context[b, :, y, x] += part / sum(parts) * key
    return context, shares


def drawn(b, c, h, w, t, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (b,), generator=g)
    return random(b, c, h, w), random(b, t, d), lengths


@pytest.mark.parametrize("b, c, h, w, t, d", [(1, 1, 1, 1, 1, 1), (3, 4, 2, 3, 5, 6), (4, 2, 5, 1, 1, 3), (2, 7, 4, 4, 9, 2), (7, 3, 1, 2, 8, 3)])
def test_attention_against_loops(b, c, h, w, t, d):
    attention, (maps, words, lengths) = WordAttention(d, c).double(), drawn(b, c, h, w, t, d)
    with torch.no_grad(): found, expected = attention(maps, words, lengths), loop_attention(maps, words, lengths, attention.project.weight)
    for ours, theirs in zip(found, expected): torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_slopes_of_attention():
    attention, (maps, words, lengths) = WordAttention(3, 2).double(), drawn(3, 2, 2, 2, 4, 3)
    inputs = maps.requires_grad_(), words.requires_grad_(), attention.project.weight
    def both(maps, words, matrix): return torch.func.functional_call(attention, {"project.weight": matrix}, (maps, words, lengths))
    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(lambda *inputs: both(*inputs)[0], inputs)


def plain_generator(network, c, z, words, lengths, width, sizes, residuals, training):
    p = Plain(network, training)
    times = int(math.log2(sizes[0])) - 2
    x = glu(p.norm(torch.cat([c, z], 1) @ p.tensors["first.0.weight"].T, "first.1")).reshape(len(c), width * 2 ** times, 4, 4)
    for k in range(times): x = p.up(x, f"first.{4 + k}")
    pictures, maps = [torch.tanh(p.conv(x, "heads.0.0", padding=1))], []
    for stage in range(len(sizes) - 1):
        name = f"refinements.{stage}"
        context, shares = loop_attention(x, words, lengths, p.tensors[f"{name}.attention.project.weight"])
        x = torch.cat([x, context], 1)
        for k in range(residuals):
            block = f"{name}.layers.{k}.layers"
            x = x + p.norm(p.conv(p.gated(x, f"{block}.0", f"{block}.1"), f"{block}.3", padding=1), f"{block}.4")
        x = p.up(x, f"{name}.layers.{residuals}")
        assert x.shape[1:] == (width, sizes[stage + 1], sizes[stage + 1])
        pictures.append(torch.tanh(p.conv(x, f"heads.{stage + 1}.0", padding=1)))
        maps.append(shares)
    return pictures, maps


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("width, sizes, residuals", [(4, (16, 32), 2), (3, (8, 16, 32), 1), (2, (8, 16), 0), (4, (32,), 2), (2, (8, 16), 3)])
def test_generator(width, sizes, residuals, training):
    network = prepared(AttentionGenerator(5, 6, 7, width, sizes, residuals)).train(training)
    c, z, words, lengths = *(torch.randn(3, n).double() for n in (5, 6)), torch.randn(3, 4, 7).double(), torch.tensor([2, 4, 1])
    with torch.no_grad(): expected, found = plain_generator(network, c, z, words, lengths, width, sizes, residuals, training), network(c, z, words, lengths)
    assert [picture.shape[2] for picture in found[0]] == list(sizes) and len(found[1]) == len(sizes) - 1
    for ours, theirs in zip(found, expected):
        for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def weights(condition, noise, words, width, sizes, residuals):
    "Added up from the description: no layer is asked."
    top = width * sizes[0] // 4
    total = (condition + noise) * 32 * top + 2 * 32 * top                                       # to 4 x 4, its normalisation
    while top > width: total, top = total + 9 * top * top + 2 * top, top // 2                   # to half the channels, doubled for the gate
    both = 2 * width
    block = 9 * both * 2 * both + 2 * 2 * both + 9 * both * both + 2 * both
    stage = words * width + residuals * block + 9 * both * both + 2 * both
    return total + (len(sizes) - 1) * stage + len(sizes) * 27 * width


BIRDS, COCO = (100, 100, 256, 32, (64, 128, 256), 2), (100, 100, 256, 48, (64, 128, 256), 3)


@pytest.mark.parametrize("options", [BIRDS, COCO, (9, 7, 5, 3, (8,), 2), (9, 7, 5, 3, (16, 32), 0)])
def test_number_of_weights(options):
    with torch.device("meta"): found = sum(p.numel() for p in AttentionGenerator(*options).parameters())
    assert found == weights(*options)
    if options == BIRDS: assert found == 6_981_792


def networks(seed=0):
    torch.manual_seed(seed)
    generator = AttentionGenerator(5, 6, 7, 4, (8, 16, 32), 1)
    return generator, torch.randn(6, 5), torch.randn(6, 6), torch.randn(6, 9, 7), torch.tensor([9, 1, 4, 6, 2, 9])


@pytest.mark.parametrize("garbage", [0., -1e30, math.inf, math.nan])
def test_pads_do_not_matter(garbage):
    generator, c, z, words, lengths = networks()
    pads = torch.arange(9) >= lengths[:, None]
    spoilt = words.masked_fill(pads[:, :, None], garbage).requires_grad_()
    words = words.requires_grad_()
    clean, dirty = (generator(c, z, x, lengths) for x in (words, spoilt))
    for a, b in zip(clean[0] + clean[1], dirty[0] + dirty[1]): assert torch.equal(a, b)
    for x, (pictures, _) in ((words, clean), (spoilt, dirty)):
        slope, *others = torch.autograd.grad(sum(picture.square().sum() for picture in pictures), (x, *generator.parameters()))
        assert slope.isfinite().all() and torch.equal(slope.abs().sum(2) > 0, ~pads)
        assert all(other.isfinite().all() for other in others)


@torch.no_grad()
def test_neighbours_and_longer_tables_do_not_matter():
    "In evaluation a caption is drawn alike alone, in another order, and beside longer ones."
    generator, c, z, words, lengths = networks()
    generator.eval()
    pictures, shares = generator(c, z, words, lengths)
    turned = generator(*(x.flip(0) for x in (c, z, words, lengths)))
    for a, b in zip(pictures + shares, turned[0] + turned[1]): torch.testing.assert_close(a, b.flip(0), atol=1e-5, rtol=0)
    for k, length in enumerate(lengths.tolist()):
        one, his = generator(c[k:k + 1], z[k:k + 1], words[k:k + 1, :length], lengths[k:k + 1])
        for a, b in zip(pictures, one): torch.testing.assert_close(a[k:k + 1], b, atol=1e-5, rtol=0)
        for a, b in zip(shares, his): torch.testing.assert_close(a[k:k + 1, :length], b, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_word_is_everywhere():
    attention, maps, words = WordAttention(7, 4), torch.randn(2, 4, 3, 3), torch.randn(2, 5, 7)
    context, shares = attention(maps, words, torch.tensor([1, 1]))
    assert (shares[:, 0] == 1).all() and (shares[:, 1:] == 0).all()
    torch.testing.assert_close(context, attention.project(words[:, 0])[:, :, None, None].expand_as(context))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_scores_beyond_half_precision(kind):
    "Scores of a million, infinite in float16, in an attention that is half precision throughout and in one under autocast."
    attention = WordAttention(4, 4)
    torch.nn.init.eye_(attention.project.weight)
    maps, words, lengths = torch.full((1, 4, 2, 2), 512.), torch.tensor([[[512.] * 4, [511.] * 4]]), torch.tensor([2])
    with torch.autocast("cpu", dtype=kind): context, shares = attention(maps, words, lengths)
    for found, dtype in ((context, torch.float32), (shares, torch.float32)): assert found.isfinite().all() and found.dtype == dtype
    context, shares = attention.to(kind)(maps.to(kind), words.to(kind), lengths)
    assert context.dtype == kind and shares.dtype == torch.float32
    if kind == torch.float16: assert (shares[0, 0] == 1).all() and (context == 512).all()


def test_a_step_of_the_game_under_autocast():
    "Judges and generator in bfloat16, channels last: finite slopes for every weight."
    generator, c, z, words, lengths = networks()
    judges = [StackDiscriminator(7, size, width=4) for size in generator.sizes]
    for network in (generator, *judges): network.to(memory_format=torch.channels_last)
    sentences, real = torch.randn(6, 7), [torch.rand(6, 3, size, size) * 2 - 1 for size in generator.sizes]
    usable = torch.tensor([True, False, True, True, False, True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pictures, shares = generator(c, z, words, lengths)
        for judge, x, picture in zip(judges, real, pictures):
            features = judge.features(x)
            loss = pair_judge_loss(judge.judge(features, sentences), judge(picture.detach(), sentences), judge.judge(features, sentences.roll(1, 0)), usable)
            loss.backward()
            assert all(p.grad.isfinite().all() for p in judge.parameters())
        sum(generator_loss(judge(picture, sentences)) for judge, picture in zip(judges, pictures)).backward()
    assert all(p.grad.isfinite().all() for p in generator.parameters()) and all(x.dtype == torch.float32 for x in shares)
    with torch.no_grad(): exact = generator.eval()(c, z, words, lengths)[0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16): coarse = generator(c, z, words, lengths)[0]
    for a, b in zip(exact, coarse): torch.testing.assert_close(a, b.float(), atol=.1, rtol=0)
    assert exact[2].is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_channels_last_changes_nothing():
    generator, c, z, words, lengths = networks()
    generator = prepared(generator).eval()
    usual = generator(c.double(), z.double(), words.double(), lengths)
    other = generator.to(memory_format=torch.channels_last)(c.double(), z.double(), words.double(), lengths)
    for a, b in zip(usual[0] + usual[1], other[0] + other[1]): torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_refusals():
    generator, c, z, words, lengths = networks()
    bad = {
        "from 0 to 9: expected 1 to 9": (c, z, words, lengths - (lengths == 1).long()),
        "from 1 to 9: expected 1 to 8": (c, z, words[:, :8], lengths),
        r"each of 6 captions, found \(5,\)": (c, z, words, lengths[:5]),
        r"\(5, 6, 6\) wide, this generator was built for \(5, 6, 7\)": (c, z, words[..., :6], lengths),
        r"\(4, 7, 7\) wide": (c[:, :4], torch.cat([z, c[:, 4:]], 1), words, lengths),                # as wide together as they should be
        r"maps \(6, 4, 8, 8\) and words \(1, 9, 7\)": (c, z, words[:1], lengths[:1]),                # would broadcast
    }
    for message, inputs in bad.items():
        with pytest.raises(ValueError, match=message): generator(*inputs)
    with pytest.raises(ValueError, match=r"expected \(b, 4, h, w\)"): WordAttention(7, 4)(torch.zeros(6, 3, 2, 2), words, lengths)
    for sizes in ((), (64, 192), (60, 120)):
        with pytest.raises(ValueError): AttentionGenerator(sizes=sizes)
