"""One colour for each method, the same in every figure; phases are its shades."""

from collections.abc import Sequence

METHODS = {"lance": "#0a66c2", "bp": "#cf4a0a", "asi": "#0e8a5f", "hosvd": "#8b3fa8"}
OTHERS = ("#5b6770", "#a0791b", "#b8336a", "#2c7a8c")
INK, SOFT, RULE = "#1b2430", "#52606d", "#d5dbe1"
MODES = ("#3b4a5a", "#b07d00", "#1f93ad", "#b8336a")  # of a layer's input: batch, channels, height, width
# Strength of a method's colour in each phase of a step: what the method changes stands out.
PHASES = {"data": 0.18, "prefix": 0.34, "forward": 0.62, "backward": 1.0, "update": 1.45}
VARIANTS = (1.0, 0.55, 1.4, 0.75, 1.2)  # strengths that tell runs of one method apart
PLAIN = "#77828d"  # of keys that stand for every method


def method_colour(method: str) -> str:
    """Its own, or one that depends on its name alone."""
    return METHODS.get(method) or OTHERS[sum(method.encode()) % len(OTHERS)]


def shade(colour: str, strength: float) -> str:
    """Towards white below 1, towards black above: `#0a66c2` at 0.5 is half as strong."""
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    if strength <= 1:
        mixed = [255 - strength * (255 - channel) for channel in channels]
    else:
        mixed = [channel * max(0.0, 2 - strength) for channel in channels]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def hatched_key() -> str:
    """Below the hatching in a legend: as strong as the phase that computes features."""
    return shade(PLAIN, PHASES["prefix"])


def run_colours(methods: Sequence[str]) -> tuple[str, ...]:
    """A colour for each run, by its method; a second run of a method gets another shade."""
    seen: dict[str, int] = {}
    colours = []
    for method in methods:
        number = seen.get(method, 0)
        seen[method] = number + 1
        colours.append(shade(method_colour(method), VARIANTS[number % len(VARIANTS)]))
    return tuple(colours)
