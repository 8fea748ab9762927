"""Offline sweeps: a job file of points, each a search, and their Pareto frontier of latency and cost.

`load_job` reads the file, `points` lists its points, `Sweep` runs them on an engine and keeps results in a `Store`, and
`sweep_result` makes rows of them. `frontier`, `cheapest` and similar functions compute the answers.
"""
