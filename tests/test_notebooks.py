"""What notebooks show: tables of a summary, of advice and of suggested rates."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import torch
from torch import nn
from torch.nn import functional

import newton_summary as ns
from newton_summary.watch.advice import advise


def cells(shown: str) -> list[list[str]]:
    """The texts of the rows of the table; it must be well-formed."""
    tree = ElementTree.fromstring(f"<div>{shown}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def summary(*gradient: float, names=None) -> ns.Summary:
    count = len(gradient)
    hessian = torch.eye(count).double() + 0.5 * torch.ones(count, count).double().tril(-1)
    return ns.Summary(2.5, gradient, hessian + hessian.T, None, names or [f"g{n}" for n in range(count)])


def test_a_summary_is_a_table_of_slopes_and_interactions() -> None:
    shown = summary(1.0, -2.0)._repr_html_()
    assert cells(shown) == [["group", "slope ḡ", "H̄ g0", "H̄ g1"], ["g0", "1", "2", "0.5"], ["g1", "-2", "0.5", "2"]]
    assert "loss 2.5" in shown
    assert len(re.findall(r"rgba\(214, 39, 40, 0\.60\)", shown)) == 2, "the diagonal is as red as can be"
    assert len(re.findall(r"rgba\(214, 39, 40, 0\.15\)", shown)) == 2


def test_of_many_groups_and_of_first_order_there_are_columns_only() -> None:
    many = cells(summary(*[1.0] * 60)._repr_html_())
    assert many[0] == ["group", "slope ḡ", "H̄ of it alone"]
    assert many[-1] == ["g59", "1", "2"]
    first = ns.Summary(1.0, [0.5], None, None, ["all"])
    assert cells(first._repr_html_()) == [["group", "slope ḡ"], ["all", "0.5"]]
    assert "Summary of 1 group, loss" in first._repr_html_()
    assert "from 1 batch<" in advise([summary(1.0)])._repr_html_()


def test_names_are_escaped() -> None:
    evil = '<script>alert("1")</script>'
    shown = (
        summary(1.0, 1.0, names=[evil, "`b`"])._repr_html_()
        + advise([summary(1.0, 0.0, names=[evil, "b"])])._repr_html_()
    )
    assert "<script" not in shown
    assert cells(shown)[1][0] == evil


def test_advice_is_a_table_with_its_sentences_and_who_has_none_is_grey() -> None:
    parts = [ns.Summary(1.0, [6 + e, 1.3 + e, 1 - e], torch.eye(3), None, ["a", "b", "c"]) for e in (-0.1, 0.0, 0.1)]
    advice = advise(parts)
    shown = advice._repr_html_()
    rows = cells(shown)
    assert rows[0] == ["group", "alone", "90% interval", "jointly"]
    assert rows[1][:2] == ["a", "6×"]
    assert shown.count("color: #888") == 2 * 4, "no sentence singles b and c out, though b is surely above 1"
    assert all(words.replace("`", "") in re.sub(r"</?code>", "", shown) for words in advice.sentences())


def test_suggested_rates_are_a_table() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    batches = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(8)]
    suggested = ns.suggest_rates(
        lambda m, b: functional.cross_entropy(m(b[0]), b[1]), model, batches, torch.optim.SGD(model.parameters(), 0.1)
    )
    rows = cells(suggested._repr_html_())
    assert [row[0] for row in rows[1:]] == list(suggested.rates)
    assert all(word in repr(suggested) for row in rows for word in row)
