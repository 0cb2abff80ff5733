"""Attention and layers beside torch's own with the same weights; positions in plain loops; a cached captioner beside one that begins anew for each word."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from crossmodal.data.text import PAD
from crossmodal.losses.sequence import caption_loss
from crossmodal.models.captioners import choosable, write_beams, write_greedily
from crossmodal.models.text_encoders import LstmEncoder
from crossmodal.models.transformer_captioner import DecoderLayer, TransformerCaptioner
from crossmodal.models.transformers import Attention, EncoderLayer, TransformerEncoder, map_sinusoids, sinusoids

START, END = 1, 2
SEEDS = (1, 3, 5)                       # their sentences differ; those of 3 end at different words

pytestmark = pytest.mark.usefixtures("one_thread")


def scattered(module, seed=0, std=.3):
    "Random weights, offsets and gains, so that nothing is 0 or 1 by accident."
    torch.manual_seed(seed)
    for p in module.parameters(): nn.init.normal_(p, std=std)
    return module.double()


@torch.no_grad()
def copy_attention(ours, theirs):
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in (ours.query, ours.key, ours.value)]))
    theirs.in_proj_bias.copy_(torch.cat([part.bias for part in (ours.query, ours.key, ours.value)]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def copy_layer(ours, theirs):
    if isinstance(ours, DecoderLayer):
        copy_attention(ours.back, theirs.self_attn); copy_attention(ours.picture, theirs.multihead_attn)
    else: copy_attention(ours.attention, theirs.self_attn)
    for mine, name in ((ours.feed[0], "linear1"), (ours.feed[3], "linear2")): getattr(theirs, name).load_state_dict(mine.state_dict())
    for k, add in enumerate(ours.add, 1): getattr(theirs, f"norm{k}").load_state_dict(add.norm.state_dict())


def ragged(b=3, t=6):
    return torch.arange(t) < torch.tensor([t, 2, 4])[:b, None]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_torchs(heads):
    ours, theirs = scattered(Attention(12, heads)), nn.MultiheadAttention(12, heads, batch_first=True).double()
    copy_attention(ours, theirs)
    queries, keys, values = (torch.randn(3, n, 12, dtype=torch.double, requires_grad=True) for n in (5, 6, 6))
    for real in (None, ragged()):
        found = ours(queries, ours.memory(keys, values), real)
        wanted = theirs(queries, keys, values, None if real is None else ~real, average_attn_weights=False)
        torch.testing.assert_close(found, wanted[0])
        torch.testing.assert_close(ours.shares(queries, ours.memory(keys, values), real), wanted[1])
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), (queries, keys, values), retain_graph=True) for x in (found, wanted[0]))):
            torch.testing.assert_close(a, b)
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.double)
    torch.testing.assert_close(ours(keys, ours.memory(keys, values), causal=True), theirs(keys, keys, values, attn_mask=causal)[0])


def test_wide_heads_by_loops():
    "Released code of paper 001: every head has the full width, and scores are divided by its root."
    ours, x = scattered(Attention(6, 4, wide_heads=True)), torch.randn(2, 3, 6, dtype=torch.double)
    heads = []
    for h in range(4):
        q, k, v = (F.linear(x, part.weight[6 * h:6 * h + 6], part.bias[6 * h:6 * h + 6]) for part in (ours.query, ours.key, ours.value))
        taken = torch.zeros_like(x)
        for b in range(2):
            for i in range(3):
                scores = [math.exp((q[b, i] @ k[b, j]).item() / math.sqrt(6)) for j in range(3)]
                for j in range(3): taken[b, i] += scores[j] / sum(scores) * v[b, j].detach()
        heads.append(taken)
    torch.testing.assert_close(ours(x, ours.memory(x, x)), ours.out(torch.cat(heads, 2)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_is_torchs(norm_first):
    ours = scattered(EncoderLayer(12, 4, 20, norm_first=norm_first))
    theirs = nn.TransformerEncoderLayer(12, 4, 20, 0., batch_first=True, norm_first=norm_first).double().train()        # train: not the fused path
    copy_layer(ours, theirs)
    x, real = torch.randn(3, 6, 12, dtype=torch.double), ragged()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, real=real)[real], theirs(x, src_key_padding_mask=~real)[real])


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_is_torchs(norm_first):
    ours = scattered(DecoderLayer(12, 4, 20, norm_first=norm_first))
    theirs = nn.TransformerDecoderLayer(12, 4, 20, 0., batch_first=True, norm_first=norm_first).double()
    copy_layer(ours, theirs)
    words, regions = torch.randn(3, 5, 12, dtype=torch.double), torch.randn(3, 9, 12, dtype=torch.double)
    seen = ours.picture.memory(regions, regions)
    found, said = ours(words, torch.zeros(5, 12, dtype=torch.double), seen, tuple(x[:, :, :0] for x in seen))
    torch.testing.assert_close(found, theirs(words, regions, nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.double), tgt_is_causal=True))
    assert [x.shape for x in said] == [(3, 4, 5, 3)] * 2


def test_places_reach_queries_and_keys_only():
    "DETR's layer, written with torch's attention: q = k = x + places, values x."
    places = torch.randn(6, 12, dtype=torch.double)
    x, regions, of_regions = (torch.randn(3, n, 12, dtype=torch.double) for n in (6, 9, 9))
    encoder, decoder = scattered(EncoderLayer(12, 4, 20, norm_first=True)), scattered(DecoderLayer(12, 4, 20), 1)
    mha = []
    for ours in (encoder.attention, decoder.back, decoder.picture):
        mha.append(nn.MultiheadAttention(12, 4, batch_first=True).double()); copy_attention(ours, mha[-1])
    h = encoder.add[0].norm(x)
    y = x + mha[0](h + places, h + places, h)[0]
    torch.testing.assert_close(encoder(x, places), y + encoder.feed(encoder.add[1].norm(y)))
    h = decoder.add[0].norm(x)
    y = x + mha[1](h + places, h + places, h, attn_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.double))[0]
    y = y + mha[2](decoder.add[1].norm(y) + places, regions + of_regions, regions)[0]
    seen = decoder.picture.memory(regions + of_regions, regions)
    torch.testing.assert_close(decoder(x, places, seen, tuple(x[:, :, :0] for x in seen))[0], y + decoder.feed(decoder.add[2].norm(y)))


def test_sinusoids_by_loops():
    table = sinusoids(torch.arange(7, dtype=torch.double), 10)
    for p in range(7):
        for i in range(5):
            angle = p / 10_000 ** (2 * i / 10)
            for found, wanted in zip(table[p, 2 * i:2 * i + 2].tolist(), (math.sin(angle), math.cos(angle))): assert math.isclose(found, wanted, abs_tol=1e-6)


@pytest.mark.parametrize("rows, columns", [(17, 17), (3, 5), (1, 1)])
def test_map_sinusoids_are_detrs(rows, columns):
    "DETR counts by a running sum over a mask, divides by the last count, times 2 pi; the row's half comes first."
    y, x = torch.ones(rows, columns).cumsum(0), torch.ones(rows, columns).cumsum(1)
    y, x = y / (y[-1:] + 1e-6) * 2 * math.pi, x / (x[:, -1:] + 1e-6) * 2 * math.pi
    temper = 10_000 ** (2 * (torch.arange(16) // 2) / 16)
    halves = [torch.stack([(p[..., None] / temper)[..., 0::2].sin(), (p[..., None] / temper)[..., 1::2].cos()], 3).flatten(2) for p in (y, x)]
    torch.testing.assert_close(map_sinusoids(rows, columns, 32), torch.cat(halves, 2).flatten(0, 1), atol=2e-5, rtol=0)


def captions_of(lengths, words=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    some = torch.randint(1, words, (len(lengths), max(lengths)), generator=g)
    return some.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], PAD)


@pytest.mark.parametrize("options", [{}, {"layers": 3}, {"wide_heads": True}, {"word_width": 6}])
def test_text_encoder_beside_torchs_parts(options):
    ours = scattered(TransformerEncoder(20, 12, 4, feed=20, dropout=0., **options))
    captions = captions_of([6, 1, 4])
    real = captions != PAD
    x = F.embedding(captions, ours.words.weight)
    if "word_width" in options: x = x @ ours.project.weight.T
    x = x + sinusoids(torch.arange(6), 12)
    for layer in ours.layers:
        if "wide_heads" in options: x = layer(x, real=real)
        else:
            theirs = nn.TransformerEncoderLayer(12, 4, 20, 0., batch_first=True).double(); copy_layer(layer, theirs)
            x = theirs(x, src_key_padding_mask=~real)
    features, sentences = ours(captions)
    for row, length in enumerate((6, 1, 4)):
        torch.testing.assert_close(features[row, :length], x[row, :length])
        torch.testing.assert_close(sentences[row], x[row, :length].mean(0))
        assert not features[row, length:].any()


@pytest.mark.parametrize("encoder", [TransformerEncoder(20, 12, 4, layers=2), TransformerEncoder(20, 12, 4, wide_heads=True), LstmEncoder(20, 12, 7)])
def test_no_sentence_depends_on_its_neighbours(encoder):
    encoder = encoder.double().eval()
    captions = captions_of([9, 3, 1, 6])
    features, sentences = encoder(captions)
    for row, length in enumerate((9, 3, 1, 6)):
        for more in (0, 5):
            alone = encoder(F.pad(captions[row:row + 1, :length], (0, more)))
            torch.testing.assert_close(alone[0][0, :length], features[row, :length]); torch.testing.assert_close(alone[1][0], sentences[row])
            assert not alone[0][0, length:].any()


def test_pads_that_are_read():
    "The released reading: no mask, pads have a vector of their own, the mean is over all places."
    masked = scattered(TransformerEncoder(20, 12, 4, feed=20, dropout=0.))
    read = TransformerEncoder(20, 12, 4, feed=20, dropout=0., mask_pads=False).double(); read.load_state_dict(masked.state_dict())
    captions = captions_of([6, 1, 4])
    features, sentences = read(captions)
    torch.testing.assert_close(sentences, features.mean(1))
    as_words = captions.masked_fill(captions == PAD, 7)                     # if the pad were word 7, ...
    with torch.no_grad(): read.words.weight[PAD] = read.words.weight[7]; masked.words.weight[PAD] = 0
    torch.testing.assert_close(read(captions)[1], masked(as_words)[1])      # ... it would be read like word 7
    torch.testing.assert_close(read(captions)[1][0], masked(captions)[1][0])
    assert not torch.allclose(read(captions)[1][1:], masked(captions)[1][1:], atol=.01)
    read(captions)[1].sum().backward()
    assert read.words.weight.grad[PAD].any()                                # and is learned


def test_lstm_encoder_cell_by_cell():
    encoder = scattered(LstmEncoder(20, 8, 5, dropout=0.))
    captions = captions_of([5, 2])
    features, sentences = encoder(captions)
    weights = encoder.lstm.state_dict()
    for row, length in enumerate((5, 2)):
        words, halves, last = encoder.words(captions[row, :length]), [], []
        for way, places in (("", range(length)), ("_reverse", reversed(range(length)))):
            cell = nn.LSTMCell(5, 4).double()
            cell.load_state_dict({name: weights[f"{name}_l0{way}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
            state, found = None, {}
            for k in places: state = cell(words[k:k + 1], state); found[k] = state[0][0]
            halves.append(torch.stack([found[k] for k in range(length)])); last.append(state[0][0])
        torch.testing.assert_close(features[row, :length], torch.cat(halves, 1)); torch.testing.assert_close(sentences[row], torch.cat(last))


def captioner(seed=3, words=12, std=.8, **options):
    "In float64, and far from where all words are equally likely."
    torch.manual_seed(seed)
    made = TransformerCaptioner(words, START, END, **dict(regions=6, width=16, heads=4, layers=2, feed=32, most=12) | options)
    for p in made.parameters():
        if p.ndim > 1: nn.init.normal_(p, std=std)
    return made.double().eval(), torch.randn(7, 6, 3, 4, dtype=torch.double)


CAPTIONS = torch.tensor([[1, 5, 3, 8, 2, 0, 0], [1, 4, 6, 3, 3, 9, 2], [1, 2, 0, 0, 0, 0, 0]])


def anew(model, regions):
    "The whole network again for each word, captions filled up to the table's length."
    def step(words, state):
        rows, prefix = state
        prefix = torch.cat([prefix, words[:, None]], 1)
        length = prefix.shape[1]
        return model(regions[rows], F.pad(prefix, (0, len(model.places.weight) + 1 - length)))[:, length - 1], (rows, prefix)
    return step, (torch.arange(len(regions)), torch.empty(len(regions), 0, dtype=torch.long))


@pytest.mark.parametrize("norm_first", [False, True])
def test_captioner_beside_torchs_stacks(norm_first):
    "With the places silenced, torch's encoder and decoder stacks give the same scores."
    model, maps = captioner(norm_first=norm_first)
    with torch.no_grad(): model.places.weight.zero_()
    encoder, decoder = [], []
    for mine, theirs, kind in ((model.encoder, encoder, nn.TransformerEncoderLayer), (model.decoder, decoder, nn.TransformerDecoderLayer)):
        for layer in mine: theirs.append(kind(16, 4, 32, 0., batch_first=True, norm_first=norm_first).double()); copy_layer(layer, theirs[-1])
    x = model.project(maps[:3].flatten(2).transpose(1, 2))
    for layer in encoder: x = layer(x)
    seen = model.regions_end(x)
    h = F.layer_norm(model.words(CAPTIONS[:, :-1]), (16,), model.enter[0].weight, model.enter[0].bias)
    for layer in decoder: h = layer(h, seen, nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.double), tgt_is_causal=True)
    flat = lambda rows, columns, width, device: torch.zeros(rows * columns, width, dtype=torch.double)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crossmodal.models.transformer_captioner.map_sinusoids", flat)
        torch.testing.assert_close(model(maps[:3], CAPTIONS), model.out(model.words_end(h)))
    assert not torch.allclose(model(maps[:3], CAPTIONS), model.out(model.words_end(h)), atol=.01)


def test_no_word_knows_of_a_later_one():
    model, maps = captioner()
    before = model(maps[:3], CAPTIONS)
    for k in range(1, 7):
        other = CAPTIONS.clone(); other[:, k:] = torch.randint(3, 12, other[:, k:].shape)
        after = model(maps[:3], other)
        assert torch.equal(after[:, :k], before[:, :k])
        if k < 6: assert not torch.allclose(after[:, k:], before[:, k:], atol=.01)
    for row, length in enumerate((5, 7, 2)):                                # nor of pads
        torch.testing.assert_close(model(maps[row:row + 1], CAPTIONS[row:row + 1, :length])[0], before[row, :length - 1])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_with_and_without_memory(seed, norm_first):
    model, maps = captioner(seed, norm_first=norm_first)
    written = model.greedy(maps, 12)
    assert torch.equal(written, write_greedily(*anew(model, maps), START, END, 12)) and len(written.unique(dim=0)) == 7
    assert torch.equal(written, model.beams(maps, 12, width=1)[0])


@pytest.mark.parametrize("width, power", [(1, 0), (2, 0), (5, 0), (5, 1), (20, .7)])
@pytest.mark.parametrize("seed", SEEDS)
def test_beams_with_and_without_memory(seed, width, power):
    model, maps = captioner(seed)
    (slow, slow_totals), (fast, fast_totals) = write_beams(*anew(model, maps), START, END, 8, width, power), model.beams(maps, 8, width, power)
    assert torch.equal(slow, fast)
    torch.testing.assert_close(slow_totals, fast_totals, atol=1e-5, rtol=1e-5)


def test_no_picture_depends_on_its_neighbours():
    model, maps = captioner()
    for write in (lambda some: model.greedy(some, 12), lambda some: model.beams(some, 12, 4)[0]):
        together = write(maps)
        assert (together == 0).any(), "some should end before others for this to say anything"
        for k in range(len(maps)):
            alone = write(maps[k:k + 1])[0]
            assert torch.equal(together[k, :len(alone)], alone) and not together[k, len(alone):].any()


def test_samples_are_drawn_by_the_probabilities_of_forward():
    model, maps = captioner(1, std=.15)
    maps = maps[:1].expand(4000, -1, -1, -1)
    torch.manual_seed(0)
    first = model.train().sample(maps, 1)[:, 0]                             # training: no dropout while it writes
    p = choosable(model.eval()(maps[:1], torch.tensor([[START, 3]])).flatten(0, 1), START).softmax(1)[0]
    times = torch.bincount(first, minlength=12)
    assert ((times - 4000 * p).abs() <= 4.5 * (4000 * p * (1 - p)).sqrt() + 1e-9).all()


def test_a_step_leaves_its_state_alone():
    model, maps = captioner()
    step, state = model.ready(maps)
    first, after = step(torch.full((7,), START), state)
    a, _ = step(torch.full((7,), 5), after)
    step(torch.full((7,), 6), after)
    assert torch.equal(step(torch.full((7,), 5), after)[0], a) and torch.equal(step(torch.full((7,), START), state)[0], first)


@pytest.mark.parametrize("make", [lambda: captioner()[0].train(), lambda: captioner(norm_first=False)[0].train()])
def test_gradients_reach_all_of_the_captioner(make):
    model, maps = make(), torch.randn(3, 6, 3, 4, dtype=torch.double, requires_grad=True)
    caption_loss(model(maps, CAPTIONS), CAPTIONS[:, 1:]).backward()
    assert (maps.grad.abs().sum(1) > 0).all()
    for name, p in model.named_parameters():
        if name.endswith("key.bias"): assert p.grad.abs().max() < 1e-10     # raises all scores of a query alike
        else: assert p.grad.abs().sum() > 1e-10, name
    assert not model.words.weight.grad[PAD].any()


@pytest.mark.parametrize("options", [{}, {"wide_heads": True, "word_width": 5}, {"mask_pads": False, "layers": 2}])
def test_gradients_reach_all_of_the_text_encoder(options):
    encoder = scattered(TransformerEncoder(20, 12, 4, feed=20, **options)).train()
    sum((x.sin() * torch.randn_like(x)).sum() for x in encoder(captions_of([6, 1, 4]))).backward()
    for name, p in encoder.named_parameters():
        if not name.endswith("key.bias"): assert p.grad.abs().sum() > 1e-10, name


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind):
    model, maps = captioner(std=.15); model, maps = model.float(), maps.float()
    encoder, captions = TransformerEncoder(20, 16, 4, dropout=0.), captions_of([6, 1, 4])
    with torch.autocast("cpu", kind):
        found, features = model(maps[:3], CAPTIONS), encoder(captions)
        caption_loss(found, CAPTIONS[:, 1:]).backward()
        written, totals = model.beams(maps, 8, 3)
    torch.testing.assert_close(found.float(), model(maps[:3], CAPTIONS), atol=.05, rtol=.05)
    for a, b in zip(features, encoder(captions)): torch.testing.assert_close(a.float(), b, atol=.05, rtol=.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and totals.isfinite().all() and len(written) == 7


@pytest.mark.parametrize("call, says", [
    (lambda: Attention(12, 5), "multiple of 5"),
    (lambda: sinusoids(torch.arange(3.), 5), "is odd"),
    (lambda: map_sinusoids(2, 2, 10), "multiple of 4"),
    (lambda: TransformerEncoder(5, 8)(torch.tensor([[1, 2], [0, 0]])), "without words"),
    (lambda: LstmEncoder(5, 8)(torch.tensor([[0, 0]])), "without words"),
    (lambda: LstmEncoder(5, 7), "halved"),
    (lambda: TransformerCaptioner(9, 1, 1), "two numbers"),
    (lambda: captioner()[0](torch.zeros(1, 5, 3, 3).double(), CAPTIONS[:1]), r"expected a map \(b, 6, rows, columns\)"),
    (lambda: captioner()[0](torch.zeros(2, 6, 3, 3).double(), CAPTIONS), "for 2 pictures"),
    (lambda: captioner()[0](torch.zeros(1, 6, 3, 3).double(), torch.ones(1, 14, dtype=torch.long)), "most=12"),
])
def test_errors(call, says):
    with pytest.raises(ValueError, match=says): call()
