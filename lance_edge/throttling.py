"""What a Raspberry Pi's firmware says of its power and heat (`vcgencmd get_throttled`)."""

# raspberrypi.com/documentation/computers/os.html#get_throttled: bits of now, and the same since the last boot.
NOW = {0: "under-voltage", 1: "clock capped", 2: "throttled", 3: "soft temperature limit"}
SINCE_BOOT = 16
REMEDIES = {
    "under-voltage": "use the board's own power supply and a short cable",
    "clock capped": "cool the board",
    "throttled": "cool the board, or pause with --max-temp",
    "soft temperature limit": "cool the board, or pause with --max-temp",
}


def flags_of(text: str | None) -> int:
    """`0x50000` as a number; 0 where the board does not say."""
    try:
        return int(text, 16) if text else 0
    except ValueError:
        return 0


def troubles(flags: int) -> tuple[str, ...]:
    """What is wrong now."""
    return tuple(name for bit, name in NOW.items() if flags >> bit & 1)


def earlier_troubles(flags: int) -> tuple[str, ...]:
    """What has been wrong since the board started, and is not now."""
    names = (name for bit, name in NOW.items() if flags >> (bit + SINCE_BOOT) & 1)
    return tuple(name for name in names if name not in troubles(flags))
