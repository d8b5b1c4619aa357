"""`--memory-limit` and real limits: a run fits, or stops before it trains with the number that it needs."""

import json
import mmap
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from device_harness import spawn, started, train, train_words
from PIL import Image
from tiny_package import write_images, write_tiny_package

from lance_device import fork, guard
from lance_device.fork import FAILED, in_a_fork
from lance_device.guard import bounded_memory, free_bytes, group_limit_bytes, status_bytes
from lance_device.memory_plan import Limit, find_limits
from lance_edge.errors import ArtifactError, PlatformError

MIB = 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Batches of 32 images of 480 x 480: a micro-batch of eight takes 22 MiB as float32."""
    folder = tmp_path_factory.mktemp("large")
    return write_tiny_package(folder / "pkg.tar", 32, pool=40), write_images(folder / "im", 40, side=24)


# The kernel's high-water mark over the life of a process: it is reset for every phase, so the highest of all.
PEAK = """
import atexit
from lance_device import probe
from lance_device.guard import status_bytes
reset, peaks = probe.MemoryProbe._try_reset, []
def remember(self):
    peaks.append(status_bytes("VmHWM"))
    return reset(self)
probe.MemoryProbe._try_reset = remember
atexit.register(lambda: print("peak", max([*peaks, status_bytes("VmHWM")])))
"""


def _run(large, out, *flags, prelude=""):
    """A run of its own process: exit code, what it said, and its peak resident memory."""
    process = spawn(*train_words(*large, out), "--steps", 3, *flags, prelude=prelude or PEAK)
    output, errors = process.communicate(timeout=300)
    peak = re.search(r"^peak (\d+)$", output, re.MULTILINE)
    return process.returncode, errors, int(peak[1]) if peak else None


def _size(text):
    number, unit = re.search(r"needs ([0-9.]+) (MiB|KiB)", text).groups()
    return float(number) * {"MiB": MIB, "KiB": 1024}[unit]


@pytest.fixture(scope="module")
def needed(large, tmp_path_factory):
    """What the refusal of an impossible limit says that micro-batches of one need."""
    out = tmp_path_factory.mktemp("needed") / "run"
    code, errors, _ = _run(large, out, "--memory-limit", "20MiB")
    assert code == 9, errors
    line = errors.splitlines()[-1]
    assert re.match(
        r"error: this run needs [0-9.]+ MiB with --micro-batch 1 --threads 1, but --memory-limit is 20.00 MiB;"
        r" allow it more, or calibrate a smaller package \(fewer --layers, a smaller"
        r" --resolution or --model\)$",
        line,
    )
    assert not out.exists()
    return _size(line)


@pytest.mark.parametrize("more", [1.02, 1.12, 2.0])
def test_a_run_stays_below_its_limit_and_says_what_it_chose(large, needed, tmp_path, more):
    limit = int(needed * more)
    code, errors, peak = _run(large, tmp_path / "run", "--memory-limit", limit)
    assert code == 0, errors
    assert peak <= limit
    record = json.loads((tmp_path / "run/run.json").read_text())
    memory = record["memory"]
    assert memory["limit"] == "--memory-limit"
    assert memory["limit_bytes"] == limit
    assert memory["needed_bytes"] <= limit
    assert memory["micro_batch"] == record["options"]["micro_batch"]
    assert f"with --micro-batch {memory['micro_batch']} --threads 1" in errors
    assert peak > 0.85 * memory["needed_bytes"], "a plan that is far too careful refuses what would fit"
    if more < 1.1:
        assert 1 <= memory["micro_batch"] < 8
    if more == 2.0:
        assert memory["micro_batch"] == 8


def test_a_micro_batch_that_was_asked_for_is_kept_or_refused(large, needed, tmp_path):
    flags = ("--memory-limit", int(needed * 1.02), "--micro-batch", 8)
    code, errors, _ = _run(large, tmp_path / "run", *flags)
    assert code == 9
    assert "with --micro-batch 8 --threads 1, but --memory-limit is" in errors
    assert "; with --micro-batch 1 it would need" in errors
    assert _size(errors) > needed
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_taken_up_again_must_fit_too(large, needed, tmp_path):
    started(train(*large, tmp_path / "run", "--steps", 3))
    before = (tmp_path / "run/last.npz").read_bytes()
    code, errors, _ = _run(large, tmp_path / "run", "--resume", "--memory-limit", int(needed * 1.02))
    assert code == 9
    assert "with --micro-batch 8" in errors
    assert (tmp_path / "run/last.npz").read_bytes() == before


def test_too_little_address_space_is_said_before_any_library_fails_to_load(large, tmp_path):
    """OpenBLAS, which numpy loads, would end the process by itself; here numpy cannot be imported at all."""
    prelude = f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({100 * MIB}, {100 * MIB}))"
    code, errors, _ = _run(large, tmp_path / "run", prelude=f"{prelude}; sys.modules['numpy'] = None")
    assert code == 9, errors
    assert errors.startswith("error: ulimit -v is 100 MiB, but Python with numpy and onnxruntime needs")


# Whatever this test was started with: BLAS takes a thread a core, with 40 MiB each.
FREE_THREADS = """
import os, resource
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.pop(name, None)
"""


@pytest.mark.parametrize("mib", [100, 180, 200, 230, 400])
def test_under_a_real_limit_on_address_space(large, tmp_path, mib):
    """`ulimit -v`: every allocation beyond it fails at once."""
    prelude = f"{FREE_THREADS}resource.setrlimit(resource.RLIMIT_AS, ({mib * MIB}, {mib * MIB}))"
    code, errors, _ = _run(large, tmp_path / "run", prelude=prelude)
    if code == 0:
        assert mib > 180
        assert re.search(r"memory: ulimit -v [0-9.]+ MiB, needs [0-9.]+ MiB with --micro-batch \d", errors)
        assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
        return
    assert mib < 300, errors
    assert code == 9, errors
    line = errors.splitlines()[-1]
    assert "Traceback" not in errors
    number = re.search(
        r"but Python with numpy and onnxruntime needs (\d+) MiB of address space before any network; allow"
        r"|needs (?:at least |more than )?([0-9.]+) MiB with --micro-batch 1 --threads 1, but ulimit -v is",
        line,
    )
    assert number is not None, line
    assert float(number[1] or number[2]) >= mib
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_that_could_not_even_be_measured_is_refused_with_a_number(large, tmp_path):
    prelude = f"{FREE_THREADS}resource.setrlimit(resource.RLIMIT_AS, ({200 * MIB}, {200 * MIB}))"
    code, errors, _ = _run(large, tmp_path / "run", "--micro-batch", 32, prelude=prelude)
    assert code == 9, errors
    number = re.search(
        r"needs (?:at least |more than )?([0-9.]+) MiB with --micro-batch 32 --threads 1, but ulimit -v is 200"
        r"\.00 MiB; with --micro-batch 1 it would need [0-9.]+ MiB; allow it more",
        errors.splitlines()[-1],
    )
    assert number is not None, errors
    assert 200 <= float(number[1]) < 400


def test_a_machine_without_memory_is_not_taken_for_a_limit(large, tmp_path):
    """The limit of the user is wide enough: it is the measurement that got no memory."""
    prelude = "from lance_device import fork, memory_plan; memory_plan.in_a_fork = lambda measure: fork.lack()"
    code, errors, _ = _run(large, tmp_path / "run", "--memory-limit", "4GiB", prelude=prelude)
    assert code == 9, errors
    assert re.match(
        r"error: this run needs at least [0-9.]+ MiB with --micro-batch 1 --threads 1, but only [0-9.]+ [MG]iB"
        r" of memory are free; close other programs, or calibrate a smaller package",
        errors.splitlines()[-1],
    )


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group():
    """A control group of version 1 with its own limit, where this system permits to make one."""
    folder = GROUPS / f"lance-edge-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error.strerror})")
    yield folder
    folder.rmdir()


@pytest.mark.parametrize("mib", [70, 120, 400])
def test_under_a_real_control_group(large, tmp_path, group, mib):
    """Whoever takes more than a control group permits is killed; the run never is."""
    (group / "memory.limit_in_bytes").write_text(str(mib * MIB))
    prelude = f"open('{group / 'cgroup.procs'}', 'w').write('0')"
    code, errors, _ = _run(large, tmp_path / "run", prelude=prelude)
    assert code in (0, 9), (code, errors)
    if code == 0:
        assert "memory: the control group's limit" in errors
        assert mib > 100
    else:
        assert re.search(
            r"needs (at least |more than )?[0-9.]+ MiB with .*, but the control group's limit is [0-9.]+ MiB;",
            errors.splitlines()[-1],
        )
        assert mib < 200


@pytest.fixture
def with_a_photo(large, tmp_path):
    """Tiny images, and one photo of 12 megapixels that is none of the first: 46 MiB in pillow's memory."""
    package, images = large
    root = tmp_path / "photos"
    shutil.copytree(images, root)
    Image.new("RGB", (4000, 3000), "red").save(root / "red/zzz.jpg")
    return package, root


