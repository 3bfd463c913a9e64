"""Operations that are written as simpler ones, against differences of gradients of the operation itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo_reference import by_differences, direction_of, error

import newton_summary as ns
from newton_summary.measure import Refusal
from newton_summary.measure.loss import Loss

EYE = torch.eye(6, dtype=torch.float64)
INDEX = torch.tensor([[0, 2, 2], [1, 1, 0], [5, 4, 3], [2, 2, 2], [0, 1, 0], [3, 3, 5]])


def positive(x):
    return x @ x.mT + EYE


def opened(x):
    """Scores with a mask, in which one query may look at nothing."""
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[3] = False
    return mask


def attended(x, **options):
    q, k, v = x.view(1, 2, 6, 3), (2 * x).sin().view(1, 2, 6, 3), x.cos().view(1, 2, 6, 3)
    return F.scaled_dot_product_attention(q, k, v, **options)


def bag(mode, **options):
    def act(x):
        indices = torch.tensor([0, 1, 1, 5, 3, 2, 2])
        return F.embedding_bag(indices, x, torch.tensor([0, 3, 3, 5]), mode=mode, **options)

    return act


def scattered(reduce, include):
    return lambda x: x.sin().scatter_reduce(1, INDEX, x[:, :3], reduce, include_self=include)


def transcribed(lengths, labels, label_lengths):
    def act(x):
        log_probs = x.reshape(9, 1, 4).expand(9, 2, 4) * torch.tensor([1.0, 0.5], dtype=x.dtype).view(1, 2, 1)
        return F.ctc_loss(log_probs.log_softmax(-1), labels, lengths, label_lengths, reduction="none")

    return act


def sampled_volume(padding, align, mode="bilinear"):
    def act(x):
        grid = 1.7 * torch.tanh(x[:4].reshape(1, 2, 2, 2, 3) + 0.3)
        return F.grid_sample(x.view(1, 1, 4, 3, 3), grid, mode=mode, padding_mode=padding, align_corners=align)

    return act


def sampled(padding, align):
    def act(x):
        grid = 0.9 * torch.tanh(x[:3].reshape(1, 3, 3, 2) + 0.3)
        return F.grid_sample(x.view(1, 1, 6, 6), grid, padding_mode=padding, align_corners=align)

    return act


def pairs(x):
    return torch.complex(x, 0.3 * x.cos() + 0.4)


def turned(x):
    """Written into, and then looked at in another way: what it was before keeps its shape."""
    y = 2 * x[:4]
    y.lerp_(x[2:].sin(), torch.full((4, 6), 0.3, dtype=x.dtype))
    y.transpose_(0, 1).atan2_(x[:, 1:5].cos() + 2)
    return y.unsqueeze_(0) * x[:, :4]


def added_logs(x):
    """Of numbers of which one, the other or both are log 0."""
    none = torch.arange(36).view(6, 6) % 4
    first, second = x.masked_fill(none % 2 == 1, -torch.inf), x.cos().masked_fill(none > 1, -torch.inf)
    return torch.logaddexp(first, second).masked_fill(none == 3, 0.0)


def written_conjugate(z):
    y = z.clone().conj()
    y[0] = z[1].square()
    w = z.imag.clone()
    w[0] = y.imag[1]
    return y.imag * z.conj().real + w


FUNCTIONS = {
    "masked_scatter": lambda x: x.sin().masked_scatter(x > 0, x.cos()),
    "masked_scatter of rows": lambda x: x[:4].masked_scatter((torch.arange(4) % 3 > 0).view(4, 1), x[4:]),
    "solve": lambda x: torch.linalg.solve(x + 3 * EYE, x.cos()),
    "solve for a vector": lambda x: torch.linalg.solve(x + 3 * EYE, x[0]),
    "solve from the right": lambda x: torch.linalg.solve(x + 3 * EYE, x.cos(), left=False),
    "solve in batches": lambda x: torch.linalg.solve(torch.stack([x, x.sin()]) + 3 * EYE, x.cos()),
    "inverse": lambda x: torch.linalg.inv(x + 3 * EYE),
    "log-determinant": lambda x: torch.linalg.slogdet(x - 3 * EYE)[1],
    "determinant": lambda x: torch.linalg.det(x - 1.5 * EYE),
    "Cholesky": lambda x: torch.linalg.cholesky(positive(x)),
    "Cholesky, upper": lambda x: torch.linalg.cholesky(positive(x), upper=True),
    "triangular": lambda x: torch.linalg.solve_triangular(x + 3 * EYE, x.cos(), upper=False),
    "triangular, upper, from the right": lambda x: torch.linalg.solve_triangular(x + 3 * EYE, x.cos(), upper=True,
                                                                                        left=False),
    "unit triangular": lambda x: torch.linalg.solve_triangular(x, x.cos(), upper=True, unitriangular=True),
    "Gaussian density": lambda x: torch.distributions.MultivariateNormal(x[0], scale_tril=(x + 3 * EYE).tril())
    .log_prob(x[1]),
    "matrix exponential": torch.linalg.matrix_exp,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "norm, p = 3": lambda x: torch.linalg.vector_norm(x, 3, dim=0, keepdim=True),
    "norm, p = 1": lambda x: torch.linalg.vector_norm(x, 1),
    "norm, largest": lambda x: torch.linalg.vector_norm(x, torch.inf, dim=[0]),
    "distances": lambda x: torch.cdist(x, x.cos()),
    "distances, p = 1": lambda x: torch.cdist(x, x.cos() + 6, p=1.0),
    "distances, p = 3": lambda x: torch.cdist(x, x.cos() + 6, p=3.0),
    "distances, largest": lambda x: torch.cdist(x, x.cos(), p=torch.inf),
    "distances, by products": lambda x: torch.cdist(x, x.cos(), compute_mode="use_mm_for_euclid_dist"),
    "distances within": lambda x: F.pdist(x),
    "bilinear": lambda x: F.bilinear(x, x[:, :4].cos(), x.sin().repeat(1, 4).view(6, 6, 4), x[0]),
    "attention with a mask": lambda x: attended(x, attn_mask=opened(x)),
    "attention with a bias": lambda x: attended(x, attn_mask=x.sin()),
    "causal attention": lambda x: attended(x, is_causal=True),
    "grouped queries": lambda x: F.scaled_dot_product_attention(x.view(1, 4, 3, 3), x.sin()[:3].view(1, 2, 3, 3),
                                                               x.cos()[:3].view(1, 2, 3, 3), enable_gqa=True),
    "bags, sum": bag("sum"),
    "bags, mean": bag("mean", padding_idx=1),
    "bags, max": bag("max"),
    "bags, weighted": lambda x: bag("sum", per_sample_weights=x.flatten()[:7].sin())(x),
    "scattered, sum": scattered("sum", True),
    "scattered, mean": scattered("mean", False),
    "scattered, mean, with what was there": scattered("mean", True),
    "scattered, largest": scattered("amax", False),
    "scattered, smallest, with what was there": scattered("amin", True),
    "CTC": transcribed([9, 7], torch.tensor([[1, 2, 2], [3, 1, 1]]), [3, 2]),
    "CTC, lengths as tensors": transcribed(torch.tensor([8, 9]), torch.tensor([[1, 1], [2, 3]]), torch.tensor([2, 0])),
    "CTC, labels in a row": transcribed([9, 9], torch.tensor([1, 2, 3, 3]), [1, 3]),
    "CTC, one sample": lambda x: F.ctc_loss(x.view(9, 4).log_softmax(-1), torch.tensor([1, 2]), torch.tensor(9),
                                          torch.tensor(2)),
    "volumes": sampled_volume("zeros", False),
    "volumes, border": sampled_volume("border", True),
    "volumes, reflection": sampled_volume("reflection", False),
    "volumes, reflection about entries": sampled_volume("reflection", True),
    "volumes, closest": sampled_volume("zeros", True, mode="nearest"),
    "grid_sample": sampled("zeros", False),
    "grid_sample, border": sampled("border", True),
    "grid_sample, reflection": sampled("reflection", False),
    "bicubic": lambda x: F.interpolate(x.view(1, 1, 6, 6), scale_factor=1.5, mode="bicubic"),
    "extremes": lambda x: torch.maximum(x, x.cos()) + torch.minimum(x.sin(), x.mT),
    "group norm": lambda x: F.group_norm(x.view(2, 6, 3), 3, x[0], x[1]),
    "norms of rows": lambda x: F.normalize(x, dim=1),
    "cumulated largest": lambda x: x.cummax(1)[0] * x,
    "log of sums": lambda x: torch.logcumsumexp(x, 1),
    "log of sums, far apart": lambda x: torch.logcumsumexp(x + 12 * torch.arange(6.0)[:, None], 0),
    "log of a sum, of which some are 0": added_logs,
    "quantiles": lambda x: torch.quantile(x.view(3, 2, 6), 0.3, dim=1, keepdim=True),
    "turned": turned,
    "a product along nothing": lambda x: torch.linalg.multi_dot([x, x[:, :0], x[:0]]) + x.sin(),
    "products": lambda x: x.prod(1) + x.cumprod(0)[-1],
    "Fourier transforms": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.sin()), n=6),
    "spectrum": lambda x: torch.fft.fft2(x).abs(),
    "complex products": lambda x: torch.einsum("ij,jk->ik", torch.complex(x, x.sin()), torch.complex(x.cos(), x)).real,
    "complex quotients": lambda x: (torch.complex(x, x.sin()) / torch.complex(x.cos() + 2, x)).imag,
    "complex exponentials": lambda x: (torch.exp(1j * x) * torch.polar(x.square() + 1, x.sin())).angle().sin(),
    "complex powers": lambda x: (pairs(x) ** 3 + pairs(x) ** 0.7 + 2.0 ** pairs(x) + pairs(x) ** (1 + 2j)).imag,
    "complex roots": lambda x: (pairs(x).sqrt() * pairs(x.cos()).rsqrt() + pairs(x).log()).real,
    "complex waves": lambda x: (pairs(x).sin() * pairs(x).cos()).imag + pairs(x).sigmoid().abs(),
    "complex hyperbolas": lambda x: (pairs(x).sinh() + pairs(x).cosh() * pairs(x).tanh() + pairs(x).expm1()).real,
    "complex products along": lambda x: (pairs(x).prod(1) + pairs(x).cumprod(0)[-1]).abs(),
    "complex deviations": lambda x: pairs(x).std(1) + pairs(x).var(0),
    "conjugates": lambda x: (pairs(x) * pairs(x).conj()).real + pairs(x).conj().imag.exp() - pairs(x).mH.imag,
    "conjugates written to": lambda x: written_conjugate(pairs(x)),
    "cross-correlation": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.sin()).conj(), n=6),
    "inner products": lambda x: torch.vdot(pairs(x)[0], pairs(x)[1]).abs() + torch.outer(x[0], x[1]),
    "angles": lambda x: torch.atan2(x.sin(), x.mT.cos()) + torch.atan2(EYE[0], x[0]) + x.neg().atan2(x[:1]),
    "a layer of pairs": lambda x: torch.view_as_complex(x.view(6, 3, 2)).abs(),
    "segments": lambda x: torch.segment_reduce(x.sin(), "mean", lengths=torch.tensor([2, 1, 3])).exp(),
    "segments, one empty": lambda x: torch.segment_reduce(x.sin(), "sum", offsets=torch.tensor([0, 2, 2, 6])).exp(),
    "largest of segments": lambda x: torch.segment_reduce(x.sin(), "max", lengths=torch.tensor([4, 2])).exp(),
    "products of segments": lambda x: torch.segment_reduce(x.sin(), "prod", lengths=torch.tensor([4, 2])).exp(),
    "products, scattered": scattered("prod", True),
    "products alone, scattered": scattered("prod", False),
    "means, by slices": lambda x: x.sin().index_reduce(0, INDEX[4], x[:3].cos(), "mean"),
    "products, by slices": lambda x: x.sin().index_reduce(-1, INDEX[4], x[:, :3], "prod", include_self=False),
    "largest, by slices": lambda x: x.sin().index_reduce(1, INDEX[4], x[:, :3], "amax"),
    "an entry by its number": lambda x: x.take(torch.tensor(-2)).sin() * x.take(INDEX),
    "Bessel functions": lambda x: (torch.special.i0(2 * x) + torch.special.i1(3 * x) + torch.special.i0e(x + 9)
                                   * torch.special.i1e(x - 9)),
    "steps": lambda x: x.floor() * x + x.round() * x.sign(),
    "margins": lambda x: F.multi_margin_loss(x, INDEX[:, 0], p=2, margin=0.7, weight=EYE[0] + 0.3, reduction="none"),
    "margins, one sample": lambda x: F.multi_margin_loss(x[0], torch.tensor(2)),
    "margins, one class": lambda x: F.multi_margin_loss(x[0, 0], torch.tensor(0)) + x.sin(),
    "margins of several labels": lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 2, -1, 1, 1, 1]] * 6),
                                                                    reduction="none"),
    "margins of one sample": lambda x: F.multilabel_margin_loss(x[0], torch.tensor([4, 0, 1, -1, 2, 2])),
    "deviations": lambda x: x.std(1) + torch.std_mean(x, 0)[0],
    "larger and smaller, of numbers": lambda x: torch.fmax(x, x.cos()) * torch.fmin(x.sin(), x.mT),
    "leaks": lambda x: F.rrelu(x) * x,
    "random leaks": lambda x: F.rrelu(x, training=True) * x,
    "inverse of a factor": lambda x: torch.cholesky_inverse((x + 4 * EYE).triu(), upper=True).sin(),
    "Householder": lambda x: torch.linalg.householder_product(x[:, :3], x[0, :3]),
}  # fmt: skip


class Entries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(6, 6, generator=generator, dtype=torch.float64)) for _ in range(2))

    def forward(self) -> torch.Tensor:
        return self.a * (1 + 0.3 * self.b.sin())


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_the_operation(name):
    model, function = Entries(), FUNCTIONS[name]

    def loss(model, batch):
        out = function(model())
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return (out * weights).sum() + (0.3 * out).sin().sum()

    partition = ns.Partition({"a": ["a"], "upper b": [("b", slice(3))], "lower b": [("b", slice(3, 6))]}, model)
    direction = [0.3 * u for u in direction_of(partition)]
    expected, total = by_differences(loss, model, None, partition, direction)

    def measured(third):
        return ns.summarize(
            loss, model, [torch.zeros(1)], partition=partition, direction=direction, engine="forward", third=third
        )

    got, full = measured("diagonal"), measured("full").third
    assert error(got.loss, expected.loss) < 1e-10
    assert error(got.gradient, expected.gradient) < 1e-9
    assert error(got.hessian, expected.hessian) < 1e-7
    assert error(got.third, expected.third) < 1e-6
    assert error(torch.einsum("sss->s", full), got.third) < 1e-9
    assert abs(float(full.sum() - total)) < 1e-6 * float(full.abs().sum())


# Gradients that are others by intention ------------------------------------------------------------------------------

FIRST = torch.tensor([0, 3, 0, 5])


def on_grid(x):
    """On a grid of 0.1 from -1 to 1."""
    return x + ((x / 0.1).round().clamp(-10, 10) * 0.1 - x).detach() - torch.where(x.abs() < 1.05, 0, x - x.detach())


def fused(x):
    """What follows the range of the values, too."""
    fake = torch.ao.quantization.FusedMovingAvgObsFakeQuantize(averaging_constant=1.0)
    return fake(x.float()).to(x.dtype)


def fused_by_hand(x):
    low, high = x.min().detach().clamp_max(0), x.max().detach().clamp_min(0)
    scale = (high.float() - low.float()) / 255
    fixed = torch.fake_quantize_per_tensor_affine(x.float().detach(), float(scale), -round(float(low / scale)), 0, 255)
    return x.float().to(x.dtype) + (fixed - x.float()).detach().to(x.dtype)


INTENDED = {
    "padding": (
        lambda x: F.embedding(FIRST, x, padding_idx=0),
        lambda x: torch.where((FIRST == 0)[:, None], x[0].detach(), x[FIRST]),
    ),
    "a grid": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -10, 10), on_grid),
    "a grid by channels": (
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.full((6,), 0.1), torch.zeros(6, dtype=torch.int32), 1, -10, 10
        ),
        on_grid,
    ),
    "a grid in tensors": (
        lambda x: torch.fake_quantize_per_tensor_affine(x, torch.tensor(0.1), torch.tensor(0), -10, 10),
        on_grid,
    ),
    "a grid that follows": (fused, fused_by_hand),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", INTENDED)
def test_what_counts_as_a_constant_by_intention(name):
    """Steps of one parameter that no other follows, and differences of the loss do not show, are no misuse."""
    model, (function, detached) = Entries(), INTENDED[name]
    partition = ns.Partition.canonical(model)
    direction = [0.3 * u for u in direction_of(partition)]

    def measured(function, engine):
        loss = lambda m, _: function(m()).exp().square().sum()  # noqa: E731
        return ns.summarize(loss, model, [torch.zeros(1)], direction=direction, engine=engine)

    got, expected = measured(function, "forward"), measured(detached, "nested")
    tolerance = 1e-12 if name == "padding" else 1e-6  # grids are of single precision
    assert error(got.loss, expected.loss) < tolerance
    assert error(got.gradient, expected.gradient) < tolerance
    assert error(got.hessian, expected.hessian) < tolerance
    assert error(got.third, expected.third) < tolerance
    assert error(measured(function, "forward").hessian, got.hessian) < 1e-12


# At points where the usual formulas have a kink and the functions have none -----------------------------------------


AT_ZERO = {
    "log of the sigmoid": F.logsigmoid,
    "cross-entropy of logits": lambda x: F.binary_cross_entropy_with_logits(
        x, x.new_full(x.shape, 0.3), reduction="none"
    ),
    "soft margins": lambda x: F.soft_margin_loss(x, x.new_ones(x.shape), reduction="none"),
    "focal": lambda x: (1 - x.sigmoid()).square() * F.logsigmoid(x),
    "x log y": lambda x: torch.xlogy(x, x + 2),
    "x log y, a number": lambda x: torch.xlogy(x, 0.7),
    "number log y": lambda x: torch.xlogy(0.7, x + 2),
    "x log(1 + y)": lambda x: torch.special.xlog1py(x, x + 2),
    "relative entropy": lambda x: F.kl_div(x.sin(), x.square() + 0.5, reduction="none"),
    "products": lambda x: x.prod(),
    "cumulated products": lambda x: x.cumprod(0),
    "powers": lambda x: x**2 + x**3 + x ** torch.tensor(4.0, dtype=x.dtype),
    "log of sums": lambda x: torch.logaddexp(x, 2 * x),
    "softplus": F.softplus,
    "sinc": torch.sinc,
    "log of the normal distribution": torch.special.log_ndtr,
    "angle": lambda x: torch.atan2(x, x + 2),
    "sinc, small": lambda x: torch.sinc(x / 30),
    "Bessel functions": lambda x: torch.special.i0(x) + torch.special.i1(x),
    "Bessel functions, close to zero": lambda x: torch.special.i0(x * 1e-7) + torch.special.i1(x * 1e-7) * 1e20,
}


ON_NUMBERS = {
    "logsumexp": lambda x, dim: x.logsumexp(dim),
    "normalize": lambda x, dim: F.normalize(x, dim=dim) * x,
    "norm": lambda x, dim: torch.linalg.vector_norm(x, 3, dim=dim),
    "sum": lambda x, dim: x.sum(dim),
    "mean": lambda x, dim: x.mean(dim),
    "running sum": lambda x, dim: x.cumsum(dim),
    "index": lambda x, dim: x.index_select(dim, torch.tensor([0])),
    "flip": lambda x, dim: x.flip([dim]),
    "softmax": lambda x, dim: x.softmax(dim) * x,
    "log-softmax": lambda x, dim: x.log_softmax(dim) + x,
    "cosine": lambda x, dim: F.cosine_similarity(x, x.cos(), dim) * x,
    "transposed": lambda x, dim: x.transpose(0, dim),
    "sorted": lambda x, dim: x.sort(dim)[0],
}
"""Of a tensor without axes, along the one that torch lets it have."""


@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("name", ON_NUMBERS)
def test_numbers_have_one_axis(name, dim) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    u = [torch.randn_like(p) for p in model.parameters()]

    def loss_fn(m, x):
        return ON_NUMBERS[name](m(x).sin().mean() + 0.5, dim).sin() * m(x).cos().mean()

    got, expected = (ns.summarize(loss_fn, model, [x], direction=u, engine=e) for e in ("forward", "nested"))
    torch.testing.assert_close(got.hessian, expected.hessian)
    torch.testing.assert_close(got.third, expected.third)


@pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 700.0), (torch.float32, 30.0)])
def test_the_log_of_the_normal_distribution_far_out(dtype, far) -> None:
    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, x):
            return torch.special.log_ndtr(self.w * x)

    batch, u = torch.tensor([-far, far], dtype=dtype), [torch.ones((), dtype=dtype)]
    got = ns.summarize(lambda m, x: -m(x).mean(), Point(), [batch], direction=u, order=2, engine="forward")
    slope = far * (far + 1 / far - 2 / far**3) / 2  # of −log Φ at −x, by Mills' ratio for large x
    torch.testing.assert_close(got.gradient, torch.tensor([slope], dtype=torch.float64), rtol=1e-6, atol=0)
    bend = far**2 * (1 - 1 / far**2) / 2
    torch.testing.assert_close(got.hessian, torch.tensor([[bend]], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", AT_ZERO)
def test_zeros_are_measured_like_anything_else(name) -> None:
    """The program is known, and was checked, when the zeros come."""
    function, engine = AT_ZERO[name], ns.measure.ForwardEngine()

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor([0.4, 1.2, -0.7, 0.9], dtype=torch.float64))
            self.y = nn.Parameter(torch.tensor([0.3, 0.2, 0.6, 0.8], dtype=torch.float64))

    model = Point()
    loss = lambda m, _: (m.y.cos() * function(m.x)).square().sum() + function(m.x).sum()  # noqa: E731
    partition = ns.Partition.canonical(model)
    direction = [torch.tensor([0.3, 0.7, -0.5, 0.4], dtype=torch.float64), 0.4 * torch.ones(4, dtype=torch.float64)]
    for _ in range(2):
        got = ns.summarize(loss, model, [torch.zeros(1)], direction=direction, engine=engine)
        expected, _ = by_differences(loss, model, None, partition, direction)
        assert error(got.gradient, expected.gradient) < 1e-9
        assert error(got.hessian, expected.hessian) < 1e-7
        assert error(got.third, expected.third) < 1e-6
        with torch.no_grad():
            model.x[1] = 0.0


def at_entries(place, padding):
    """What a volume has about whole places, from which a value that is 0 or −1 moves."""
    volume = torch.linspace(-1, 1, 27, dtype=torch.float64).sin().view(1, 1, 3, 3, 3)
    place = place.round().detach() + place - place.detach()
    grid = torch.stack([place, 0 * place, place.cos() - 1], -1).view(1, 1, 1, 4, 3)
    return F.grid_sample(volume, grid, padding_mode=padding, align_corners=True)


AT_KINKS = {
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "hard sigmoid": lambda x: F.hardsigmoid(x - 3) + F.hardsigmoid(x + 3),
    "Huber": lambda x: F.huber_loss(x + 1, x.new_zeros(x.shape), reduction="none"),
    "smooth L1": lambda x: F.smooth_l1_loss(x - 1, x.new_zeros(x.shape), reduction="none"),
    "margins": lambda x: F.multi_margin_loss((x + 1 - torch.arange(4) % 2)[None], torch.tensor([1])),
    "fmax": lambda x: torch.fmax(x, 2 * x) + torch.fmin(x, 3 * x),
    "a deviation of equals": lambda x: (x * 0).std() + x.square().sum(),
    "a volume at its entries": lambda x: at_entries(x, "zeros"),
    "a volume at its edge": lambda x: at_entries(x - 1, "border"),
}


@pytest.mark.parametrize("name", AT_KINKS)
def test_at_a_kink_the_slope_is_that_of_torch(name) -> None:
    function, engine = AT_KINKS[name], ns.measure.ForwardEngine()
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor([0.4, 1.2, -0.7, 0.9], dtype=torch.float64))
    loss = lambda m, _: (function(m.x) + 0.3).square().sum()  # noqa: E731
    u = torch.tensor([0.3, 0.7, -0.5, 0.4], dtype=torch.float64)
    ns.summarize(loss, model, [torch.zeros(1)], direction=[u], engine=engine)
    with torch.no_grad():
        model.x[:2] = 0.0
    (gradient,) = torch.autograd.grad(loss(model, None), model.x, create_graph=True)
    got = ns.summarize(loss, model, [torch.zeros(1)], direction=[u], engine=engine)
    torch.testing.assert_close(got.gradient, (gradient * u).sum().detach().view(1), rtol=1e-7, atol=1e-12)
    if "margins" not in name and "hard" not in name and "deviation" not in name:  # which torch differentiates once
        (product,) = torch.autograd.grad((gradient * u).sum(), model.x)
        torch.testing.assert_close(got.hessian, (product * u).sum().view(1, 1), rtol=1e-7, atol=1e-12)


def test_products_of_values_of_two_types():
    model = Entries()

    def loss(model, batch):
        return (model().sin().float() * model().cos()).square().mean() + (model()[0].float() * model()).sin().mean()

    batches, direction = [torch.zeros(1)], direction_of(ns.Partition.canonical(model))
    got, expected = (ns.summarize(loss, model, batches, direction=direction, engine=e) for e in ("forward", "nested"))
    assert error(got.hessian, expected.hessian) < 1e-5
    assert error(got.third, expected.third) < 1e-5


def test_entries_in_the_places_of_a_mask_are_looked_up():
    """Images in a text: the general rule is right, and slow."""
    model, engine = Entries(), ns.measure.ForwardEngine()
    loss = Loss(lambda m, b: FUNCTIONS["masked_scatter"](m()).square().sum(), model)
    u = [torch.ones_like(p) for p in model.parameters()]
    engine.measure(loss, torch.zeros(1), ns.Partition.canonical(model), u, 3, "diagonal")
    assert "general" not in engine.kinds(loss).values()


@pytest.mark.parametrize(("dtype", "coarse"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_quotients_by_a_constant_of_a_coarser_type(dtype, coarse):
    """A count, say, in the type that a library made it in: its reciprocal would have fewer digits than the quotient."""
    model, count = nn.ParameterList([torch.linspace(-1, 1, 5, dtype=dtype)]), torch.tensor(7.0, dtype=coarse)
    loss = lambda model, batch: (model[0].sin() / count).sum() + model[0].cos().sum() / count  # noqa: E731
    u = [torch.ones_like(model[0])]
    got, expected = (ns.summarize(loss, model, [torch.zeros(1)], direction=u, engine=e) for e in ("forward", "nested"))
    assert error(got.hessian, expected.hessian) < 10 * torch.finfo(dtype).eps
    assert error(got.third, expected.third) < 10 * torch.finfo(dtype).eps


def test_what_does_not_move_may_have_slopes_without_bound():
    """A row of zeros, divided by a length that is clamped to 1e-12: its third derivative overflows single precision."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3)
    with torch.no_grad():
        x[0], model[0].bias[:] = -9.0, -0.1
        model[0].weight.abs_()

    def measured(model, x):
        direction = [0.3 * torch.ones_like(p) for p in model.parameters()]
        loss = lambda m, x: (F.normalize(m(x) + m(x).square(), dim=1) - 0.3).square().mean()  # noqa: E731
        return ns.summarize(loss, model, [x], direction=direction, engine="forward")

    assert not model(x[0]).any()
    got, expected = measured(model, x), measured(model.double(), x.double())
    assert error(got.hessian, expected.hessian) < 1e-4
    assert error(got.third, expected.third) < 1e-4


