"""Rewrites of the emitted program that work around the TPU compiler, each measured with libtpu 0.0.42 (JAX 0.10).

| module | what the compiler does | what is emitted instead | measured |
|---|---|---|---|
| `vector_matmul` | sums a vector-matrix product on the vector unit | the vector with a row of zeros, for the matrix unit | decode of Llama 7B on v5e:4x4: 73.7 → 9.2 ms on the chip |
| `residual_barriers` | keeps all terms of a long bf16 sum to its end, to round once | a barrier at every eighth addition | Mixtral 8×7B prefill on v5e:4x4: peak 1.064 → 0.999 of the plan |
| `conversion_barriers` | converts weights layers ahead of their use | a conversion that waits for the matmul's other operand | GPT-2 and Gemma: peak up to 1.54 → 1.02 of the plan |
| `argument_layout` | pads what a loop carries more than an argument | the layout of an argument of the same shape | a cache of 25 heads of 64: 2.56 → 1 times its bytes |

Two are rewrites that the compiler's own passes could do, and no upstream issue tracks them. `tests/emitting/test_workarounds.py`
compiles each construct with and without its rewrite. A test fails when the compiler no longer needs the rewrite, which can then go.
"""