def test_the_largest_image_is_counted(with_a_photo, needed, tmp_path):
    limit = int(needed * 1.12) + 50 * MIB
    code, errors, peak = _run(with_a_photo, tmp_path / "run", "--memory-limit", limit)
    assert code == 0, errors
    assert peak <= limit
    memory = json.loads((tmp_path / "run/run.json").read_text())["memory"]
    assert needed + 45 * MIB < memory["needed_bytes"] <= limit


def test_a_photo_that_does_not_fit_is_named_before_it_is_decoded(with_a_photo, needed, tmp_path):
    code, errors, peak = _run(with_a_photo, tmp_path / "run", "--memory-limit", int(needed * 1.12))
    assert code == 9, errors
    assert re.search(
        r"zzz\.jpg(: decoding it takes 45\.78 MiB beside|, takes 45\.77 MiB of it\); allow)", errors
    )
    assert peak <= needed * 1.12
    assert not (tmp_path / "run").exists()


def test_the_cache_that_was_decided_on_is_named(package, images, tmp_path):
    """`auto` became on: every image is seen more than once."""
    flags = ("--epochs", 1, "--memory-limit", "4GiB")
    process = spawn(*train_words(package, images, tmp_path / "run"), *flags)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "feature cache on: images are seen" in errors
    assert "--micro-batch 8 --threads 1 --cache on\n" in errors
    assert json.loads((tmp_path / "run/run.json").read_text())["memory"]["cache"] == "on"


