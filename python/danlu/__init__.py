"""danlu: fused optimizer steps for PyTorch."""

from .custom import custom
from .optimizer import FusedOptimizer
from .optimizers.adam import Adam, AdamW
from .optimizers.adax import AdaX, AdaXW
from .optimizers.lion import Lion
from .optimizers.tiger import Tiger

__version__ = "0.1.0"
__all__ = ["AdaX", "AdaXW", "Adam", "AdamW", "FusedOptimizer", "Lion", "Tiger", "custom"]
