"""Triton kernels, one file per operator; they need sm_80, or ``TRITON_INTERPRET=1`` on CPU tensors."""
