"""Rules of random numbers: every chip draws all of them from the same key, so that they are what one chip would draw."""

from __future__ import annotations

from autoshard.rules.rule import register, whole_rule

DRAWS = """
random_bits random_clone random_fold_in random_gamma random_seed random_split random_unwrap random_wrap rng_bit_generator
""".split()


@register(*DRAWS)
def draw(inputs, outputs, **_):
    """Keys and numbers whole on every chip; to keep a piece of them costs nothing on the wire."""
    return whole_rule(inputs, outputs, exact=True)


@register("platform_index")
def constant(inputs, outputs, **_):
    """A number that is the same on every chip."""
    return whole_rule(inputs, outputs, exact=True)
