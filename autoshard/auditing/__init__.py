"""Compiled programs held against their plans: `audit.audit` compiles and compares, `replay.replay` times a schedule."""
