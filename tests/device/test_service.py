"""The systemd unit: what it says, that systemd takes it, and that its command line is what was asked for."""

import getpass
import os
import re
import shutil
import subprocess
import sys

import pytest
from device_harness import lance_device, refused, spawn, started

from lance_device.service import FINAL_EXIT_CODES, ServiceRequest, unit_text
from lance_edge import errors


def _setting(text, name):
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def _words(line):
    """A command line of a unit as systemd reads it, for words without control characters."""
    words = re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line)
    plain = [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare for quoted, bare in words]
    return [word.replace("%%", "%").replace("$$", "$") for word in plain]  # only commands double the "$"


def _print(tmp_path, *flags, out="run"):
    words = ("--artifact", tmp_path / "pkg.tar", "--data", tmp_path / "my photos", "--out", tmp_path / out)
    return started(lance_device("install-service", *words, "--print", *flags)).stdout


def test_the_unit_takes_a_run_up_and_keeps_from_useless_repetition(tmp_path):
    text = _print(tmp_path, "--epochs", 3, "--max-temp", 75)
    assert _words(_setting(text, "ExecStart")[0]) == [
        *(sys.executable, "-m", "lance_device.cli", "train"),
        *("--artifact", str(tmp_path / "pkg.tar"), "--data", str(tmp_path / "my photos")),
        *("--out", str(tmp_path / "run"), "--resume-or-start", "--epochs", "3", "--max-temp", "75"),
    ]
    assert _setting(text, "Restart") == ["on-failure"]
    assert _setting(text, "KillSignal") == ["SIGTERM"]
    assert _setting(text, "SuccessExitStatus") == [str(errors.Interrupted.exit_code)]
    assert _setting(text, "StandardError") == ["journal"]
    assert _setting(text, "PrivateNetwork") == ["yes"]
    assert _setting(text, "ReadWritePaths") == [str(tmp_path)]
    assert _setting(text, "WantedBy") == ["multi-user.target"]


def test_codes_that_repeat_themselves_are_those_of_the_errors():
    """All kinds but a full disk, which may have room later, and a stop."""
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert set(FINAL_EXIT_CODES) == (codes - {1, 8, 130}) | {2}


@pytest.mark.parametrize(
    "name", ["plain", "with space", "100 %", "a$b", 'quo"te', "back\\slash", "semi;colon", "it's"]
)
def test_any_name_of_a_folder_survives(tmp_path, name):
    request = ServiceRequest(tmp_path / name, tmp_path, tmp_path / name, "x", False, 10, ("--seed", "1"))
    words = _words(_setting(unit_text(request), "ExecStart")[0])
    assert words[words.index("--out") + 1] == str(tmp_path / name)
    assert words[-2:] == ["--seed", "1"]


@pytest.mark.parametrize("is_one_word", [True, False])
def test_paths_are_those_of_whoever_installs(tmp_path, monkeypatch, is_one_word):
    """The service runs in another folder; systemd gives it no folder to write that is not named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    options = [("--cache-dir", "a cache/x"), ("--require-signature", "key.pub")]
    flags = [word for pair in options for word in (["=".join(pair)] if is_one_word else pair)]
    words = ("--artifact", "pkg.tar", "--data", "photos", "--out", "deep/run", *flags)
    text = started(lance_device("install-service", *words, "--print")).stdout
    expected = [(option, str(tmp_path / value)) for option, value in options]
    found = _words(_setting(text, "ExecStart")[0])[-2 if is_one_word else -4 :]
    assert found == [word for pair in expected for word in (["=".join(pair)] if is_one_word else pair)]
    assert _words(_setting(text, "ReadWritePaths")[0]) == [str(tmp_path / "deep"), f"-{tmp_path}/a cache/x"]
    places = [tmp_path / name for name in ("pkg.tar", "photos", "deep", "a cache/x")]
    assert _words(_setting(text, "RequiresMountsFor")[0]) == list(map(str, places))
    assert not (tmp_path / "a cache").exists()
    started(lance_device("install-service", *words, "--user", "--allow-missing"))
    assert (tmp_path / "a cache/x").is_dir()
    assert (tmp_path / "deep").is_dir()


def test_a_dollar_is_doubled_where_systemd_expands_it(tmp_path):
    text = _print(tmp_path, out="a$b/run")
    assert _setting(text, "ReadWritePaths") == [f"{tmp_path}/a$b"]
    assert f"--out {tmp_path}/a$$b/run" in _setting(text, "ExecStart")[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_folders_that_sudo_makes_are_of_the_user_who_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("SUDO_USER", "nobody")
    monkeypatch.setattr(ServiceRequest, "unit_path", tmp_path / "unit")
    words = ("--artifact", "pkg.tar", "--data", "photos", "--out", tmp_path / "a/b/run", "--allow-missing")
    started(lance_device("install-service", *words))
    assert [(tmp_path / name).owner() for name in ("a", "a/b")] == ["nobody", "nobody"]
    assert tmp_path.owner() == "root"
    assert "User=nobody" in (tmp_path / "unit").read_text()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    words = (
        "--artifact",
        "pkg.tar",
        "--data",
        "photos",
        "--out",
        tmp_path / "file/deep/run",
        "--allow-missing",
    )
    line = refused(lance_device("install-service", *words), 8)
    assert re.search(r"file/deep: cannot make this folder \(.*Not a directory.*\); make it, or choose", line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("flags", [(), ("--user",), ("--cache-dir", "/var/cache/lance features")])
def test_systemd_takes_the_unit(tmp_path, flags):
    (tmp_path / "lance-train.service").write_text(_print(tmp_path, *flags, out="a run"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "lance-train.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    complaints = [line for line in done.stderr.splitlines() if "lance-train.service" in line]
    assert complaints == []


def test_installing_says_what_to_do_next(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    words = ("--artifact", "pkg.tar", "--data", "photos", "--out", tmp_path / "run", "--user", "--name", "mine")
    words += ("--allow-missing",)
    output = started(lance_device("install-service", *words)).stdout
    path = tmp_path / "config/systemd/user/mine.service"
    assert output.splitlines() == [
        f"wrote {path}; now run:",
        f"  loginctl enable-linger {getpass.getuser()}",
        "  systemctl --user daemon-reload",
        "  systemctl --user enable --now mine",
        "  journalctl --user -u mine -f",
    ]
    text = path.read_text()
    assert _setting(text, "WantedBy") == ["default.target"]
    assert not _setting(text, "User")
    assert all(_words(_setting(text, "ExecStart")[0])[i].startswith("/") for i in (5, 7, 9))


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    words = (
        "--artifact",
        "pkg.tar",
        "--data",
        "photos",
        "--out",
        tmp_path / "run",
        "--user",
        "--allow-missing",
    )
    line = refused(lance_device("install-service", *words), 8)
    assert (
        "lance-train.service: cannot write; run the same with sudo, with --user for a service of your" in line
    )


def test_the_command_of_the_unit_begins_a_run_and_then_takes_it_up(package, images, tmp_path):
    """As systemd would: without a terminal, started again after a kill, and once more when all is done."""
    words = ("--artifact", package.path, "--data", images, "--out", tmp_path / "run", "--print", "--steps", 9)
    text = started(lance_device("install-service", *words, "--threads", 1)).stdout
    command = _words(_setting(text, "ExecStart")[0])[3:]
    prelude = """
