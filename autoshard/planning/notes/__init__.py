"""Notes of a plan: what it costs that a part of the program could not be planned better."""