@pytest.mark.parametrize("own", [False, True])
def test_distances_between_many_points(own):
    """Which torch computes by products: those of points from themselves are rounding, and do not move."""
    points, centres = torch.randn(30, 3, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    layer = nn.Linear(3, 4).double()

    def distances(x, y):
        squares = (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)
        equal = squares == 0
        return torch.where(equal, 0.0, torch.where(equal, 1.0, squares).sqrt())

    def summary(distances):
        def loss(model, x):
            moved = model(x).tanh()
            return torch.exp(-distances(moved, moved if own else centres)).mean()

        partition = ns.Partition.canonical(layer)
        return ns.summarize(loss, layer, [points], partition=partition, direction=partition.parameters)

    got, expected = summary(torch.cdist), summary(distances)
    assert error(got.hessian, expected.hessian) < 1e-8
    assert error(got.third, expected.third) < 1e-8


ZERO = torch.zeros(3, dtype=torch.float64)
LENGTHS = {
    "norm": lambda p: p.norm() ** 2,
    "norm of rows": lambda p: p.view(1, 3).norm(dim=1).square().sum(),
    "norm of a matrix": lambda p: torch.linalg.matrix_norm(p.view(1, 3)).square(),
    "dist": lambda p: torch.dist(p, ZERO) ** 2,
    "cdist": lambda p: torch.cdist(p.view(1, 3), ZERO.view(1, 3)).square().sum(),
    "cdist, many": lambda p: torch.cdist(p.expand(30, 3), ZERO.expand(30, 3)).square().mean(),
    "part of cdist": lambda p: torch.cdist(p.view(1, 3), ZERO.view(1, 3))[0, 0].square(),
    "pdist": lambda p: F.pdist(torch.stack([p, ZERO])).square().sum(),
    "absolute values": lambda p: p.abs().square().sum(),
    "times itself": lambda p: (lambda size: size * size)(p.norm()),
    "a spectrum": lambda p: torch.fft.fft(p).abs().square().mean(),
    "no length": lambda p: p.square().sum(),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_squares_of_lengths_bend_where_these_are_zero(name):
    model = nn.Linear(3, 1).double()
    model.weight.data.zero_()
    direction = [torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)]

    def loss(model, x):
        return (model(x) - 1).square().mean() + 5 * LENGTHS[name](model.weight.view(3))

    x = torch.randn(20, 3, dtype=torch.float64)
    got = ns.summarize(loss, model, [x], direction=direction)
    expected = 2 * (x @ direction[0].T).square().mean() + 5 * 2 * 14.0
    torch.testing.assert_close(got.hessian[0, 0], expected)
    assert abs(float(got.third[0])) < 1e-8


def squared(size):
    return F.mse_loss(size, torch.zeros_like(size))


@pytest.mark.parametrize("bend", [lambda p: p.norm().cosh(), lambda p: squared(p.norm()), lambda p: squared(p.abs())])
def test_what_else_bends_at_a_length_of_zero_is_refused(bend):
    model = nn.Linear(3, 1).double()
    model.bias.data.zero_()

    def loss(model, x):
        return (model(x) - 1).square().mean() + bend(model.bias)

    with pytest.raises(Refusal, match="exactly zero"):
        ns.summarize(loss, model, [torch.randn(20, 3, dtype=torch.float64)])


@pytest.mark.parametrize("size", [lambda p: p.norm(), lambda p: p.abs().sum()])
def test_a_length_of_zero_itself_is_a_kink(size):
    model, x = nn.Linear(3, 1).double(), torch.randn(20, 3, dtype=torch.float64)
    model.bias.data.zero_()
    got, plain = (
        ns.summarize(lambda m, x, f=f: (m(x) - 1).square().mean() + f * size(m.bias), model, [x]) for f in (0.1, 0)
    )
    torch.testing.assert_close(got.hessian[1, 1], plain.hessian[1, 1] * (got.gradient[1] / plain.gradient[1]))


@pytest.mark.parametrize("seed", range(6))
def test_several_kinks_at_once_are_measured_by_torchs_convention(seed):
    """Rows of zeros before a layer without bias: every unit of it is exactly at its kink."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    model[0].bias.data.zero_()
    x = torch.cat([torch.zeros(3, 4), torch.randn(7, 4)]).double()

    def loss(model, x):
        return (model(x) - 1).square().mean()

    got, expected = (ns.summarize(loss, model, [x], engine=engine) for engine in ("forward", "nested"))
    assert error(got.hessian, expected.hessian) < 1e-10


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_curves_of_large_numbers_in_half_precision(approximate):
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1)), 150 * torch.randn(20, 3)
    nn.init.constant_(model[0].weight, 1)

    def loss(model, x):
        return (model[1](F.gelu(model[0](x), approximate=approximate)) / 100).float().square().mean()

    direction = [torch.full_like(p, 0.01) for p in model.parameters()]
    expected = ns.summarize(loss, model, [x], direction=direction)
    got = ns.summarize(loss, model.half(), [x.half()], direction=[u.half() for u in direction])
    assert error(got.hessian, expected.hessian) < 0.05
    assert bool(got.third.isfinite().all())


def test_second_derivatives_that_are_not_there_are_told():
    """Singular values that are equal have none, though the sum of their squares has: a warning, and no number."""
    model = nn.Linear(3, 3).double()
    model.weight.data.zero_()

    def loss(model, x):
        return torch.linalg.svdvals(model.weight + torch.eye(3)).square().sum() + model(x).sum()

    with pytest.warns(UserWarning, match="second derivatives are not finite for 'weight'"):
        ns.summarize(loss, model, [torch.randn(2, 3, dtype=torch.float64)])


def test_third_derivatives_that_are_not_there_are_told():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2).double())
    with pytest.warns(UserWarning, match="^third derivatives are not finite for 'w', though the second are"):
        ns.summarize(lambda m, _: (m.w**2.5).sum() + m.w.sum(), model, [torch.ones(1)])


def test_derivatives_that_are_not_there_are_told():
    """A root of zero, which its square makes NaN of: in the gradient, too."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2).double())
    loss = lambda m, _: m.w.square().sum().sqrt() ** 2 + m.w.sum()  # noqa: E731
    with pytest.warns(UserWarning, match="^derivatives are not finite for 'w'"):
        ns.summarize(loss, model, [torch.ones(1)], direction=[torch.ones(2).double()])
