"""What `--class-weights` understands; numpy is not loaded before the command line is known to be right."""

import math

NONE, BALANCED = "none", "balanced"


def parse_weights(text: str) -> tuple[float, ...]:
    """`1,2.5,1` as positive numbers; empty for what is not understood."""
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        return ()
    return weights if all(0 < weight < math.inf for weight in weights) else ()


def is_understood(text: str) -> bool:
    """Whether it is `none`, `balanced` or weights."""
    return text in (NONE, BALANCED) or bool(parse_weights(text))
