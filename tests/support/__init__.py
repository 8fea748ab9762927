"""Code that several tests share, imported as `from tests.support.x import y`.

| module | has |
|---|---|
| `paths` | folders of the repository, commands of its examples |
| `strategies`, `layout_strategies` | what Hypothesis draws: topologies, meshes, blocks; random layouts and the law about them |
| `programs`, `loops`, `enumeration` | random programs that need no JAX, and their optimum by enumeration |
| `models`, `plans` | small models, their plans, and comparison of results |
| `cli`, `exported`, `reports` | commands, exported source, pages |
| `rules/` | examples and random calls of primitives; what is defined of a decomposition |
| `emitting/` | random graphs of einsums, also on sixteen devices; padded arrays; carried plans |
| `auditing/` | compiled programs as text; audits of made-up programs |
| `scripts/` | programs that tests start, and the job of a sweep over one |
"""
