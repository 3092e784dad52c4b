"""Instruments that judge Triton kernels without a GPU: builds, traffic, safety."""
