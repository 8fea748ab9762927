"""Rules of random numbers: every chip draws all of them from the same key, so they equal those of one chip."""

from __future__ import annotations

from autoshard.rules.rule import register, whole_rule

DRAWS = """
random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap random_wrap rng_bit_generator
""".split()


@register(*DRAWS)
def draw(inputs, outputs, **_):
    """Keys and numbers are replicated; a local slice shards them without communication."""
    return whole_rule(inputs, outputs, exact=True)


@register("platform_index")
def constant(inputs, outputs, **_):
    """A number that is the same on every chip."""
    return whole_rule(inputs, outputs, exact=True)
