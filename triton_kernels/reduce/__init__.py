"""The passes of rules that reduce, as python/danlu/schedule.py divides them. Knows no optimizer."""

from .average import average, spread
from .collect import collect
from .measure import measure, settle
from .rows import rows_kernel
from .step import step

KERNELS = dict(
    collect=collect,
    average=average,
    spread=spread,
    measure=measure,
    settle=settle,
    step=step,
    rows=rows_kernel,
)
