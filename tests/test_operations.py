"""Every operation and module that torch has samples of for its own tests: exact by differences, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import product

import hypothesis
import pytest
import torch
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import Refusal

PARTS, SAMPLES, MOST = 8, {torch.float64: 4, torch.complex128: 2}, 40_000
STEP = 1e-4

ROUNDED = {"bfloat16", "half", "chalf", "float", "cfloat", "nn.functional.hardsigmoid"}
"""What torch computes in few digits, be it only its slope: differences are noise."""

UNDEFINED = {"linalg.norm.subgradients_at_zero", "as_strided_scatter"}
"""At points where there is no derivative; writes of complex entries over each other, whose gradient is torch's own."""

TWICE = "some entries are written twice, and torch's gradient counts both"
REFUSED = {
    "_batch_norm_with_update": "normalise by a module or function of torch.nn",
    "_segment_reduce.lengths": "along another axis than the first, or from a start on",
    "_segment_reduce.offsets": "along another axis than the first, or from a start on",
    "index_fill": TWICE,
    "logcumsumexp": "third derivatives of complex ones are no numbers in torch",
    "matrix_exp": "so large that differences of the loss tell nothing",
    "nn.CTCLoss": "of what are no logarithms of probabilities, for which torch's gradient is another one",
    "nn.LinearCrossEntropyLoss": "torch can differentiate it once, where it works in chunks",
    "native_layer_norm": "of a single feature, where the gradient is rounding and nothing else",
    "nn.functional.linear_cross_entropy.chunked": "torch can differentiate it once",
    "nn.functional.linear_cross_entropy.chunked_none": "torch can differentiate it once",
    "nn.functional.max_unpool1d": TWICE,
    "nn.functional.max_unpool2d": TWICE,
    "nn.functional.max_unpool3d": TWICE,
    "to_sparse": "a sparse tensor of what moves",
}
"""What no engine measures, or not all samples of, and why."""


@pytest.fixture(autouse=True)
def _settings(monkeypatch) -> Iterator[None]:
    """Torch's own tests, as they are imported, lock the switches of ``torch.backends``, and set hypothesis up."""
    flags = torch.backends.flags_frozen.__globals__
    name = "__allow_nonbracketed_mutation_flag"
    monkeypatch.setitem(flags, name, flags[name])
    yield
    hypothesis.settings.load_profile("repeatable")


class Sampled(nn.Module):
    """A function of some arguments, of which those that torch would differentiate by are parameters."""

    def __init__(self, function, *arguments, parts=lambda result: result) -> None:
        super().__init__()
        self.function, self.arguments, self.parts = function, arguments, parts
        self.leaves = [t for t in tensors(arguments) if t.requires_grad and t.numel()]
        self.moving = nn.ParameterList([nn.Parameter(t.detach().clone()) for t in self.leaves])

    def forward(self) -> Tensor:
        """Some smooth function of all results."""
        values = {id(leaf): p.clone() for leaf, p in zip(self.leaves, self.moving, strict=True)}
        first, args, kwargs = replaced(list(self.arguments), values)
        total = torch.zeros((), dtype=torch.float64)
        for x in tensors(self.parts(self.function(*first, *args, **kwargs))):
            if x.requires_grad and x.numel():
                x = x.to_dense() if x.layout is not torch.strided else x
                x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
                part = (x * torch.linspace(-1, 1.3, x.numel(), dtype=x.dtype).sin().view(x.shape)).sum()
                total = total + part + 0.3 * x.square().mean() + 0.05 * part**3 / (1 + x.numel())
        return total


def operation(op, sample) -> Sampled:
    """One of torch's, and a sample of its arguments."""
    function = op.get_op()
    wrapped = lambda *args, **kwargs: op.gradcheck_wrapper(function, *args, **kwargs)  # noqa: E731
    return Sampled(wrapped, [sample.input], sample.args, sample.kwargs, parts=sample.output_process_fn_grad)


def tensors(values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))


