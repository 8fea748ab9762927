"""Presolve of the CP-SAT model: elimination, the Lagrangian bound, an incumbent, and states fixed by reduced costs."""
