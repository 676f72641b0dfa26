"""What compilers make of the kernels: how it is read, and executed without a GPU."""