def replaced(value, by):
    """A value with others in place of some tensors."""
    if isinstance(value, Tensor):
        return by.get(id(value), value)
    if isinstance(value, list | tuple):
        parts = [replaced(v, by) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return {k: replaced(v, by) for k, v in value.items()} if isinstance(value, dict) else value


def some_way(p: Tensor, generator) -> Tensor:
    """A way to go, short beside what a tensor holds; what is infinite stays where it is."""
    finite = p.isfinite()
    way = torch.randn(p.shape, generator=generator, dtype=p.dtype) * finite
    return 0.05 * (1 + p[finite].abs().mean()) / max(1.0, float(way.abs().square().sum())) ** 0.25 * way


def gradient_at(model, partition, u, rates) -> Tensor:
    """The first derivatives by the groups, at other rates."""
    start = [p.detach().clone() for p in partition.parameters]
    try:
        with torch.no_grad():
            for p, v, rate in zip(partition.parameters, u, rates.tolist(), strict=True):
                p.add_(v, alpha=rate)
        torch.manual_seed(0)
        found = torch.autograd.grad(model(), partition.parameters, allow_unused=True)
    finally:
        with torch.no_grad():
            for p, before in zip(partition.parameters, start, strict=True):
                p.copy_(before)
    dense = [None if g is None or g.layout is torch.strided else g.to_dense() for g in found]
    return torch.stack(
        partition.dot([d if d is not None else g for d, g in zip(dense, found, strict=True)], u)
    ).double()


def differences(model, partition, u) -> tuple[Tensor, ...]:
    """First, second and third derivatives, the last on the diagonal, and by how much the latter two may be off."""
    here = gradient_at(model, partition, u, torch.zeros(len(partition)))
    found = []
    for step in (STEP, 2 * STEP):
        ways = step * torch.eye(len(partition), dtype=torch.float64)
        pairs = [[gradient_at(model, partition, u, sign * way) for sign in (1, -1)] for way in ways]
        second = torch.stack([(a - b) / (2 * step) for a, b in pairs])
        third = torch.stack([(a - 2 * here + b)[s] / step**2 for s, (a, b) in enumerate(pairs)])
        found.append((second, third))
    (second, third), (wide_second, wide_third) = found
    off = [(a - b).abs().max() for a, b in zip(*found, strict=True)]
    return here, (4 * second - wide_second) / 3, (4 * third - wide_third) / 3, *off


def operations(part: int):
    """Titles, names and models."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db[part::PARTS]:
        name = ".".join(filter(None, [op.name, op.variant_test_name]))
        for dtype, count in SAMPLES.items():
            if not op.supports_autograd or dtype not in op.supported_dtypes("cpu") or name in ROUNDED | UNDEFINED:
                continue
            torch.manual_seed(0)
            samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
            for number in range(0, len(samples), max(1, len(samples) // count)):
                yield f"{name}, sample {number} in {str(dtype)[6:]}", name, operation(op, samples[number])


def modules(part: int):
    """The same of layers and losses, in both modes."""
    from torch.testing._internal.common_modules import module_db

    for info, training in product(module_db[part::PARTS], (True, False)):
        torch.manual_seed(0)
        options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": training}
        samples = list(info.module_inputs_func(info, **options))
        for number in range(0, len(samples), max(1, len(samples) // SAMPLES[torch.float64])):
            made, given = samples[number].constructor_input, samples[number].forward_input
            module = info.module_cls(*made.args, **made.kwargs).double().train(training)
            yield f"{info.name}, sample {number}", info.name, Sampled(module, [], given.args, given.kwargs)


def is_usable(model) -> bool:
    """Whether all parameters are there, dense, and in double precision, and there are not too many."""
    parameters = [*model.parameters(), *model.leaves]
    if any(map(nn.parameter.is_lazy, parameters)):
        return False
    kinds = {(p.layout, p.dtype) for p in parameters}
    return kinds <= {(torch.strided, kind) for kind in SAMPLES} and 0 < sum(map(Tensor.numel, parameters)) < MOST


def is_differentiable(model) -> bool:
    """Whether torch has a finite loss and a gradient for it."""
    try:
        value = model()
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    except (RuntimeError, NotImplementedError, IndexError, TypeError, ValueError):
        return False
    return bool(value.isfinite()) and any(g is not None for g in found)


def wrong(model) -> str:
    """How measured derivatives differ from differences; nothing where they do not.

    Raises:
        Refusal: they cannot be measured.
    """
    partition, generator = ns.Partition.canonical(model), torch.Generator().manual_seed(1)
    u = [some_way(p.detach(), generator) for p in partition.parameters]
    first, second, third, second_off, third_off = differences(model, partition, u)
    torch.manual_seed(0)
    got = ns.summarize(lambda m, _: m(), model, [torch.zeros(1)], direction=u, batch_size=1)
    tolerances = (
        ("first", got.gradient, first, 1e-8, 1e-10),
        ("second", got.hessian, second, 1e-5, 1e-8 + 3 * float(second_off)),
        ("third", got.third_diagonal, third, 1e-3, 1e-5 + 3 * float(third_off)),
    )
    for order, one, other, relative, absolute in tolerances:
        if bool((other.isfinite() & ~one.isfinite()).any()):
            raise Refusal("there is a warning that these are no numbers")
        if not bool(((one - other).abs() <= absolute + relative * other.abs().max()).all()):
            return f"{order} derivatives {one.tolist()}, and by differences {other.tolist()}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", [operations, modules])
def test_derivatives_are_those_of_the_operation_or_refused(kind, part) -> None:
    found, refused = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what is deprecated
        for title, name, model in kind(part):
            if is_usable(model) and is_differentiable(model):
                try:
                    how = wrong(model)
                except Refusal:
                    refused.add(name)
                else:
                    found += [f"{title}: {how}"] if how else []
    assert not found, "\n".join(found)
    assert refused <= set(REFUSED), refused
