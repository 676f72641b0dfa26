"""Triton kernels of danlu; this version has none yet."""
