"""Names of strategies and of whole plans, in the terms of the literature."""
