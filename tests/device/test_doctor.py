"""`lance-device doctor` on machines that are made up, and on this one."""

import json
import os
import re
import shutil
import subprocess

import pytest
from device_harness import lance_device, started

from lance_device import doctor, machine
from lance_device.doctor import PROBLEM, WARNING, examine
from lance_device.probe import Health
from lance_device.session import runtime_version

NAMES = ["board", "system", "Python", "processor", "memory", "disk", "temperature", "onnxruntime", "packages"]


def _find(findings, name):
    return [finding for finding in findings if finding.name == name]


def test_this_machine_can_train(tmp_path):
    result = started(lance_device("doctor", "--out", tmp_path / "run"))
    lines = result.stdout.splitlines()
    assert re.match(r"this machine can train: 0 problems \(x\), \d+ warnings \(!\)$", lines[-1])
    named = [line[2:].split("  ")[0] for line in lines[:-1]]
    assert [name for name in named if name in NAMES] == NAMES
    off = "off (ORT_DISABLE_TELEMETRY=1): loading the runtime opened no socket, file or thread"
    assert f"  telemetry    {off}" in lines


def test_the_same_as_json(tmp_path):
    findings = json.loads(started(lance_device("doctor", "--json")).stdout)
    assert {finding["name"] for finding in findings} >= set(NAMES)
    assert all(finding.keys() == {"name", "value", "verdict", "remedy"} for finding in findings)


def test_a_pi_as_it_describes_itself(tmp_path, monkeypatch):
    (tmp_path / "model").write_text("Raspberry Pi 3 Model B Plus Rev 1.3\0")
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd03\n"
    )
    (tmp_path / "governor").write_text("powersave\n")
    monkeypatch.setattr(machine, "MODEL", tmp_path / "model")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "GOVERNOR", tmp_path / "governor")
    health = Health(temperature_c=81.2, arm_mhz=600.0, throttled="0x50005")
    monkeypatch.setattr(doctor.HealthProbe, "read", lambda self: health)
    findings = examine(tmp_path)
    assert _find(findings, "board")[0].value == "Raspberry Pi 3 Model B Plus Rev 1.3"
    assert "features fp asimd crc32, governor powersave" in _find(findings, "processor")[0].value
    assert _find(findings, "governor")[0].verdict == WARNING
    assert _find(findings, "temperature")[0].verdict == WARNING
    power = [(finding.value, finding.verdict) for finding in _find(findings, "power and heat")]
    assert power == [("under-voltage now (0x50005)", WARNING), ("throttled now (0x50005)", WARNING)]
    health = Health(temperature_c=50.0, throttled="0x10000")
    assert _find(examine(tmp_path), "power and heat")[0].value == "under-voltage since it started (0x10000)"


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "words"),
    [
        ({"sys.maxsize": 2**31 - 1}, "Python", PROBLEM, "install a 64-bit OS (Raspberry Pi OS 64-bit)"),
        ({"platform.libc_ver": lambda: ("", "")}, "C library", WARNING, "use a distribution with glibc"),
        ({"platform.libc_ver": lambda: ("glibc", "2.24")}, "C library", PROBLEM, "needs glibc 2.28"),
        ({"time.gmtime": lambda: _Year}, "clock", WARNING, "runs will have odd names"),
        ({"lance_device.doctor.free_bytes": lambda: 1 << 20}, "memory", PROBLEM, "close other programs"),
        ({"os.access": lambda path, mode: False}, "disk", PROBLEM, "choose another folder"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch, tmp_path, changes, name, verdict, words):
    monkeypatch.setattr(doctor, "CHECKS", tuple(c for c in doctor.CHECKS if c is not doctor._runtime))
    for path, value in changes.items():
        monkeypatch.setattr(path, value)
    finding = _find(examine(tmp_path), name)[-1]
    monkeypatch.undo()
    assert finding.verdict == verdict
    assert words in finding.remedy


class _Year:
    tm_year = 1970


def test_a_full_disk(monkeypatch, tmp_path):
    class Usage:
        free = 5 << 20

    monkeypatch.setattr(doctor.psutil, "disk_usage", lambda path: Usage)
    finding = next(doctor._disk(tmp_path / "not" / "made" / "yet"))
    assert (finding.verdict, finding.remedy) == (PROBLEM, "free some space")
    assert finding.value == f"{tmp_path}: 5.00 MiB free"


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
            "dies of an illegal instruction: this build is",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "dies of SIGSEGV"),
        ("raise ImportError('no wheel')", "ImportError: no wheel"),
    ],
)
def test_a_runtime_that_does_not_load(monkeypatch, tmp_path, trial, words):
    monkeypatch.setattr(doctor, "TRIAL", trial)
    result = lance_device("doctor")
    assert result.exit_code == 9
    assert words in result.stdout
    assert "this machine cannot train: 1 problems (x)" in result.stdout


def test_a_switch_that_is_not_set_is_a_problem(monkeypatch, tmp_path):
    forgetful = doctor.TRIAL.replace("print(", "os.environ.pop('ORT_DISABLE_TELEMETRY')\nprint(", 1)
    monkeypatch.setattr(doctor, "TRIAL", forgetful)
    finding = _find(list(doctor._runtime(tmp_path)), "telemetry")[0]
    assert finding.verdict == PROBLEM
    assert finding.value == "on: loading the runtime opened nothing, but its switch is not set"
    assert "set ORT_DISABLE_TELEMETRY=1" in finding.remedy


def test_telemetry_that_is_on_is_seen(monkeypatch, tmp_path):
    """For real: the runtime is loaded before its switch is set, in a process without any network.

    The runtime also keeps quiet where a variable like CI is set, so it gets a bare environment.
    """
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which(alone[0]) is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no process without a network can be made here")
    if tuple(map(int, runtime_version().split(".")[:2])) < (1, 29):
        pytest.skip("this onnxruntime has no telemetry")
    run = subprocess.run
    bare = {
        "HOME": str(tmp_path),
        **{name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
    }
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda words, **options: run([*alone, *words], env=bare, **options)
    )
    early = "import onnxruntime\nfrom lance_device.run_record"
    monkeypatch.setattr(doctor, "TRIAL", doctor.TRIAL.replace("from lance_device.run_record", early))
    finding = _find(list(doctor._runtime(tmp_path)), "telemetry")[0]
    assert finding.verdict == PROBLEM
    assert re.search(r"opened .*onnxruntime.*, \d threads$", finding.value)


def test_limits_of_a_control_group_are_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "group_limit_bytes", lambda: 512 << 20)
    monkeypatch.setattr(doctor, "free_bytes", lambda: 400 << 20)
    assert ", 400.00 MiB free, limit 512.00 MiB" in next(doctor._memory(tmp_path)).value
