"""Fused optimizers for PyTorch, wrappers around any optimizer, parameter groups, schedules."""

from .amos_groups import amos_groups
from .amos_strategy import amos_strategy
from .custom import custom
from .optimizer import FusedOptimizer
from .optimizers.adafactor import Adafactor
from .optimizers.adam import Adam, AdamW
from .optimizers.adax import AdaX, AdaXW
from .optimizers.amos import Amos
from .optimizers.lamb import LAMB
from .optimizers.lion import Lion
from .optimizers.tiger import Tiger
from .param_groups import param_groups
from .piecewise_linear_lr import PiecewiseLinearLR
from .relative_step_lr import RelativeStepLR
from .wrappers.ema import EMA
from .wrappers.gradient_accumulation import GradientAccumulation
from .wrappers.layer_adaptation import LayerAdaptation
from .wrappers.lazy import Lazy
from .wrappers.lookahead import Lookahead

__version__ = "0.1.0"
__all__ = [
    "EMA",
    "LAMB",
    "AdaX",
    "AdaXW",
    "Adafactor",
    "Adam",
    "AdamW",
    "Amos",
    "FusedOptimizer",
    "GradientAccumulation",
    "LayerAdaptation",
    "Lazy",
    "Lion",
    "Lookahead",
    "PiecewiseLinearLR",
    "RelativeStepLR",
    "Tiger",
    "amos_groups",
    "amos_strategy",
    "custom",
    "param_groups",
]
