"""models.char_cnn_rnn beside the same network written down again with loops, from the released code's description of its layers."""
import pytest
import torch

from crossmodal.models.char_cnn_rnn import ALPHABET, CharCnnRnn, read_letters, spell

SENTENCES = ["This bird has a red-brown crown, and 2 white bars.", "é", "a ?", "x" * 250]


def loop_spell(sentence, length):
    "Of a character that stands twice in the alphabet, the last place."
    row = [0] * length
    for k, character in enumerate(sentence.lower()[:length]):
        for place, known in enumerate(ALPHABET, 1):
            if character == known: row[k] = place
    return row


def convolve(x, weight, bias):
    "x (time, channels) -> (time - 3, channels): every output from its own four columns."
    return torch.stack([bias + sum(weight[:, :, k] @ x[i + k] for k in range(4)) for i in range(len(x) - 3)])


def largest(x, size, step): return torch.stack([x[i:i + size].max(0).values for i in range(0, len(x) - size + 1, step)])


def threshold(x): return torch.where(x > 0, x, torch.zeros_like(x))


def loop_forward(model, row, kind):
    x = torch.zeros(len(row), len(ALPHABET), dtype=torch.float64)
    for k, place in enumerate(row):
        if place: x[k, place - 1] = 1
    for i, layer in enumerate(model.convolutions):
        x = threshold(convolve(x, layer.weight, layer.bias))
        if i < 2: x = largest(x, 3, 3)
    if kind == "rnn": x = largest(x, 3, 2)
    cell, states = model.recurrent, []
    h = torch.zeros(cell.hidden_size, dtype=torch.float64)
    for now in x:
        inner, outer = cell.weight_ih_l0 @ now + cell.bias_ih_l0, cell.weight_hh_l0 @ h + cell.bias_hh_l0
        if kind == "rnn": h = threshold(inner + outer)
        else:
            (r, z, n), (r_h, z_h, n_h) = inner.chunk(3), outer.chunk(3)
            r, z = 1 / (1 + (-r - r_h).exp()), 1 / (1 + (-z - z_h).exp())
            h = (1 - z) * torch.tanh(n + r * n_h) + z * h
        states.append(h)
    return model.project.weight @ (sum(states) / len(states)) + model.project.bias


def test_spelling():
    for length in (1, 48, 201):
        readable = [s for s in SENTENCES if any(loop_spell(s, length))]
        assert spell(readable, length).tolist() == [loop_spell(s, length) for s in readable]
    with pytest.raises(ValueError, match="é"): spell(SENTENCES)


@pytest.mark.parametrize("kind", ["gru", "rnn"])
@pytest.mark.parametrize("length", [66, 120, 201])
def test_network_against_loops(kind, length):
    torch.manual_seed(0)
    model = CharCnnRnn(7, (6, 5), 9, kind).double()
    letters = spell([s for s in SENTENCES if s != "é"], length)
    found = model(letters)
    wanted = torch.stack([loop_forward(model, row, kind) for row in letters.tolist()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    pull = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad((x * pull).sum(), tuple(model.parameters())) for x in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_steps_left():
    "18 and 8 steps of 201 characters, as in the released code; one of the shortest, none below."
    for kind, steps in (("gru", 18), ("rnn", 8)):
        model = CharCnnRnn(3, (4, 4), 4, kind)
        assert model.steps(spell(["a"])).shape[1] == steps
        assert model.steps(spell(["a"], model.shortest)).shape[1] == 1
        with pytest.raises(ValueError, match=str(model.shortest)): model(spell(["a"], model.shortest - 1))


@pytest.mark.parametrize("width", [1, 4, 7])
def test_table_is_a_convolution(width):
    torch.manual_seed(0)
    first = torch.nn.Conv1d(len(ALPHABET), 11, width).double()
    letters = torch.randint(0, len(ALPHABET) + 1, (5, 40))
    lit = torch.zeros(5, len(ALPHABET) + 1, 40, dtype=torch.float64).scatter_(1, letters[:, None], 1)[:, 1:]
    pull = torch.randn(5, 11, 41 - width, dtype=torch.float64)
    a, b = first(lit), read_letters(letters, first)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    for x, y in zip(*(torch.autograd.grad((s * pull).sum(), (first.weight, first.bias)) for s in (a, b))):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
