"""Going easy on a board: pauses between steps against heat, and to leave time for other programs."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from lance_device.probe import Health, HealthProbe
from lance_edge.errors import PlatformError
from lance_edge.throttling import REMEDIES, flags_of, troubles

HYSTERESIS_C = 5.0  # a pause ends so far below --max-temp, or it would come again at once
SLICE_S = 0.2  # of a pause: how long a request to stop may wait


@dataclass(frozen=True)
class PaceOptions:
    """How much of itself a board gives.

    Attributes:
        max_temp_c: pause between steps above it.
        duty_cycle: share of the time that is worked, above 0 and at most 1.
        nice: of the process, 0 to 19, for the record: it is set before libraries load (`niceness.py`).
    """

    max_temp_c: float | None = None
    duty_cycle: float = 1.0
    nice: int | None = None


class Pacer:
    """Pauses between the steps of a run, and says what troubles the board."""

    def __init__(self, options: PaceOptions, health: HealthProbe, note: Callable[[str], None]) -> None:
        """Begin.

        Raises:
            PlatformError: if there is a highest temperature and no thermometer.
        """
        self._options, self._health, self._note = options, health, note
        self._seen: set[str] = set()
        self._is_blind = False  # the thermometer is gone, which --max-temp relies on
        self._debt_s = 0.0  # of rest
        self._since = time.monotonic()  # of the work that is not yet accounted for
        if options.max_temp_c is not None and health.read().temperature_c is None:
            raise PlatformError(
                "--max-temp needs a thermometer, and neither vcgencmd nor /sys/class/thermal shows one here;"
                " leave the option out"
            )

    def owes_pause(self) -> bool:
        """Whether a pause is due after the work since the last call; says what is new about power and heat."""
        health, now = self._health.read(), time.monotonic()
        self._report(health)
        if health.temperature_c is None and self._options.max_temp_c is not None and not self._is_blind:
            self._note("warning: no thermometer can be read any more; --max-temp does not protect this board")
        self._is_blind = health.temperature_c is None
        self._debt_s += (now - self._since) * (1 / self._options.duty_cycle - 1)
        self._since = now
        return self._debt_s >= SLICE_S or self._is_hot(health)

    def pause(self, before_each: Callable[[], None]) -> None:
        """Rest as long as it is owed, and until the board has cooled down.

        Args:
            before_each: called many times a second; may raise to leave.
        """
        until, self._debt_s = time.monotonic() + self._debt_s, 0.0
        while (left_s := until - time.monotonic()) > 0:
            before_each()
            time.sleep(min(left_s, SLICE_S))
        if self._is_hot(self._health.read()):
            self._cool_down(before_each)
        self._since = time.monotonic()

    def _cool_down(self, before_each: Callable[[], None]) -> None:
        highest, celsius = self._options.max_temp_c or 0.0, self._health.read().temperature_c
        self._note(f"{celsius:.0f} °C, pausing until {highest - HYSTERESIS_C:.0f} °C (--max-temp {highest:g})")
        while celsius is not None and celsius > highest - HYSTERESIS_C:
            before_each()
            time.sleep(SLICE_S)
            celsius = self._health.read().temperature_c

    def _is_hot(self, health: Health) -> bool:
        highest, celsius = self._options.max_temp_c, health.temperature_c
        return highest is not None and celsius is not None and celsius >= highest

    def _report(self, health: Health) -> None:
        now = set(troubles(flags_of(health.throttled)))
        for name in sorted(now - self._seen):
            self._note(f"warning: {name} ({health.throttled}); {REMEDIES[name]}")
        self._seen = now
