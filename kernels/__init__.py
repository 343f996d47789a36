"""Triton kernels, installed as ``maml_fast.kernels``; they import nothing above."""
