"""How far apart two computations of one value may be.

Equal bits may be asked for only where the very same kernel runs on the very same memory: a kernel for other vector
registers, or another order of sums, rounds differently.  ``make test-kernels`` runs the numbers under several.
"""

import torch

ROUNDINGS = 1000
"""Of the largest entry: more than sums over the networks of these tests come to, and far less than any mistake."""


def is_close(actual, expected, roundings: float = ROUNDINGS) -> bool:
    """Whether two tensors or numbers agree up to some roundings of the largest entry, in their own type."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    kind = actual.dtype if actual.is_floating_point() else torch.float64
    limit = roundings * torch.finfo(kind).eps * float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((actual - expected).abs() <= limit).all())


def assert_rounded(actual, expected, roundings: float = ROUNDINGS) -> None:
    """Fails where two tensors or numbers are further apart than roundings explain."""
    assert is_close(actual, expected, roundings), f"{actual}\nis not, but for rounding,\n{expected}"
