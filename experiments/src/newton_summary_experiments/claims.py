"""The claims of the paper (docs/method.md, section 4), each with a criterion, our number, and whether it held."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from newton_summary.plots.parts import is_bias, layer
from newton_summary.report.records import Row
from newton_summary.summary import Summary
from newton_summary_experiments import analysis
from newton_summary_experiments.costs import StepCost
from newton_summary_experiments.reproduction import DEFAULT, NETWORKS, OPTIMIZERS, Reproduction
from newton_summary_experiments.search import PAPER

_SHALLOW = ("mlp-mnist", "lenet-cifar10", "vgg-cifar10")
_DEEP = ("bigmlp-cifar10", "vbigmlp-cifar10")
_COMPARABLE = 2.0
_CLEARLY = 1.5
_TRAINED = 0.8
_TWO_MINUTES = 120.0
_LARGER = {"full": "at the paper's own size", "hours": "at the paper's width, a few epochs"}


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Args:
        held: on how many of the cases looked at it held.
        cases: how many these are; none stands for what cannot be tested at this budget.
        numbers: ours, in words.
    """

    held: int
    cases: int
    numbers: str

    def __str__(self) -> str:
        if not self.cases:
            return "not testable at this budget"
        if self.held == self.cases:
            return "held"
        return f"held in {self.held} of {self.cases}" if self.held else "did not hold"


@dataclass(frozen=True)
class Claim:
    """A claim.

    Args:
        text: what the paper says.
        criterion: when we say that it held.
        figure: the figure or table on the page that shows it.
        check: gives the verdict.
    """

    text: str
    criterion: str
    figure: str
    check: Callable[[Reproduction], Verdict]


def table(study: Reproduction) -> str:
    """A row for each claim, in Markdown: our numbers and the verdict at every budget."""
    header = ("the paper", "we say it held where", "ours", "where to see it", "verdict", *_LARGER.values())
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    quick, *larger = (study.at(budget) for budget in ("quick", *_LARGER))
    for claim in CLAIMS:
        verdict, *others = (claim.check(each) for each in (quick, *larger))
        there = [f"{other.numbers}: **{other}**" if other.cases else other.numbers for other in others]
        cells = (claim.text, claim.criterion, verdict.numbers, claim.figure, f"**{verdict}**", *there)
        lines.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """A cell of a table in Markdown."""
    return text.replace("|", r"\|")


# What is known --------------------------------------------------------------------------------------------------------


def moments(study: Reproduction, name: str) -> dict[str, tuple[int, Summary]]:
    """The summaries over the training set, at initialisation and at the best validation epoch, and their epochs."""
    known = study.measured(f"interactions-{name}")
    if known is None:
        return {}
    best = f"step {known['step']} (best)" if study.task(name).records > 1 else f"epoch {known['epoch']} (best)"
    return {
        "initialisation": (0, Summary.from_dict(known["initial"])),
        best: (known["epoch"], Summary.from_dict(known["best"])),
    }


def costs(study: Reproduction, name: str) -> dict[str, StepCost]:
    """The cost of a step of every optimizer on a task."""
    return {key: StepCost(**value) for key, value in (study.measured(f"costs-{name}") or {}).items()}


def epoch_seconds(study: Reproduction, name: str, optimizer: str) -> float | None:
    """The seconds of an epoch, with the measurements that were made: the median over seeds."""
    cost = costs(study, name).get(optimizer)
    runs = [rows for rows in study.all_rows(name, optimizer) if rows[-1].epoch]
    return None if cost is None or not runs else median(cost.seconds(rows[-1]) / rows[-1].epoch for rows in runs)


def at_equal_time(study: Reproduction, name: str, ours: str, theirs: str) -> tuple[float, float, float] | None:
    """The median losses of two optimizers when the faster has ended: the time, ours, theirs."""
    runs = [study.all_rows(name, optimizer) for optimizer in (ours, theirs)]
    known = costs(study, name)
    if not all(runs) or not {ours, theirs} <= set(known):
        return None
    return analysis.equal_time(runs[0], known[ours], runs[1], known[theirs])


def _final(study: Reproduction, name: str, optimizer: str) -> float:
    return median(analysis.final_loss(rows) for rows in study.all_rows(name, optimizer))


