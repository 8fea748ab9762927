"""Solutions: strategies and layouts of the whole program, the proof of optimality, and the independent checker."""
