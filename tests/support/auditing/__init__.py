"""Compiled programs as text, and audits of made-up programs."""
