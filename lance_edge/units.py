"""Numbers as text for people."""


def percent(fraction: float | None) -> str:
    """`81.2 %`, or `-` where there is none.

    Examples:
        >>> percent(0.8125), percent(None)
        ('81.2 %', '-')
    """
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """`42 s`, `12 min`, `3.5 h`.

    Examples:
        >>> duration(42), duration(720), duration(12_600)
        ('42 s', '12 min', '3.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    """`1 layer`, `4 layers`.

    Examples:
        >>> count(1, "layer"), count(3, "batch")
        ('1 layer', '3 batches')
    """
    return f"{number} {plural(number, noun)}"


def plural(number: int, noun: str) -> str:
    """`layer` of one, `layers` and `batches` of others."""
    return noun if number == 1 else f"{noun}es" if noun.endswith("ch") else f"{noun}s"


def size(nbytes: float | None) -> str:
    """`512 B`, `34.5 KiB`, `1.25 MiB`, `2.50 GiB`, or `-` where it is not known.

    Examples:
        >>> size(512), size(35_328), size(5 << 18), size(None)
        ('512 B', '34.5 KiB', '1.25 MiB', '-')
    """
    if nbytes is None:
        return "-"
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    if nbytes < 1 << 20:
        return f"{nbytes / 1024:.1f} KiB"
    return f"{nbytes / (1 << 20):.2f} MiB" if nbytes < 1 << 30 else f"{nbytes / (1 << 30):.2f} GiB"
