"""Pauses against heat and for other programs, with a thermometer that is a file."""

import errno
import json
import os
import re
import signal
import stat

import pytest
from device_harness import assert_same_arrays, refused, spawn, started, table, train, train_words

from lance_device import probe
from lance_device.niceness import be_nice
from lance_device.pace import PaceOptions, Pacer
from lance_device.probe import HealthProbe
from lance_edge.errors import Interrupted, PlatformError
from lance_edge.throttling import earlier_troubles, flags_of, troubles

STEPS = ("--steps", 6, "--eval-every", 0)


@pytest.fixture
def thermometer(tmp_path, monkeypatch):
    """`/sys/class/thermal/.../temp` as a file; gives a function that writes it.  No `vcgencmd` is found."""
    file = tmp_path / "temp"
    monkeypatch.setattr(probe, "TEMPERATURE", file)
    monkeypatch.setattr(probe, "CLOCK", tmp_path / "no-clock")
    monkeypatch.setattr(probe, "HEALTH_INTERVAL_S", 0.0)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))

    def write(celsius):
        file.write_text(f"{celsius * 1000:.0f}\n")

    write(40)
    return write


def probe_now():
    return HealthProbe(interval_s=0.0)


def test_a_pause_begins_above_the_limit_and_ends_well_below_it(thermometer):
    notes, readings = [], iter([76.0, 74.0, 71.0, 70.1, 69.9])
    pacer = Pacer(PaceOptions(max_temp_c=75), probe_now(), notes.append)
    thermometer(74.9)
    assert not pacer.owes_pause()
    thermometer(75)
    assert pacer.owes_pause()
    seen = []

    def cool():
        seen.append(next(readings))
        thermometer(seen[-1])

    pacer.pause(cool)
    assert seen == [76.0, 74.0, 71.0, 70.1, 69.9]  # 5 below: it does not go on at 74
    assert notes == ["75 °C, pausing until 70 °C (--max-temp 75)"]
    assert not pacer.owes_pause()


def test_a_thermometer_that_vanishes_ends_a_pause(thermometer, tmp_path):
    pacer = Pacer(PaceOptions(max_temp_c=75), probe_now(), lambda note: None)
    thermometer(80)
    assert pacer.owes_pause()
    pacer.pause(lambda: (tmp_path / "temp").unlink(missing_ok=True))
    assert not pacer.owes_pause()


def test_without_a_thermometer_a_limit_is_refused_before_training(package, images, thermometer, tmp_path):
    (tmp_path / "temp").unlink()
    line = refused(train(package, images, tmp_path / "run", *STEPS, "--max-temp", 75), 9)
    assert line == (
        "error: --max-temp needs a thermometer, and neither vcgencmd nor /sys/class/thermal shows one here;"
        " leave the option out"
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(PlatformError):
        Pacer(PaceOptions(max_temp_c=75), probe_now(), lambda note: None)


def test_the_duty_cycle_is_a_share_of_the_time(monkeypatch, thermometer):
    """With a clock of its own: half of the time after a duty cycle of 0.5, three quarters after 0.25."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    for duty, expected in ((0.5, 10.0), (0.25, 30.0), (1.0, 0.0)):
        pacer = Pacer(PaceOptions(duty_cycle=duty), probe_now(), lambda note: None)
        rested = 0.0
        for _ in range(100):
            clock[0] += 0.1  # of work
            before = clock[0]
            if pacer.owes_pause():
                pacer.pause(lambda: None)
            rested += clock[0] - before
        assert rested == pytest.approx(
            expected, abs=0.31
        )  # less than a slice is rested later, with its interest


def test_a_pause_ends_at_once_when_somebody_asks_to_stop(thermometer):
    pacer = Pacer(PaceOptions(max_temp_c=75), probe_now(), lambda note: None)
    thermometer(90)
    assert pacer.owes_pause()

    def stop():
        raise Interrupted("stopped on request")

    with pytest.raises(Interrupted):
        pacer.pause(stop)


def test_a_hot_run_pauses_says_so_and_gives_the_same_weights(package, images, thermometer, tmp_path):
    started(train(package, images, tmp_path / "cool", *STEPS))
    prelude = f"""
import time
from lance_device import pace, probe
from pathlib import Path
file = Path({str(tmp_path / "temp")!r})
probe.TEMPERATURE, probe.HEALTH_INTERVAL_S = file, 0.0
probe.shutil.which = lambda name: None
probe.HealthProbe.__init__.__defaults__ = (0.0,)
file.write_text("81000")
sleep, count = time.sleep, []
def cool(seconds):
    count.append(seconds)
    if len(count) == 3:
        file.write_text("60000")
pace.time.sleep = cool
"""
    out = tmp_path / "hot"
    process = spawn(*train_words(package, images, out), *STEPS, "--max-temp", 75, prelude=prelude)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "81 °C, pausing until 70 °C (--max-temp 75)" in errors
    assert re.search(r"^paused +\d", output, re.MULTILINE)
    assert re.search(r"^highest temperature +81 °C", output, re.MULTILINE)
    pauses = [row for row in table(out / "steps.csv") if row["phase"] == "pause"]
    assert [row["step"] for row in pauses] == ["1"]
    record = json.loads((out / "run.json").read_text())
    assert record["pace"] == {"max_temp_c": 75.0, "duty_cycle": 1.0, "nice": None}
    assert record["result"]["max_temperature_c"] == 81.0
    assert_same_arrays(out / "last.npz", tmp_path / "cool" / "last.npz")


def test_a_pause_can_be_stopped_and_taken_up_again(package, images, thermometer, tmp_path):
    started(train(package, images, tmp_path / "whole", *STEPS))
    prelude = f"""
from lance_device import probe
from pathlib import Path
probe.TEMPERATURE = Path({str(tmp_path / "temp")!r})
probe.TEMPERATURE.write_text("81000")
probe.shutil.which = lambda name: None
"""
    out = tmp_path / "run"
    process = spawn(*train_words(package, images, out), *STEPS, "--max-temp", 75, prelude=prelude)
    assert any("pausing until" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors
    assert "stopped after step 1 of 6" in errors
    started(train(package, images, out, "--resume"))
    assert_same_arrays(out / "last.npz", tmp_path / "whole" / "last.npz")


def test_a_thermometer_that_vanishes_is_said_once(thermometer, tmp_path):
    notes = []
    thermometer(50)
    pacer = Pacer(PaceOptions(max_temp_c=75), probe_now(), notes.append)
    assert not pacer.owes_pause()
    (tmp_path / "temp").unlink()
    assert not pacer.owes_pause()
    assert not pacer.owes_pause()
    assert notes == ["warning: no thermometer can be read any more; --max-temp does not protect this board"]
    thermometer(50)
    assert not pacer.owes_pause()
    assert len(notes) == 1


def _firmware(folder, monkeypatch, *flags):
    """A `vcgencmd` whose answers to get_throttled come one after the other, and then stay."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "vcgencmd"
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in measure_temp) echo "temp=55.0\'C";; measure_clock) echo "frequency(48)=600000000";;\n'
        f"get_throttled) cd {folder}; set -- {' '.join(flags)}; n=$(/usr/bin/cat n 2>/dev/null || echo 0)\n"
        'n=$((n+1)); [ $n -lt $# ] || n=$#; echo $n >n; eval "echo throttled=\\${$n}";; esac\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin")


