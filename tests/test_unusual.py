"""Models that do unusual things: the forward engine on them against nested passes, and nothing of theirs changes."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from differences import differences, random_direction
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure.forward import ForwardEngine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPTED = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def squared_error(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def pair():
    return torch.randn(6, 4), torch.randn(6, 3)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2], batch_first=True)
        return self.out(self.core(packed)[1][0][-1])


class PackedWords(nn.Module):
    """Sentences of several lengths, as classifiers of texts have them."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(12, 4), nn.Linear(10, 2)
        self.core, self.batch_first = nn.GRU(4, 5, batch_first=batch_first, bidirectional=True), batch_first

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.words(ids if self.batch_first else ids.T)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=self.batch_first, enforce_sorted=False)
        outputs, last = self.core(packed)
        whole = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=self.batch_first)[0]
        return self.out(last.transpose(0, 1).flatten(1)) + whole.sum(int(self.batch_first))[:, :2]


class Views(nn.Module):
    """A view of a parameter that was made before the loss is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64) / 2)
        self.views = [self.w, self.w.t()]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.views[0]) @ self.views[1][:, :3]


class Quantised(nn.Module):
    """Vectors from a code book, straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 2), nn.Linear(2, 3)
        self.codes = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        codes = self.codes[(z.unsqueeze(1) - self.codes).square().sum(-1).argmin(1)]
        self.commitment = (codes - z.detach()).square().mean() + (codes.detach() - z).square().mean()
        return self.decode(z + (codes - z).detach())


def spectral():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), squared_error, pair()


def spectral_by_hook():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), squared_error, pair()


def quantised():
    return Quantised(), lambda m, b: squared_error(m, b) + m.commitment, pair()


def encoder_with_padding():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2).eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return model, lambda m, b: m(b[0], src_key_padding_mask=b[1])[~b[1]].sin().mean(), (torch.randn(3, 5, 8), padding)


def attention_with_a_mask():
    def loss(m, x):
        mask = torch.triu(torch.full((5, 5), -torch.inf, dtype=x.dtype), 1)
        return m(x, x, x, attn_mask=mask)[0].square().mean()

    return nn.MultiheadAttention(8, 2, batch_first=True), loss, torch.randn(3, 5, 8)


def rows_that_see_nothing():
    def loss(m, x):
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        mask[2] = False
        q, k, v = m(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, mask).square().mean()

    return nn.Linear(4, 12), loss, torch.randn(3, 2, 5, 4)


def drawn_from_a_distribution():
    def loss(m, b):
        mean, width = m(b[0]).chunk(2, -1)
        return (torch.distributions.Normal(mean, F.softplus(width)).rsample() - b[1]).square().mean()

    return nn.Linear(4, 6), loss, pair()


class OwnProduct(torch.autograd.Function):
    """A product whose first operations are views of what it is given."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        rows, *_ = x[None].unbind()
        return torch.matmul(rows[:, None].expand(-1, 1, -1), weight.mT.expand(len(x), -1, -1)).flatten(1)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.mT @ x


class OwnCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view(-1).cos().view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g * ctx.saved_tensors[0].sin()


class Viewing(nn.Linear):
    """Views that are made without gradients: within a function they move, outside they are constants."""

    def forward(self, x: Tensor) -> Tensor:
        y = OwnProduct.apply(x.sin() * self.bias.sum(), self.weight).tanh()
        with torch.no_grad():
            still = y.T
        return y * OwnCosine.apply(still.T) + OwnCosine.apply(y)


MODELS = {
    "views within functions": lambda: (Viewing(4, 3), squared_error, pair()),
    "spectral norm": spectral,
    "spectral norm by a hook": spectral_by_hook,
    "a script": lambda: (SCRIPTED, squared_error, pair()),
    "packed sequences": lambda: (Packed(), squared_error, (torch.randn(3, 5, 4), torch.randn(3, 3))),
    "views of parameters": lambda: (Views(), squared_error, pair()),
    "a code book": quantised,
    "an encoder with padding": encoder_with_padding,
    "attention with a mask": attention_with_a_mask,
    "rows that see nothing": rows_that_see_nothing,
    "a draw from a distribution": drawn_from_a_distribution,
}


def double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", MODELS)
def test_unusual_models(name) -> None:
    torch.manual_seed(0)
    model, loss_fn, batch = MODELS[name]()
    model, batch = model.double(), tuple(map(double, batch)) if isinstance(batch, tuple) else double(batch)
    u = [torch.randn_like(p) for p in model.parameters()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summaries = []
    for engine in ("forward", "forward", "nested"):
        torch.manual_seed(1)
        summaries.append(ns.summarize(loss_fn, model, [batch], direction=u, engine=engine))
    *found, expected = summaries
    for summary in found:
        for order in (1, 2):
            scale = float(expected.tensor(order).abs().max())
            assert float((summary.tensor(order) - expected.tensor(order)).abs().max()) < 1e-9 * scale
        scale = float(expected.hessian.abs().max())
        assert float((summary.third - expected.third).abs().max()) < 1e-8 * scale
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_words_of_other_lengths(batch_first) -> None:
    """The same program stands for batches with as many words, whatever the sentences' lengths."""
    torch.manual_seed(0)
    model, engine = PackedWords(batch_first).double(), ForwardEngine()
    loss_fn = lambda m, b: m(*b).tanh().square().mean()  # noqa: E731
    u = random_direction(model)
    for lengths in ([5, 4, 2], [2, 5, 4], [6, 1, 4]):
        batch = torch.randint(12, (3, 6)), torch.tensor(lengths)
        summary = ns.summarize(loss_fn, model, [batch], direction=u, engine=engine, batch_size=3)
        differences(loss_fn, model, lambda batch=batch: batch, u, 0.005).check(summary, 1e-5)
