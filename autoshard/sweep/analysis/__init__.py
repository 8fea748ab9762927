"""Analysis of a sweep: rows, frontier, recommendations, answers."""
