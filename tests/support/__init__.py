"""Code that several tests share, imported as `from tests.support.x import y`.

| module | has |
|---|---|
| `paths` | folders of the repository, commands of its examples |
| `strategies`, `layout_strategies` | what Hypothesis draws: topologies, meshes, blocks; random layouts and the law about them |
| `programs` | random programs that need no JAX, and their optimum by enumeration |
| `models`, `plans` | small models, their plans, and comparison of results |
| `rule_laws`, `decompositions` | random calls of primitives; what is defined of a decomposition |
| `einsum_graphs` | random graphs of einsums, also on sixteen devices |
| `cli`, `exported`, `jobs` | commands, exported source, sweep jobs |
| `process`, `sweep_target`, `versions` | programs that tests start |
"""
