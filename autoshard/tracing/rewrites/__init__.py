"""Equations that are planned in another form: decomposed, composed, or without repeated operands."""
