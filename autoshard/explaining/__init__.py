"""Explanations of one plan: tables, formulas, bottlenecks, rooflines, rule coverage."""
