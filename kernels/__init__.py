"""Triton kernels, installed as ``maml_fast.kernels``; they import nothing above.

for both kinds    dots, elementary, pointwise, losses, reduce, launch
fused             fused: the kernel of one launch. Its parts: linear and weights, what rows pass
                  through and what they leave; network_loss; activations; products; table.
                  fused_program: the host's side
layer by layer    attend and attend_kernel: what a task adds to a linear layer's pass; matmul;
                  conv and conv_kernel: convolutions; norm, norm_kernel and norm_tiles:
                  normalisation, activation and max pool in one
"""