def test_the_cache_is_given_up_before_a_run_is_refused(large, needed, tmp_path):
    prelude = "from lance_device import memory_plan; memory_plan._Trial._cache_bytes = lambda *words: 1 << 30"
    flags = ("--epochs", 2, "--memory-limit", int(needed * 2))
    words = [word for word in train_words(*large, tmp_path / "run") if word != "--steps"]
    process = spawn(*words, *flags, prelude=prelude)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "--micro-batch 8 --threads 1 --cache off" in errors
    assert "feature cache off: with a cache the run would not fit into its memory" in errors
    assert json.loads((tmp_path / "run/run.json").read_text())["memory"]["cache"] == "off"
    process = spawn(*train_words(*large, tmp_path / "on"), *flags, "--cache", "on", prelude=prelude)
    assert "this run needs 1." in process.communicate(timeout=300)[1]
    assert process.returncode == 9


DECODE = """
import os, sys
from pathlib import Path
from lance_edge.images import Image, decoding_bytes, load_image
Image.init()
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
for file in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        claimed, before = decoding_bytes(file), kib("VmRSS")
        load_image(file)
        print(file.name, claimed, 1024 * (kib("VmHWM") - before), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_what_an_image_takes_is_known_from_its_header(tmp_path):
    """In forks of a process that has decoded nothing yet: freed memory would be used again."""
    small = np.random.default_rng(0).integers(0, 255, (150, 200, 3), dtype=np.uint8)
    image, exif = Image.fromarray(small).resize((2000, 1500)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rgb.jpg")
    image.save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "rgb.webp", quality=20)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.quantize(16).save(tmp_path / "palette.gif")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", DECODE, *files], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 7
    for (
        name,
        claimed,
        taken,
    ) in rows:  # two MiB of code, of the decoder or numpy; a twentieth for rows and tables
        assert 0.75 * int(claimed) < int(taken) < 1.05 * int(claimed) + 2 * MIB, name


def test_threads_are_given_up_before_a_run_is_refused(large, tmp_path):
    """A thread is address space: with many of them the run does not fit, with one it does."""
    limit = 270 * MIB  # one thread needs some 200 MiB, and each more the 8 MiB of its stack
    prelude = f"""
