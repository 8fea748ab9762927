"""Helpers without knowledge of plans: files, paths, tables, garbage collection."""
