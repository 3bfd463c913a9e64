"""What ``torch.compile`` leaves out, where it compiles a whole training step with the optimizer's in it."""

from __future__ import annotations

from torch._compile import _disable_dynamo

uncompiled = _disable_dynamo  # as in torch's own optimizers: what compiles is loaded when it is first called
"""For methods that measure, or count steps: they look into models and losses, and no two calls are alike."""
