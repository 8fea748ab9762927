"""The second pass: HBM traffic, dimension names, pins and the fingerprint of a traced function."""

from autoshard.annotating.annotated_function import AnnotatedFunction as AnnotatedFunction
from autoshard.annotating.annotated_function import annotate as annotate
from autoshard.annotating.annotated_function import annotate_pins as annotate_pins
