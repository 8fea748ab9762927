"""Comparisons of several plans: differences, k best, why-not, what-if, verification by the compiler."""
