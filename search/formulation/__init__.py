"""The search problem: strategies, layouts, reshards and their costs, for folded layers."""
