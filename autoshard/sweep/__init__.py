"""Offline sweeps: a job file of points, each a search, and the frontier of what they cost.

`load_job` reads the file, `points` lists its points, `Sweep` runs them on an engine and keeps results in a `Store`,
`sweep_result` makes rows of them; `frontier`, `cheapest` and their like read the answers off.
"""
