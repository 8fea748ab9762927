"""What things cost: operations, chips, collectives, regimes. Knows neither JAX nor OR-Tools."""
