"""The second pass: a traced function gets its HBM traffic, names of dimensions, pins and fingerprint."""

from autoshard.annotating.annotated_function import AnnotatedFunction as AnnotatedFunction
from autoshard.annotating.annotated_function import annotate as annotate
from autoshard.annotating.annotated_function import annotate_pins as annotate_pins
