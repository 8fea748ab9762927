"""Rewrites of the emitted program that work around the TPU compiler, measured with libtpu 0.0.42 (JAX 0.10).

- `vector_matmul`: the compiler sums a vector-matrix product on the vector unit. The vector gets a row of zeros, which sends
  the product to the matrix unit: a decode step of Llama 7B on v5e:4x4 takes 9.2 instead of 73.7 ms on the chip.
- `query_rows`: on v5e, the compiler makes small tiles of two to four float32 score rows, and reads the keys slowly. The
  rows get rows of zeros, up to eight: attention of 512 heads of four rows takes 928 instead of 1,071 µs.
- `slab_gathers`: the compiler copies each dimension before an index apart. Slabs behind several dimensions are looked up by one
  index: 0.9 instead of 4.7 ms for 256 MiB of caches on v5e.
- `residual_barriers`: the compiler keeps all terms of a long 16-bit sum to its end. A barrier follows every eighth addition:
  Mixtral 8×7B prefill on v5e:4x4 peaks at 0.999 instead of 1.064 times the plan.
- `score_barriers`: the compiler fuses the projection of keys with long scores, and holds the scores twice. A barrier keeps
  the projection apart: attention of 12 heads of 2,048 × 2,048 scores on v5e takes 1.2 instead of 2.7 million cycles
  (libtpu 0.0.50).
- `scoped_memory`: the compiler lets an operation use 16 MiB of on-chip memory. A plan may give it more: attention of 4 heads
  of 4,096 × 4,096 scores on v5e takes 1.0 instead of 2.5 ms with 64 MiB (libtpu 0.0.50).
- `conversion_barriers`: the compiler converts weights layers ahead of their use while collectives run. A barrier delays a
  conversion until the matmul's other operand exists.
- `argument_layout`: the compiler may pad a loop carry more than an argument. A carried array gets the layout of an
  argument of its shape: a cache of 25 heads of 64 takes 1 instead of 2.56 times its bytes.
- `argument_copies`: the compiler copies an argument that a collective reads during a matmul, for all layers at once. The
  argument passes through a `select`, so it is an operation's result.

No upstream issue for any of them was found. `tests/emitting/test_workarounds.py` compiles a construct with and without
`vector_matmul`, `slab_gathers`, `residual_barriers` and `score_barriers`. `tests/emitting/test_query_rows.py` does so for
`query_rows`. A test fails once the compiler no longer needs the rewrite, which can then be removed. No small construct shows
the last three: with libtpu 0.0.42, eight layers of conversions on v5e:2x2, and a carried cache of 25 heads of 64, have the
same peak with and without. They have not been tried yet on the whole models for which they were written.
"""
