"""The text autoencoder beside one sentence at a time: no packing, no batch, no shortcut."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from crossmodal.models.text_autoencoder import TextAutoencoder

START, END = 1, 2


def model(seed=0, words=30, hidden=7, width=11):
    torch.manual_seed(seed)
    made = TextAutoencoder(words, START, END, width=width, hidden=hidden, freeze_words=False)
    for p in made.parameters(): nn.init.normal_(p, std=.6)          # far from where all words are equally likely
    return made


def rectangle(lengths, words=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(3, words, (len(lengths), max(lengths)), generator=generator)
    for row, n in zip(captions, lengths): row[0], row[n - 1], row[n:] = START, END, 0
    return captions, torch.tensor(lengths)


BATCHES = {"mixed": [5, 9, 2, 9, 3], "equal": [6, 6, 6], "one": [4], "ascending": [2, 3, 4, 5], "a wide gap": [40, 2]}


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("spare", [0, 3])                           # columns that no caption needs
def test_encode_one_by_one(lengths, spare):
    m, (captions, lengths) = model(), rectangle(lengths)
    codes = m.encode(F.pad(captions, (0, spare)), lengths)
    alone = torch.stack([m.encoder(m.words.weight[row[:n]][None])[0][0].max(0).values for row, n in zip(captions, lengths)])
    torch.testing.assert_close(codes, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=list(BATCHES))
def test_pads_as_released(lengths):
    m, (captions, lengths) = model(), rectangle(lengths)
    order = lengths.argsort(descending=True, stable=True)           # the released code sorts, packs, unpacks, and sorts back
    packed = pack_padded_sequence(m.words(captions[order]), lengths[order], batch_first=True)
    naive = pad_packed_sequence(m.encoder(packed)[0], batch_first=True)[0].max(1).values[order.argsort()]
    torch.testing.assert_close(m.encode(captions, lengths, pads_count=True), naive, atol=0, rtol=0)
    shorter = lengths < lengths.max()
    if shorter.any(): assert (naive[shorter] >= 0).all() and (m.encode(captions, lengths)[shorter] < 0).any()


def slow_logits(m, code, inputs=None, steps=0, lowest=1):
    "One sentence, one `LSTMCell` step at a time, by the formulas of an LSTM. Words below `lowest` are not chosen."
    cell = m.decoder
    h, c, word, logits = code, torch.zeros_like(code), START, []
    for k in range(len(inputs) if inputs is not None else steps):
        if inputs is not None: word = inputs[k]
        gates = cell.weight_ih_l0 @ m.words.weight[word] + cell.bias_ih_l0 + cell.weight_hh_l0 @ h + cell.bias_hh_l0
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        logits.append(m.out.weight @ h + m.out.bias)
        word = int(logits[-1][lowest:].argmax()) + lowest
    return torch.stack(logits)


def test_forced_is_the_loop():
    m, (captions, lengths) = model(), rectangle(BATCHES["mixed"])
    codes, steps = m.encode(captions, lengths), captions.shape[1] - 1
    fast = m.decode(codes, steps, captions, forcing=1)
    torch.testing.assert_close(fast, m.decode(codes, steps, captions, forcing=1 - 2**-53), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fast, torch.stack([slow_logits(m, code, row[:-1]) for code, row in zip(codes, captions)]), atol=1e-5, rtol=1e-5)


def test_forced_gradients_are_the_loops():
    m, (captions, lengths) = model(), rectangle(BATCHES["mixed"])
    both = [torch.autograd.grad(m.loss(captions, lengths, forcing), m.parameters()) for forcing in (1, 1 - 2**-53)]
    for a, b in zip(*both): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_free_running():
    m = model()
    codes = torch.rand(6, 14) * 2 - 1
    torch.testing.assert_close(m.decode(codes, 8), torch.stack([slow_logits(m, code, steps=8) for code in codes]), atol=1e-5, rtol=1e-5)


def test_forcing_draws_a_coin_for_each_word_and_sentence():
    m, (captions, lengths) = model(), rectangle([12] * 64)
    codes = m.encode(captions, lengths)
    asked, lookup = [], m.words.forward
    m.words.forward = lambda numbers: (asked.append(numbers), lookup(numbers))[1]
    logits = m.decode(codes, 11, captions, forcing=.3)
    given, own = torch.stack(asked[1:], 1), logits[:, :-1, 1:].argmax(2) + 1
    forced, differ = given == captions[:, 1:11], captions[:, 1:11] != own
    assert ((given == own) | forced).all() and abs(forced[differ].float().mean() - .3) < .08
    assert len(set(map(tuple, forced.tolist()))) > 32               # not one coin for all


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [1, 4, 25])
def test_generate_one_by_one(seed, most):
    m = model(seed)
    with torch.no_grad(): m.out.bias[END] += 1.5                    # or hardly any sentence would end
    codes = torch.rand(9, 14) * 2 - 1
    said, expected = m.generate(codes, most), []
    for code in codes:
        numbers = [int(row[END:].argmax()) + END for row in slow_logits(m, code, steps=most, lowest=END)]      # neither the pad nor <start>
        expected.append(numbers[:numbers.index(END) + 1] if END in numbers else numbers)
    width = max(map(len, expected))
    assert said.tolist() == [row + [0] * (width - len(row)) for row in expected]


def test_loss_is_the_mean_over_words():
    m, (captions, lengths) = model(), rectangle(BATCHES["mixed"])
    codes = m.encode(captions, lengths)
    costs = [-slow_logits(m, code, row[:n - 1]).log_softmax(1)[k, row[k + 1]] for code, row, n in zip(codes, captions, lengths) for k in range(n - 1)]
    torch.testing.assert_close(m.loss(captions, lengths, forcing=1), torch.stack(costs).mean(), atol=1e-5, rtol=1e-5)


def test_frozen_words_get_no_gradient_and_pads_never_do():
    captions, lengths = rectangle(BATCHES["mixed"])
    frozen = TextAutoencoder(30, START, END)
    frozen.loss(captions, lengths).backward()
    assert frozen.words.weight.grad is None and all(p.grad is not None for name, p in frozen.named_parameters() if name != "words.weight")
    learning = TextAutoencoder(30, START, END, freeze_words=False)
    learning.loss(captions, lengths, forcing=1).backward()
    assert (learning.words.weight.grad[0] == 0).all() and (learning.words.weight.grad[START] != 0).any()
