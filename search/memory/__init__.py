"""Memory constraints: what lives at each point of the program, by liveness."""
