"""danlu's Triton kernels: one engine, and a rule of some lines for each optimizer."""
