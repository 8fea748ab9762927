"""Ways to carry a plan into a compiled program, measured by compiling, with the constraints that the partitioner needs."""
