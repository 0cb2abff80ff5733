"""Writing beside one picture and one beginning at a time: python lists, no batch, no re-ordered state."""
import math

import pytest
import torch
from torch.nn import functional as F

from crossmodal.models.captioners import GruCaptioner, choosable, write_beams, write_greedily, write_samples

START, END = 1, 2
SEEDS = (0, 5, 8)                       # their sentences differ and end at different words, some not at all

pytestmark = pytest.mark.usefixtures("one_thread")


def captioner(seed=0, words=9, condition="input", spread=1.2, **options):
    torch.manual_seed(seed)
    made = GruCaptioner(words, START, END, codes=12, width=6, hidden=10, condition=condition, **options).double()
    for p in made.parameters(): torch.nn.init.normal_(p, std=spread)          # far from where all words are equally likely
    return made, F.normalize(torch.rand(7, 12, dtype=torch.double), dim=1)


@torch.no_grad()
def probabilities(m, code, written):
    "Log-probabilities of the next word after these, by the formulas of a GRU, from the picture on; None for what must not be said."
    def gru(x, h):
        (r, z, n), (a, b, c) = ((w @ v + o).chunk(3) for w, v, o in ((m.gru.weight_ih_l0, x, m.gru.bias_ih_l0), (m.gru.weight_hh_l0, h, m.gru.bias_hh_l0)))
        r, z = (r + a).sigmoid(), (z + b).sigmoid()
        return (1 - z) * (n + r * c).tanh() + z * h
    seen = m.picture.weight @ ((code - code.mean()) / code.std(correction=0)) + m.picture.bias
    h = seen.tanh() if m.condition == "state" else gru(seen, torch.zeros(10, dtype=torch.double))
    for word in [START, *written]: h = gru(m.words.weight[word], h)
    scores = (m.out.weight @ h + m.out.bias).tolist()
    allowed = {word: score for word, score in enumerate(scores) if word not in (0, START)}
    total = math.log(sum(math.exp(score) for score in allowed.values()))
    return {word: score - total for word, score in allowed.items()}


def slow_greedy(m, code, most):
    written = []
    while len(written) < most and END not in written:
        found = probabilities(m, code, written)
        written.append(max(found, key=found.get))
    return written


def slow_beams(m, code, most, width, power):
    "Textbook beam search; goes on to the last word, whether or not something better can still come."
    living, done = [([], 0.)], []
    for _ in range(most):
        longer = [(written + [word], total + p) for written, total in living for word, p in probabilities(m, code, written).items()]
        kept = sorted(longer, key=lambda one: -one[1])[:width]
        done += [one for one in kept if one[0][-1] == END]
        living = [one for one in kept if one[0][-1] != END]
    return max(done + living, key=lambda one: one[1] / len(one[0]) ** power)