import os
from lance_device.run_log import RunLog
write = RunLog.step
def step(self, *arguments, **named):
    write(self, *arguments, **named)
    if self._run.progress.step == 4:
        os.kill(os.getpid(), 9)
RunLog.step = step
"""
    process = spawn(*command, prelude=prelude)
    process.communicate(timeout=60)
    assert process.returncode == -9
    for expected in ("resuming after step 0 of 9", "resuming after step 9 of 9"):
        process = spawn(*command)
        _, errors_text = process.communicate(timeout=60)
        assert process.returncode == 0, errors_text
        assert expected in errors_text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--foo", "3"), "lance-device train would refuse this: No such option '--foo'"),
        (
            ("--epochs", "x"),
            "train would refuse this: Invalid value for '--epochs': 'x' is not a valid integer",
        ),
        (("--epochs", "0"), "Invalid value for '--epochs': 0 is not in the range"),
        (("--threads", "100000"), "Invalid value for '--threads': expected at most"),
        (
            ("--cache", "off", "--cache-dir", "x"),
            "train would refuse this: --cache-dir is for --cache on or auto",
        ),
        (("more",), "train would refuse this: Got unexpected extra argument (more)"),
        (("--resume",), "--resume: a service takes its run up by itself; leave it out"),
        (("--resume-or-start",), "--resume: a service takes its run up by itself; leave it out"),
        (("--", "--out", "other"), "--out is given twice"),
        (("--cache-dir", "a\nUser=root"), "'a\\nUser=root': a unit cannot hold such a character; rename it"),
        *(
            (
                ("--name", name),
                f"expected letters, digits and _ . : - only, such as lance-train, found {name!r}",
            )
            for name in ("a/../c", 'a"b', "it's", "", "a b", "-a", "a@b", "50%", "ö", "a" * 201)
        ),
    ],
)
def test_what_train_would_refuse_is_no_service(package, images, tmp_path, flags, words):
    own = ("--artifact", package.path, "--data", images, "--out", tmp_path / "deep/run", "--print")
    result = lance_device("install-service", *own, *flags)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert "[Unit]" not in result.output
    assert not (tmp_path / "deep").exists()


def test_a_package_that_cannot_do_it_is_no_service(package, images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    words = ("install-service", "--data", images, "--out", tmp_path / "run", "--user")
    line = refused(lance_device(*words, "--artifact", package.path, "--method", "hosvd"), 3)
    assert "this package holds the methods lance, bp, not hosvd" in line
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    refused(lance_device(*words, "--artifact", tmp_path / "junk.tar"), 3)
    assert not (tmp_path / "config").exists()
    started(lance_device(*words, "--artifact", package.path, "--name", "mine.service"))
    assert [file.name for file in (tmp_path / "config/systemd/user").iterdir()] == ["mine.service"]


def test_what_is_not_there_is_refused_unless_it_comes_later(package, images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    words = ("install-service", "--out", tmp_path / "run", "--user")
    nowhere, none = tmp_path / "disk/photos", tmp_path / "nope.tar"
    line = refused(lance_device(*words, "--artifact", none, "--data", images), 3)
    assert line == (
        f"error: --artifact {none}: not there; check the path, or give --allow-missing if it comes with a disk"
        " that is mounted later"
    )
    line = refused(lance_device(*words, "--artifact", package.path, "--data", nowhere), 5)
    assert f"--data {nowhere}: not there; check" in line
    key = ("--require-signature", tmp_path / "key.pub")
    assert "key.pub: not there" in refused(
        lance_device(*words, "--artifact", package.path, "--data", images, *key), 5
    )
    assert not (tmp_path / "config").exists()
    result = started(lance_device(*words, "--artifact", package.path, "--data", nowhere, "--allow-missing"))
    assert result.stderr == f"warning: --data {nowhere}: not there; the service can train only once it is\n"
    assert (tmp_path / "config/systemd/user/lance-train.service").exists()
