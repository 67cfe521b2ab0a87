"""Kernels: one plain torch definition of each operation, and fast ones that must agree with it.

`layout` holds the data types, `reference` the definitions, `dispatch` the choice. Start with
`make_kernels("auto", device="cpu", dtype=torch.float32, num_threads=2)`.
"""
