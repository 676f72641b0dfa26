"""The passes of rules that reduce, as python/danlu/schedule.py divides them. Knows no optimizer."""

from .apply import apply
from .apply_by_row import apply_by_row
from .reduce_gradient import reduce_gradient
from .reduce_norms import finalize, reduce_norms
from .update_factors import update_factors, update_row_factors

KERNELS = dict(
    reduce_gradient=reduce_gradient,
    update_factors=update_factors,
    update_row_factors=update_row_factors,
    reduce_norms=reduce_norms,
    finalize=finalize,
    apply=apply,
    apply_by_row=apply_by_row,
)
