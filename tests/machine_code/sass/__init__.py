"""An executor of machine code for sm_90."""