def test_under_voltage_is_said_once_and_recorded(package, images, tmp_path, monkeypatch):
    _firmware(tmp_path, monkeypatch, "0x0", "0x50005", "0x50005", "0x50000")
    monkeypatch.setattr(HealthProbe.__init__, "__defaults__", (0.0,))
    out = tmp_path / "run"
    result = started(train(package, images, out, *STEPS))
    said = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: throttled (0x50005); cool the board, or pause with --max-temp",
        "warning: under-voltage (0x50005); use the board's own power supply and a short cable",
    ]
    assert re.search(r"^board +under-voltage, throttled$", result.stdout, re.MULTILINE)
    assert json.loads((out / "run.json").read_text())["result"]["throttled"] == ["under-voltage", "throttled"]
    rows = table(out / "steps.csv")
    assert {"0x50005", "0x50000"} <= {row["throttled"] for row in rows}
    assert {row["arm_mhz"] for row in rows} == {"600"}


def test_every_thread_is_nice(package, images, tmp_path):
    """On Linux each has its own niceness: also those that numpy and onnxruntime start."""
    prelude = """
import os
from lance_device.run_log import RunLog
finish = RunLog.finish
def say(self, *words):
    print(*(os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")))
    return finish(self, *words)
RunLog.finish = say
"""
    words = train_words(package, images, tmp_path / "run")
    nice = max(0, os.getpriority(os.PRIO_PROCESS, 0)) + 1  # not 19: on a busy machine that would take minutes
    process = spawn(
        *words, "--threads", 2, *STEPS, "--nice", nice, "--quiet", prelude=_LATE.format(body=prelude)
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    levels = output.split()
    assert len(levels) > 2
    assert set(levels) == {str(nice)}


# The prelude of a process must not load numpy, whose threads would be there before the command begins.
_LATE = """
import sys
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "lance_device.train":
            sys.meta_path.remove(self)
            exec({body!r}, {{}})
        return None
sys.meta_path.insert(0, Late())
"""


def test_less_niceness_than_there_is(monkeypatch):
    """Only root may; the test may run as root."""

    def refuse(*words):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(os, "getpriority", lambda *words: 15)
    be_nice(None)
    with pytest.raises(
        PlatformError, match=r"^--nice 10: not permitted \(Permission denied\), as this process has 15; give 15"
    ):
        be_nice(10)


@pytest.mark.parametrize(
    "flags", [("--duty-cycle", 0), ("--duty-cycle", 1.5), ("--nice", 20), ("--max-temp", 5)]
)
def test_numbers_out_of_range(package, images, tmp_path, flags):
    assert train(package, images, tmp_path / "run", *flags).exit_code == 2


def test_what_the_flags_mean():
    assert troubles(flags_of("0x5")) == ("under-voltage", "throttled")
    assert earlier_troubles(flags_of("0x50001")) == ("throttled",)
    assert troubles(flags_of("0x8")) == ("soft temperature limit",)
    assert troubles(flags_of(None)) == troubles(flags_of("junk")) == troubles(0) == ()
