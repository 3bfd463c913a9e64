"""Where the direction u comes from: the gradient, momentum, Adam, or any ``torch.optim.Optimizer``; one a file."""

from newton_summary.optim.directions.adam import Adam, NAdam
from newton_summary.optim.directions.base import Direction, Groups, State, forget, usual_rate
from newton_summary.optim.directions.gradient import Gradient
from newton_summary.optim.directions.momentum import Momentum
from newton_summary.optim.directions.named import resolve
from newton_summary.optim.directions.soap import SOAP, Sides, descends, matrix_shape
from newton_summary.optim.directions.step_of import StepOf

__all__ = [
    "SOAP",
    "Adam",
    "Direction",
    "Gradient",
    "Groups",
    "Momentum",
    "NAdam",
    "Sides",
    "State",
    "StepOf",
    "descends",
    "forget",
    "matrix_shape",
    "resolve",
    "usual_rate",
]
