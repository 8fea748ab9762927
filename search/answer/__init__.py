"""Solutions: strategies and layouts of the whole program, their proof, and the independent checker."""
