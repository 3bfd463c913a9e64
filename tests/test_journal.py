"""What is noted of operations while a loss is evaluated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from newton_summary.measure.journal import Journal, watching


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_whole_where_nothing_but_the_loss_is_wanted(kind) -> None:
    """Where a mode watches, torch takes them apart, into several operations for every step."""
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2, dropout=0.5)
    counter = nn.Module()
    counter.register_buffer("calls", torch.zeros(()))
    model = nn.ModuleDict({"layer": layer, "counter": counter})
    x = torch.randn(50, 2, 3)

    def loss_fn(model, batch):
        model["counter"].calls.add_(1)
        hidden = model["layer"](batch)[0]
        hidden.mul_(2.0)  # what was made within is the loss's own
        return hidden.square().mean()

    seen = 0

    class Counts(Journal):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal seen
            seen += 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    journal = Counts()
    with torch.no_grad(), watching(journal, model):
        torch.manual_seed(1)
        value = loss_fn(model, x)
    assert seen < 25
    assert len(journal._before) == 1  # the counter
    journal.undo()
    assert counter.calls == 0
    with torch.no_grad():
        torch.manual_seed(1)
        assert value.item() == pytest.approx(loss_fn(model, x).item(), rel=1e-6)
