"""Maths: the rule, and the kernels that apply it. Nothing here imports torch.distributed."""