def _all_ran(study: Reproduction, name: str, optimizers: Sequence[str]) -> bool:
    return all(study.all_rows(name, optimizer) for optimizer in optimizers)


def _verdict(cases: Sequence[tuple[str, bool, str]]) -> Verdict:
    """From (name, whether it held, the number) of each case."""
    return Verdict(
        sum(held for _, held, _ in cases), len(cases), ", ".join(f"{n} {text}".strip() for n, _, text in cases)
    )


# Checks ---------------------------------------------------------------------------------------------------------------


def _long_range(study: Reproduction) -> Verdict:
    cases = []
    for name in study.tasks:
        found = moments(study, name)
        if found and sum(not is_bias(n) for n in found["initialisation"][1].names) > 1:
            value = analysis.long_range(found["initialisation"][1])
            cases.append((NETWORKS[name], value >= 0.1, f"{value:.2f}"))
    return _verdict(cases)


def _closer_to_blocks(study: Reproduction) -> Verdict:
    cases = []
    for name in study.tasks:
        for when, (_, summary) in moments(study, name).items():
            layers, matrix = analysis.layers_of(summary.names), summary.tensor(2)
            both = [analysis.unit_diagonal(m) for m in (matrix, analysis.inverse(matrix))]
            shares = [analysis.share_off_blocks(m, layers) for m in both]
            short = "start" if when == "initialisation" else "best"
            cases.append((f"{NETWORKS[name]} {short}", shares[1] < shares[0], f"{shares[0]:.2f} → {shares[1]:.2f}"))
    return _verdict(cases)


def _lenet_first_layer(study: Reproduction) -> Verdict:
    found = moments(study, "lenet-cifar10")
    if not found:
        return Verdict(0, 0, "")
    summary = found["initialisation"][1]
    first, *others = dict.fromkeys(analysis.layers_of(summary.names))
    among, with_first = analysis.mean_interaction(summary, others), analysis.mean_interaction(summary, [first], others)
    return _verdict(
        [("", among > _CLEARLY * with_first, f"{among:.2f} among the others, {with_first:.2f} with the first")]
    )


def _vgg_last_layers(study: Reproduction) -> Verdict:
    found = moments(study, "vgg-cifar10")
    if not found:
        return Verdict(0, 0, "")
    summary = found["initialisation"][1]
    layers = list(dict.fromkeys(analysis.layers_of(summary.names)))
    last, six, rest = (analysis.mean_interaction(summary, part) for part in (layers[-3:], layers[-6:], layers[:-3]))
    numbers = f"{last:.2f} in the last three layers, {six:.2f} in the last six, {rest:.2f} in all before the last three"
    return _verdict([("", last > six > rest, numbers)])


def _tridiagonal(study: Reproduction) -> Verdict:
    found = moments(study, "vbigmlp-cifar10")
    if not found:
        return Verdict(0, 0, "")
    cases = []
    for symbol in ("H̄", "H̄⁻¹"):
        shares = []
        for _, summary in found.values():
            matrix = summary.tensor(2) if symbol == "H̄" else analysis.inverse(summary.tensor(2))
            layers = analysis.layers_of(summary.names)
            shares.append(analysis.share_off_tridiagonal(analysis.unit_diagonal(matrix), layers))
        cases.append((symbol, shares[1] < 0.5 * shares[0], f"{shares[0]:.2f} → {shares[1]:.2f}"))
    return _verdict(cases)


def _biases(study: Reproduction) -> Verdict:
    return _over_networks(study, analysis.biases_to_weights, lambda ratio: ratio > 1)


def _orders_of_magnitude(study: Reproduction) -> Verdict:
    return _over_networks(study, analysis.decades, lambda spread: spread >= 1)


def _over_networks(study: Reproduction, number: object, holds: Callable[[float], bool]) -> Verdict:
    """From a number of the rates of the paper's method on each network, the median over training."""
    cases = []
    for name in study.tasks:
        value = analysis.over_training(study.all_rows(name, PAPER), number)
        if value is not None:
            cases.append((NETWORKS[name], holds(value), f"{value:.1f}"))
    return _verdict(cases)


def _compared(runs: list[list[Row]], first: list[str], second: list[str]) -> float | None:
    """The median over training of the mean rate of some groups over that of others."""

    def ratio(rates: dict[str, float]) -> float | None:
        one, two = analysis.mean_rate(rates, first), analysis.mean_rate(rates, second)
        return one / two if one and two else None

    return analysis.over_training(runs, ratio)


