"""Calibration: a topology file with constants measured on the attached devices."""
