"""Where the direction u comes from: the gradient, momentum, Adam, or any ``torch.optim.Optimizer``; one a file."""

from newton_summary.optim.directions.adam import Adam, NAdam, descends
from newton_summary.optim.directions.base import Direction, Groups, State
from newton_summary.optim.directions.gradient import Gradient
from newton_summary.optim.directions.momentum import Momentum
from newton_summary.optim.directions.named import resolve
from newton_summary.optim.directions.step_of import StepOf

__all__ = [
    "Adam",
    "Direction",
    "Gradient",
    "Groups",
    "Momentum",
    "NAdam",
    "State",
    "StepOf",
    "descends",
    "resolve",
]