def _rates_by_depth(study: Reproduction) -> Verdict:
    cases = []
    for name, text, chosen in (
        ("lenet-cifar10", "convolutions / linear layers", (("conv1", "conv2"), ("linear1", "linear2", "linear3"))),
        ("vgg-cifar10", "last / first three convolutions", (("conv6", "conv7", "conv8"), ("conv1", "conv2", "conv3"))),
    ):
        runs = study.all_rows(name, PAPER)
        if runs:
            groups = [[f"{part}.weight" for part in parts] for parts in chosen]
            value = _compared(runs, *groups)
            if value is not None:
                cases.append((f"{NETWORKS[name]}, {text}:", value < 1, f"{value:.2f}"))
    return _verdict(cases)


def _vbig_rates(study: Reproduction) -> Verdict:
    runs = study.all_rows("vbigmlp-cifar10", PAPER)
    rows = [[row for row in run if row.rates] for run in runs]
    rows = [run for run in rows if len(run) > 1]
    if not rows:
        return Verdict(0, 0, "")
    names = list(rows[0][0].rates)
    weights, biases = [n for n in names if not is_bias(n)], [n for n in names if is_bias(n)]
    cases = []
    growth = [value for run in rows for name in names if (value := analysis.growth([row.rates[name] for row in run]))]
    if growth:
        cases.append(("growth of a group's rate", median(growth) > 1, f"× {median(growth):.1f}"))
    last_biases = _compared(runs, biases[-1:], biases[:1])
    if last_biases is not None:
        cases.append((f"biases of {layer(biases[-1])} / of {layer(biases[0])}", last_biases > 1, f"{last_biases:.1f}"))
    first_weights = _compared(runs, weights[:1], weights[1:])
    if first_weights is not None:
        cases.append(("weights of the first / of the others", first_weights < 1, f"{first_weights:.2f}"))
    return _verdict(cases)


def _comparable(study: Reproduction) -> Verdict:
    cases = []
    for name in (n for n in study.tasks if n in _SHALLOW and _all_ran(study, n, (PAPER, "adam", "kfac"))):
        ours, adam, kfac = (_final(study, name, optimizer) for optimizer in (PAPER, "adam", "kfac"))
        within = ours <= _COMPARABLE * max((loss for loss in (adam, kfac) if math.isfinite(loss)), default=0.0)
        cases.append((NETWORKS[name], within, f"{ours:.1e} (Adam {adam:.1e}, K-FAC {kfac:.1e})"))
    return _verdict(cases)


def _slow(study: Reproduction) -> Verdict:
    cases, untested = [], []
    for name in (n for n in study.tasks if n in _DEEP and _all_ran(study, n, (PAPER, "adam"))):
        best = min(_final(study, name, optimizer) for optimizer in OPTIMIZERS if study.all_rows(name, optimizer))
        if best > _TRAINED * math.log(10):
            untested.append(
                f"; {NETWORKS[name]} not testable at this budget: the best of all optimizers reaches {best:.2f}"
            )
            continue
        ours, adam = (_final(study, name, optimizer) for optimizer in (PAPER, "adam"))
        cases.append((NETWORKS[name], ours > _COMPARABLE * adam, f"{ours:.2g} (Adam {adam:.2g})"))
    verdict = _verdict(cases)
    return replace(verdict, numbers=verdict.numbers + "".join(untested))


def _some_diverge(study: Reproduction) -> Verdict:
    searched = [
        loss for (_, optimizer), s in study.searches.items() if optimizer == PAPER for loss in s.losses.values()
    ]
    runs = [math.isinf(analysis.final_loss(rows)) for name in study.tasks for rows in study.all_rows(name, PAPER)]
    if not searched and not runs:
        return Verdict(0, 0, "")
    lost = sum(map(math.isinf, searched))
    numbers = f"{lost} of {len(searched)} in the searches, {sum(runs)} of {len(runs)} with the best hyperparameters"
    return Verdict(int(lost + sum(runs) > 0), 1, numbers)


