"""The arithmetic on a GPU: torch tensors and Triton kernels (`kernels`), one `Ops` over them (`ops`).

With `TRITON_INTERPRET=1` set before Python starts, the same kernels run on CPU tensors, slowly.
"""