import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
import lance_device.options
lance_device.options.available_cores = lambda: 16
"""
    words = [word for word in train_words(*large, tmp_path / "run") if word not in ("--threads", 1)]
    process = spawn(*words, "--steps", 2, prelude=prelude)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "--threads 1" in errors
    assert json.loads((tmp_path / "run/run.json").read_text())["options"]["threads"] == 1


# --- what limits there are ---


def _groups(monkeypatch, tmp_path, own, files):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    monkeypatch.setattr(guard, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(guard, "GROUPS", tmp_path / "fs")


def test_limits_of_control_groups_of_version_2(monkeypatch, tmp_path):
    files = {
        "memory.max": "max\n",
        "system.slice/memory.max": f"{300 * MIB}\n",
        "system.slice/memory.current": f"{100 * MIB}\n",
        "system.slice/memory.stat": f"anon 5\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\n",
        "system.slice/lance.service/memory.max": f"{200 * MIB}\n",
        "system.slice/lance.service/memory.current": f"{20 * MIB}\n",
        "system.slice/lance.service/memory.stat": "anon 5\n",
    }
    _groups(monkeypatch, tmp_path, "0::/system.slice/lance.service\n", files)
    assert group_limit_bytes() == 200 * MIB
    assert free_bytes() == 180 * MIB
    assert find_limits(None)[0] == Limit(200 * MIB, "the control group's limit", "VmHWM")


def test_what_others_in_a_control_group_use_is_not_left(monkeypatch, tmp_path):
    before = status_bytes("RssAnon")
    used = before + 300 * MIB
    files = {
        "user.slice/memory.max": f"{used + 200 * MIB}\n",
        "user.slice/memory.current": f"{used}\n",
        "user.slice/memory.stat": "inactive_file 0\n",
    }
    monkeypatch.setattr(guard.psutil, "virtual_memory", lambda: SimpleNamespace(total=used + 1000 * MIB))
    _groups(monkeypatch, tmp_path, "0::/user.slice\n", files)
    assert abs(group_limit_bytes() - (200 * MIB + before)) < 8 * MIB  # it may grow between the readings


def test_limits_of_control_groups_of_version_1(monkeypatch, tmp_path):
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "5\n",
        "memory/memory.stat": "total_inactive_file 0\n",
        "memory/docker/memory.limit_in_bytes": f"{90 * MIB}\n",
        "memory/docker/memory.usage_in_bytes": f"{80 * MIB}\n",
        "memory/docker/memory.stat": f"total_active_file {10 * MIB}\ntotal_inactive_file {5 * MIB}\n",
    }
    _groups(monkeypatch, tmp_path, "9:name=systemd:/x\n4:cpu,memory:/docker\n0::/\n", files)
    assert group_limit_bytes() == 90 * MIB
    assert free_bytes() == 25 * MIB


def test_without_limits_nothing_is_measured(monkeypatch, tmp_path):
    _groups(monkeypatch, tmp_path, "0::/\n", {"memory.max": "max\n"})
    assert group_limit_bytes() is None
    assert find_limits(None) == ()
    monkeypatch.setattr(guard, "OWN_GROUPS", tmp_path / "none")
    assert find_limits(5) == (Limit(5, "--memory-limit", "VmHWM", is_enforced=False),)


# In a process of its own: the tests' process may have so much free in its heap that it needs no more memory.
BOUNDED = """
import resource
from lance_device import guard
MIB = 1 << 20
before = resource.getrlimit(resource.RLIMIT_DATA)
guard.free_bytes = lambda: 64 * MIB
with guard.bounded_memory():
    bytearray(16 * MIB)
    try:
        bytearray(256 * MIB)
    except MemoryError:
        print("bounded")