def _slower_than_kfac(study: Reproduction) -> Verdict:
    cases = []
    for name in study.tasks:
        ours, theirs = (epoch_seconds(study, name, optimizer) for optimizer in (PAPER, "kfac"))
        if ours and theirs:
            cases.append((NETWORKS[name], ours > theirs, f"{ours:.2f} s against {theirs:.2f}"))
    return _verdict(cases)


def _full_batch(study: Reproduction) -> Verdict:
    known = study.measured("full-batch")
    if known is None:
        return Verdict(0, 0, "")
    seconds, images = known
    return Verdict(int(seconds < _TWO_MINUTES), 1, f"{seconds:.1f} s for {images:,} images")


def _default_against(rival: str) -> Callable[[Reproduction], Verdict]:
    def check(study: Reproduction) -> Verdict:
        cases = []
        for name in study.tasks:
            found = at_equal_time(study, name, DEFAULT, rival)
            if found is not None:
                _, ours, theirs = found
                cases.append((NETWORKS[name], ours <= theirs, f"{ours:.2e} against {theirs:.2e}"))
        return _verdict(cases)

    return check


CLAIMS = (
    Claim(
        "long-range interactions between layers exist",
        "at initialisation some pair of weights half the network apart has |H̄_ij| ≥ 0.1 √(H̄_ii H̄_jj); the largest such",
        "figures 1, 2, 5",
        _long_range,
    ),
    Claim(
        "H̄⁻¹ is closer to block-diagonal than H̄",
        "the share of the norm off the layers' blocks is smaller for H̄⁻¹, both scaled to a unit diagonal",
        "figures 1, 2, 5",
        _closer_to_blocks,
    ),
    Claim(
        "LeNet: all layers but the first interact at initialisation",
        f"the mean interaction of the others is {_CLEARLY:g} times that with the first",
        "figure 1",
        _lenet_first_layer,
    ),
    Claim(
        "VGG: the last three layers interact strongly, the last six less",
        "the mean interaction falls from the last three to the last six, and is less before the last three",
        "figure 2",
        _vgg_last_layers,
    ),
    Claim(
        "VBigMLP: H̄ and H̄⁻¹ become tridiagonal",
        "the share of the norm beyond neighbouring chunks at least halves from the start to the best epoch",
        "figure 5",
        _tridiagonal,
    ),
    Claim(
        "biases get larger rates than weights",
        "rate of a bias / of its layer's weight is above 1, geometric mean over layers, median over training",
        "figures 3, 6",
        _biases,
    ),
    Claim(
        "rates differ by orders of magnitude",
        "at least one decade from the smallest to the largest, median over training",
        "figures 3, 6",
        _orders_of_magnitude,
    ),
    Claim(
        "LeNet: smaller rates for convolutions than for linear layers; VGG: for the last convolutions than the first",
        "the ratio of the weights' rates is below 1, median over training",
        "figures 3, 6",
        _rates_by_depth,
    ),
    Claim(
        "VBigMLP: rates grow; those of the last biases are larger than of the first; the first weights' are smallest",
        "each of the three on its own",
        "figure 6",
        _vbig_rates,
    ),
    Claim(
        "the loss reached is comparable to Adam's and K-FAC's (MLP, LeNet, VGG)",
        f"final training loss of paper mode at most {_COMPARABLE:g} times the larger of theirs that is finite",
        "figures 4, 7",
        _comparable,
    ),
    Claim(
        "BigMLP and VBigMLP are slow",
        f"final training loss of paper mode more than {_COMPARABLE:g} times Adam's; tested where the best of all "
        f"gets below {_TRAINED:g} times the loss of guessing, ln 10",
        "figures 4, 7",
        _slow,
    ),
    Claim("some runs diverge", "any run of paper mode ended early", "the searches", _some_diverge),
    Claim("an epoch takes longer than K-FAC's", "processor time of an epoch", "seconds of an epoch", _slower_than_kfac),
    Claim(
        "(ours) the default is better than paper mode",
        "training loss at equal time, without a search against the best of one",
        "figures 4, 7",
        _default_against(PAPER),
    ),
    Claim(
        "(ours) the default is at least as good as K-FAC",
        "training loss at equal time, without a search against the best of one",
        "figures 4, 7",
        _default_against("kfac"),
    ),
    Claim(
        "(ours) H̄ of LeNet over a whole data set takes less than two minutes",
        "seconds by the clock, one thread, the full network and all images of the data file",
        "figure 1",
        _full_batch,
    ),
)
