"""Long runs take no more memory and no more open files at their end than near their beginning."""

import json
import statistics

import pytest
from device_harness import spawn, train_words

from lance_edge.profiles import MOST_KEPT

# Resident memory and open files every 25 steps, from within.
WATCH = """
import atexit, json, os
from lance_device.guard import status_bytes
from lance_device.run_log import RunLog
write, seen = RunLog.step, []
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step % 25 == 0:
        seen.append((status_bytes("VmRSS"), len(os.listdir("/proc/self/fd")), status_bytes("VmData")))
RunLog.step = step
atexit.register(lambda: print(json.dumps(seen)))
"""
# What the allocator keeps or gives back from one moment to the next, and 4,096 latencies of eight phases.
NOISE_BYTES = (1 << 20) + 8 * 8 * MOST_KEPT


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_memory_and_open_files_do_not_grow(package, images, tmp_path, steps, cache):
    flags = ("--steps", steps, "--eval-every", 25, "--checkpoint-every", 50, "--cache", cache, "--quiet")
    process = spawn(*train_words(package, images, tmp_path / "run"), *flags, prelude=WATCH)
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    resident, files, data = zip(*json.loads(output), strict=True)
    assert len(resident) == steps // 25
    fifth = len(resident) // 5
    for sizes in (resident, data):
        growth = statistics.median(sizes[-fifth:]) - statistics.median(sizes[fifth : 2 * fifth])
        assert growth < NOISE_BYTES, (growth, sizes)
    assert max(files[fifth:]) <= max(files[:fifth])