def padded(rows):
    longest = max(map(len, rows))
    return [row + [0] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize("condition", ["input", "state"])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_one_by_one(seed, condition):
    m, codes = captioner(seed, condition=condition)
    assert m.greedy(codes, 9).tolist() == padded([slow_greedy(m, code, 9) for code in codes])


@pytest.mark.parametrize("power", [0, .7, 1])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 20])                         # 20: more beams than the nine words
@pytest.mark.parametrize("seed", SEEDS)
def test_beams_one_by_one(seed, width, power):
    m, codes = captioner(seed, condition=("input", "state")[seed % 2])
    written, totals = m.beams(codes[:5], 6, width, power)
    slow = [slow_beams(m, code, 6, width, power) for code in codes[:5]]
    assert written.tolist() == padded([row for row, _ in slow])
    torch.testing.assert_close(totals.double(), torch.tensor([total for _, total in slow], dtype=torch.double), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("power", [0, 1])
@pytest.mark.parametrize("seed", range(10))
def test_one_beam_is_greedy(seed, power):
    m, codes = captioner(seed, words=30)
    assert torch.equal(m.beams(codes, 15, width=1, length_power=power)[0], m.greedy(codes, 15))


def test_equal_scores_choose_alike():
    def step(words, state): return torch.zeros(len(words), 50), state       # every word as good as any other
    greedy = write_greedily(step, torch.zeros(3, 1), START, END, 4)
    assert torch.equal(write_beams(step, torch.zeros(3, 1), START, END, 4, width=1)[0], greedy)


def test_probability_is_that_of_what_was_written():
    m, codes = captioner(8)
    written, totals = m.beams(codes, 8, 4)
    logits = m(codes, F.pad(written, (1, 0), value=START))
    each = choosable(logits.flatten(0, 1), START).log_softmax(1).view_as(logits).gather(2, written[..., None])[..., 0]
    torch.testing.assert_close(each.masked_fill(written == 0, 0).sum(1), totals, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["greedy", "sample", "beams"])
def test_what_is_written_is_well_formed(way):
    for seed in range(5):
        m, codes = captioner(seed)
        with torch.no_grad(): m.out.bias[0] = m.out.bias[START] = 50.       # it would love to say what it must not
        written = getattr(m, way)(codes, 10)
        if way == "beams": written = written[0]
        assert written.dtype == torch.long and written.shape[0] == 7 and 1 <= written.shape[1] <= 10
        assert (written[:, -1] != 0).any()                                  # no column for nobody
        for row in written.tolist():
            length = row.index(END) + 1 if END in row else len(row)
            assert START not in row and 0 not in row[:length] and not any(row[length:])
            assert END in row or len(row) == 10


@pytest.mark.parametrize("width", [0, 1, 4])                               # 0: greedy
def test_no_row_depends_on_its_neighbours(width):
    m, codes = captioner(8)
    write = (lambda some: (m.greedy(some, 12), None)) if width == 0 else (lambda some: m.beams(some, 12, width))
    together, totals = write(codes)
    assert (together == 0).any(), "some should end before others for this to say anything"
    for k in range(len(codes)):
        alone, total = write(codes[k:k + 1])
        assert alone[0].tolist() == together[k, :alone.shape[1]].tolist() and not together[k, alone.shape[1]:].any()
        if width: torch.testing.assert_close(total, totals[k:k + 1])
    order = torch.randperm(len(codes))
    assert torch.equal(write(codes[order])[0], together[order])


def test_a_state_of_many_parts_keeps_its_rows_together():
    m, codes = captioner(5)
    def step(words, state):
        (hidden, said), (code,) = state                                     # also nested, and with a part that has no numbers to begin with
        assert len(words) == len(hidden) == len(said) == len(code)
        said = torch.cat([said, words[:, None]], 1)
        logits, hidden = m.step(words, hidden)
        torch.testing.assert_close(m(code, F.pad(said, (0, 1)))[:, -1], logits)
        return logits, ((hidden, said), (code,))
    state = ((m.begin(codes).detach(), torch.empty(7, 0, dtype=torch.long)), (codes,))
    (written, totals), (expected, expected_totals) = write_beams(step, state, START, END, 8, 3), m.beams(codes, 8, 3)
    assert torch.equal(written, expected)
    torch.testing.assert_close(totals, expected_totals)


def test_nonsense_after_the_end_is_not_heard():
    table = torch.full((6, 6), -torch.inf)
    table[START, [3, 4, END]] = 0.; table[3, END] = 0.; table[4, 5] = 0.; table[5, END] = 0.         # after <end> and the pad: all minus infinity
    def step(words, state): return table[words], state
    torch.manual_seed(0)
    assert {tuple(row) for row in write_samples(step, torch.zeros(200, 1), START, END, 6).tolist()} == {(2, 0, 0), (3, 2, 0), (4, 5, 2)}
    written, totals = write_beams(step, torch.zeros(2, 1), START, END, 6, 9)
    torch.testing.assert_close(totals.exp(), torch.tensor([1 / 3] * 2))
    assert (written[:, 0] > START).all()


def test_scheduled_sampling():
    m, codes = captioner(6, dropout=.5)
    captions = torch.tensor([[1, 5, 3, 4, 2], [1, 4, 6, 2, 0], [1, 2, 0, 0, 0]]).repeat(300, 1)
    codes = codes[:1].expand(len(captions), -1)
    m.eval()
    whole = m(codes, captions)
    torch.testing.assert_close(whole, m(codes, captions, forcing=1 - 2 ** -53))       # no coin falls on the other side
    half, none = m(codes, captions, forcing=.5), m(codes, captions, forcing=0.)
    torch.testing.assert_close(half[:, 0], whole[:, 0])                     # what follows <start> is never drawn
    same = lambda logits, k: torch.isclose(logits[:, k], whole[:, k]).all(1)
    agree = choosable(whole[:1, 0], START).softmax(1)[0, captions[:3, 1]].repeat(300)       # the network may draw the caption's own word
    for logits, forcing in ((half, .5), (none, 0.)):
        expected = forcing + (1 - forcing) * agree
        found, deviation = same(logits, 1).double(), (expected * (1 - expected) / 300).sqrt()
        for row in range(3):
            assert abs(found[row::3].mean() - expected[row]) < 4.5 * deviation[row] + 1e-9
    m.train()
    assert not torch.allclose(m(codes, captions), whole)                    # dropout
    torch.testing.assert_close(m(codes, captions, dropped=False), whole)
    torch.testing.assert_close(m.greedy(codes, 5), m.eval().greedy(codes, 5))


def test_gradients_of_coins_are_those_of_the_call():
    m, codes = captioner(7)
    captions = torch.tensor([[1, 5, 3, 4, 2], [1, 4, 6, 2, 0]])
    both = [torch.autograd.grad(F.cross_entropy(m(codes[:2], captions, forcing).flatten(0, 1), captions[:, 1:].flatten(), ignore_index=0), m.parameters())
            for forcing in (1., 1 - 2 ** -53)]
    for a, b in zip(*both): torch.testing.assert_close(a, b)


def test_samples_repeat_with_their_seed():
    m, codes = captioner(8)
    torch.manual_seed(1); first = m.sample(codes, 9)
    torch.manual_seed(1)
    assert torch.equal(first, m.sample(codes, 9))
    assert torch.equal(m.sample(codes, 9, temperature=1e-3), m.greedy(codes, 9))


def test_codes_of_any_length_say_the_same():
    m, codes = captioner(9)
    torch.testing.assert_close(m.begin(codes), m.begin(3 * codes + 1), atol=1e-5, rtol=1e-5)


def test_a_batch_of_none():
    m, codes = captioner()
    assert len(m.greedy(codes[:0], 5)) == 0 and [len(x) for x in m.beams(codes[:0], 5)] == [0, 0]


@pytest.mark.parametrize("call, says", [
    (lambda m, codes: m.greedy(codes, 0), "at least one word"),
    (lambda m, codes: m.beams(codes, 0), "most=0"),
    (lambda m, codes: m.beams(codes, 5, 0), "width=0"),
    (lambda m, codes: m.beams(codes, 5, 2, -1), "no negative power"),
    (lambda m, codes: m.sample(codes, 5, 0), "temperature=0"),
    (lambda m, codes: m.sample(codes, 5, math.nan), "temperature=nan"),
    (lambda m, codes: m.greedy(codes[:, :3], 5), r"expected \(b, 12\)"),
    (lambda m, codes: m(codes, torch.tensor([[1, 3, 2]])), "for 7 pictures"),
    (lambda m, codes: m(codes[:1], torch.tensor([[3, 2]])), "the first of them <start>"),
    (lambda m, codes: m(codes[:1], torch.tensor([[1]])), "at least 2 words"),
    (lambda m, codes: m(codes[:1], torch.tensor([[1, 3, 2]]), forcing=1.5), "is a probability"),
    (lambda m, codes: GruCaptioner(9, 1, 1, 12), "two numbers"),
    (lambda m, codes: GruCaptioner(9, 1, 9, 12), "from 1 to 8"),
    (lambda m, codes: write_beams(lambda words, state: (torch.full((len(words), 5), math.nan), state), codes, START, END, 3), "NaN"),
])
def test_errors(call, says):
    with pytest.raises(ValueError, match=says): call(*captioner())
