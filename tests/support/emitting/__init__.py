"""Random graphs of einsums, padded arrays, and carried plans."""
