import mmap
import os
import resource
import stat
import sys
from pathlib import Path

import pytest
from device_harness import spawn, table, train_words
from tiny_package import write_images, write_tiny_package

from lance_device import probe
from lance_device.measure import PhaseMeter, RowLog
from lance_device.options import available_cores
from lance_device.probe import Health, HealthProbe, MemoryProbe
from lance_edge.errors import StorageError
from lance_edge.profiles import HistoryRow
from lance_edge.units import duration, percent, size

MIB = 1 << 20
ROW = HistoryRow(1, 3, 0.05, 1.5, 0.25, 0.5, 1.25, None, None, True, 250.0)
needs_reset = pytest.mark.skipif(not MemoryProbe().resets_peak, reason="this kernel does not reset VmHWM")


@needs_reset
def test_the_peak_of_a_phase_is_its_own():
    meter = PhaseMeter(MemoryProbe())
    # Mapped memory: an allocator may keep what an array gives back.
    with meter.phase("forward"), mmap.mmap(-1, 64 * MIB) as large:
        large.write(b"x" * (64 * MIB))
    with meter.phase("backward"):
        pass
    costs = meter.take_step()
    assert costs["forward"].peak_rss_kib - costs["backward"].peak_rss_kib > 32 * 1024
    assert costs["step"].peak_rss_kib == costs["forward"].peak_rss_kib


def test_without_permission_the_peak_is_that_of_the_process(monkeypatch):
    monkeypatch.setattr(probe, "CLEAR_REFS", Path("/nonexistent"))
    memory = MemoryProbe()
    assert memory.peak_source == "ru_maxrss, only rises"
    assert memory.read().peak_rss_kib == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_failed_phase_does_not_count():
    meter = PhaseMeter(MemoryProbe())
    with pytest.raises(ValueError, match="x"), meter.phase("forward"):
        raise ValueError("x")
    assert meter.take_step()["step"].latency_ns == 0


def _fake_vcgencmd(folder: Path, body: str) -> None:
    script = folder / "vcgencmd"
    script.write_text("#!/bin/sh\n" + body)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


def test_health_from_vcgencmd(tmp_path, monkeypatch):
    _fake_vcgencmd(
        tmp_path,
        'case "$1" in\nmeasure_temp) echo "temp=48.3\'C";;\nmeasure_clock) echo "frequency(48)=1400000000";;\n'
        'get_throttled) echo "throttled=0x50000";;\nesac\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert HealthProbe().read() == Health(temperature_c=48.3, arm_mhz=1400.0, throttled="0x50000")


def test_health_from_sysfs_where_vcgencmd_fails(tmp_path, monkeypatch):
    _fake_vcgencmd(tmp_path, "echo 'VCHI initialization failed'; exit 255\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, text in (("TEMPERATURE", "51200\n"), ("CLOCK", "600000\n")):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(probe, name, tmp_path / name)
    assert HealthProbe().read() == Health(temperature_c=pytest.approx(51.2), arm_mhz=600.0, throttled=None)


def test_a_question_that_took_too_long_is_asked_again_one_that_fails_is_not(tmp_path, monkeypatch):
    """The clock does not answer in time once; nobody may ask for throttling; the temperature is there."""
    _fake_vcgencmd(
        tmp_path,
        f"echo $1 >> {tmp_path}/asked\n"
        "case $1 in\n"
        "  measure_temp) echo temp=48.3\\'C ;;\n"
        f"  measure_clock) test -e {tmp_path}/slow || {{ touch {tmp_path}/slow; exec sleep 5; }}\n"
        "    echo 'frequency(48)=1400000000' ;;\n"
        "  *) exit 1 ;;\n"
        "esac\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(probe, "VCGENCMD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(probe, "CLOCK", tmp_path / "absent")
    health = HealthProbe(interval_s=0)
    assert health.read() == Health(48.3, None, None)
    assert health.read() == Health(48.3, 1400.0, None)
    asked = (tmp_path / "asked").read_text().split()
    assert [asked.count(name) for name in ("measure_temp", "measure_clock", "get_throttled")] == [2, 2, 1]


def test_health_is_empty_where_there_is_none_and_is_not_read_too_often(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(probe, "TEMPERATURE", tmp_path / "temp")
    monkeypatch.setattr(probe, "CLOCK", tmp_path / "clock")
    health = HealthProbe(interval_s=1000)
    assert health.read() == Health(None, None, None)
    (tmp_path / "temp").write_text("50000")
    assert health.read().temperature_c is None


def test_rows_are_written_at_once_and_appended(tmp_path):
    path = tmp_path / "history.csv"
    log = RowLog(path, HistoryRow)
    log.write(ROW)
    assert len(table(path)) == 1
    log.close()
    log = RowLog(path, HistoryRow)
    log.write(ROW, ROW)
    log.close()
    assert [row["test_accuracy"] for row in table(path)] == ["", "", ""]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "steps.csv").symlink_to("/dev/full")
    with pytest.raises(
        StorageError, match=r"steps.csv: cannot write \(No space left on device\); free some space"
    ):
        RowLog(tmp_path / "steps.csv", HistoryRow)


def test_units():
    assert [percent(None), percent(0.5)] == ["-", "50.0 %"]
    assert [duration(5), duration(600), duration(36000)] == ["5 s", "10 min", "10.0 h"]
    assert [size(None), size(512), size(2048), size(3 * MIB)] == ["-", "512 B", "2.0 KiB", "3.00 MiB"]
    assert size(2560 * MIB) == "2.50 GiB"


def test_threads_by_default_are_the_cores_of_this_process():
    assert 1 <= available_cores() <= os.cpu_count()


@needs_reset
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_follow_the_batch(tmp_path):
    """Batches of 8 and of 128 images of 240 x 240 pixels: the larger is 84 MiB as float32."""
    peaks = {}
    for batch_size in (8, 128):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        package = write_tiny_package(folder / "pkg.tar", batch_size, pool=20)
        images = write_images(folder / "images", per_class=80, side=24)
        words = (*train_words(package, images, folder / "run"), "--steps", 3, "--eval-every", 0)
        process = spawn(*words)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        rows = table(folder / "run/steps.csv")
        peaks[batch_size] = max(int(row["peak_rss_kib"]) for row in rows)
    # malloc keeps the buffer of the micro-batch before (5.3 MiB) for the next; a batch of 8 has no next
    assert abs(peaks[128] - peaks[8]) < 12 * 1024, peaks