assert resource.getrlimit(resource.RLIMIT_DATA) == before
bytearray(256 * MIB)
print("as before")
"""


def test_memory_is_bounded_within_a_command_and_not_after():
    done = subprocess.run([sys.executable, "-c", BOUNDED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["bounded", "as before"]


def test_a_bound_of_the_user_is_kept():
    hard = resource.getrlimit(resource.RLIMIT_DATA)
    own = status_bytes("VmData", "VmStk") + 512 * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (own, hard[1]))
    try:
        with bounded_memory():
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= own
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, hard)


def test_a_fork_answers_fails_or_dies():
    assert in_a_fork(lambda: {"VmHWM": 5}) == {"VmHWM": 5}
    killed = in_a_fork(lambda: os.kill(os.getpid(), 9))
    assert killed.keys() == {FAILED, "VmHWM", "VmPeak"}
    assert killed["VmPeak"] > killed["VmHWM"] > MIB  # of this process: the copy took as much and more

    def too_much():
        # Mapped, not allocated: the heap of this process may have so much free.
        taken.append(mmap.mmap(-1, 64 * MIB))
        raise MemoryError

    taken = []
    before = status_bytes("VmSize")
    assert in_a_fork(too_much)["VmPeak"] >= before + 64 * MIB

    def wrong():
        raise ArtifactError("pkg.tar: of another kind")

    with pytest.raises(ArtifactError, match="of another kind"):
        in_a_fork(wrong)


def test_a_fork_that_takes_too_long_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr(fork, "TRIAL_TIMEOUT_S", 0.1)
    with pytest.raises(
        PlatformError, match=r"has not ended after 0\.1 s; try again when the board has less to"
    ):
        in_a_fork(lambda: time.sleep(60) or {})


def test_a_mistake_in_a_fork_is_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: integer"):
        in_a_fork(lambda: {"VmHWM": 1 // 0})


def test_a_size_that_is_none(package, images, tmp_path):
    result = train(package, images, tmp_path / "run", "--memory-limit", "much")
    assert result.exit_code == 2
    assert "expected bytes such as 512MiB or 2GB, found 'much'" in result.stderr


def test_memory_that_runs_out_in_the_middle_keeps_the_last_step(package, images, tmp_path):
    """What a plan cannot foresee: the run ends in one line, with its state saved."""
    prelude = """
from lance_device.step import StreamedStep
run, calls = StreamedStep.run, iter(range(1, 99))
def lack(*arguments, **named):
    if next(calls) == 4:
        raise MemoryError
    return run(*arguments, **named)
StreamedStep.run = lack
"""
    process = spawn(*train_words(package, images, tmp_path / "run"), "--steps", 9, prelude=prelude)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 9, errors
    assert "not enough memory" in errors.splitlines()[-1]
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    started(train(package, images, tmp_path / "run", "--resume"))
