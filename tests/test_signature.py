"""Signed packages: made on the workstation, asked for on the board, and checked by OpenSSL too."""

import base64
import re
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

pytest.importorskip("cryptography", reason="needs the extra: pip install 'lance-edge[sign]'")
sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent / "device"))

from tiny_package import write_images, write_tiny_package

from lance_device import signature
from lance_device.classifier import from_onnx
from lance_device.cli import main as device
from lance_device.signature import signed_digest
from lance_edge.errors import ArtifactError
from lance_edge.signature import message, read_signature
from lance_host.cli import cli as host


def run(command, *words):
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(exit_code, command, *words):
    result = run(command, *words)
    assert result.exit_code == exit_code, result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def place(tmp_path):
    """A signed package, its images and keys."""
    write_tiny_package(tmp_path / "pkg.tar")
    write_images(tmp_path / "images")
    assert run(host, "keygen", tmp_path / "key").exit_code == 0
    result = run(host, "sign", "--key", tmp_path / "key", tmp_path / "pkg.tar")
    assert result.output == f"wrote {tmp_path / 'pkg.tar.sig'}\n"
    return tmp_path


def words(place, key="key.pub", package="pkg.tar"):
    return (
        *("train", "--artifact", place / package, "--data", place / "images", "--out", place / "run"),
        *("--steps", 1, "--threads", 1, "--quiet", "--require-signature", place / key),
    )


def test_a_signed_package_trains_and_the_secret_is_kept(place):
    assert run(device, *words(place)).exit_code == 0
    assert (place / "run" / "last.npz").exists()
    assert (place / "key").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in (place / "key.pub").read_bytes()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_says_the_same(place):
    found = read_signature(place / "pkg.tar.sig")
    digest = subprocess.run(["sha256sum", place / "pkg.tar"], capture_output=True, text=True, check=True).stdout
    assert found.package_sha256 == digest.split()[0]
    (place / "message").write_bytes(message(found.package_sha256))
    (place / "raw").write_bytes(found.signature)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pub", "-rawin", "-in", "message"]
    done = subprocess.run([*command, "-sigfile", "raw"], cwd=place, capture_output=True, text=True, check=False)
    assert "Signature Verified Successfully" in done.stdout, done.stderr


def test_without_a_signature(place):
    (place / "pkg.tar.sig").unlink()
    line = refused(3, device, *words(place))
    assert (
        "pkg.tar.sig: cannot open the signature (No such file or directory); the package must be signed" in line
    )
    assert not (place / "run").exists()


def test_a_package_that_was_changed_after_it_was_signed(place):
    write_tiny_package(place / "pkg.tar", seed=1)
    line = refused(3, device, *words(place))
    assert re.search(
        r"pkg.tar: not the package that was signed \(expected sha256 [0-9a-f]{12}\.\.\., found [0-9a-f]{12}",
        line,
    )


def test_a_package_that_is_exchanged_after_its_signature_was_read(place, monkeypatch):
    """What is compared with the signature is the open file that is used, not whatever had its name before."""

    def exchange(*words):
        digest = signed_digest(*words)
        write_tiny_package(place / "pkg.tar", seed=1)
        return digest

    monkeypatch.setattr(signature, "signed_digest", exchange)
    assert "pkg.tar: not the package that was signed" in refused(3, device, *words(place))
    with pytest.raises(
        ArtifactError, match=r"pkg\.tar: not the package that was signed \(expected sha256 0000"
    ):
        from_onnx(place / "pkg.tar", 1, "0" * 64)


def test_another_key(place):
    run(host, "keygen", place / "other")
    line = refused(3, device, *words(place, key="other.pub"))
    assert re.search(
        r"not signed with \S+other.pub: it says [0-9a-f]{16}, this key is [0-9a-f]{16}; do not", line
    )


def test_a_signature_of_another_package_with_its_digest_exchanged(place):
    """The digest is what is signed: one cannot write another into the file."""
    write_tiny_package(place / "evil.tar", seed=1)
    evil = subprocess.run(["sha256sum", place / "evil.tar"], capture_output=True, text=True, check=True).stdout
    text = (place / "pkg.tar.sig").read_text()
    (place / "evil.tar.sig").write_text(re.sub("sha256 [0-9a-f]+", f"sha256 {evil.split()[0]}", text))
    line = refused(3, device, *words(place, package="evil.tar"))
    assert "evil.tar.sig: not signed with" in line


@pytest.mark.parametrize("change", [b"", b"x" * 5000, b"\xff" * 100])
def test_a_file_that_is_no_signature(place, change):
    (place / "pkg.tar.sig").write_bytes(change)
    assert "not a signature of lance-host (expected four lines" in refused(3, device, *words(place))


def test_every_flipped_bit_of_a_signature_is_found(place):
    good = (place / "pkg.tar.sig").read_bytes()
    fingerprint_line = good.index(b"key ")
    for number in range(8 * fingerprint_line):
        position, bit = divmod(number, 8)
        (place / "pkg.tar.sig").write_bytes(
            good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :]
        )
        found = read_or_none(place / "pkg.tar.sig")
        if (
            found is not None
            and base64.b64encode(found.signature) in good
            and found.package_sha256.encode() in good
        ):
            continue  # the spare bits of base64's last letter
        assert run(device, *words(place)).exit_code == 3


def read_or_none(path):
    try:
        return read_signature(path)
    except Exception:
        return None


def test_eval_and_predict_ask_too(place):
    assert run(device, *words(place)).exit_code == 0
    (place / "pkg.tar.sig").unlink()
    common = (
        "--artifact",
        place / "pkg.tar",
        "--checkpoint",
        place / "run/last.npz",
        "--require-signature",
        place / "key.pub",
    )
    assert "must be signed" in refused(3, device, "eval", *common, "--data", place / "images")
    assert "must be signed" in refused(3, device, "predict", *common, place / "images/red")


def test_keys_that_cannot_be_used(place):
    (place / "junk").write_bytes(b"junk")
    rsa = subprocess.run(["openssl", "genrsa", "2048"], capture_output=True, check=True).stdout
    (place / "rsa").write_bytes(rsa)
    sign = ("sign", place / "pkg.tar", "--key")
    assert "junk: not a key in PEM (" in refused(6, host, *sign, place / "junk")
    assert "rsa: expected an Ed25519 private key" in refused(6, host, *sign, place / "rsa")
    assert "none: cannot open the key (No such file" in refused(6, host, *sign, place / "none")
    assert "junk: not a public key in PEM (" in refused(3, device, *words(place, key="junk"))
    assert "none: cannot open the key (No such file" in refused(3, device, *words(place, key="none"))


def test_keys_are_not_overwritten(place):
    before = (place / "key").read_bytes()
    assert "key.pub: exists already; choose another name" in refused(8, host, "keygen", place / "key")
    (place / "key.pub").unlink()
    assert "key: exists already; choose another name" in refused(8, host, "keygen", place / "key")
    assert (place / "key").read_bytes() == before


def test_a_damaged_package_is_not_signed(place):
    (place / "pkg.tar").write_bytes((place / "pkg.tar").read_bytes()[:-1])
    assert "pkg.tar: " in refused(3, host, "sign", "--key", place / "key", place / "pkg.tar")


def test_without_the_library_one_line_says_how_to_get_it(place):
    block = "import sys; sys.modules['cryptography'] = None\n"
    for code, arguments in (
        ("from lance_device.cli import main; main()", words(place)),
        ("from lance_host.cli import cli; cli()", ("keygen", place / "new")),
    ):
        command = [sys.executable, "-c", block + code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 9
        assert done.stderr.strip() == (
            "error: cryptography is not installed, and signatures need it: pip install 'lance-edge[sign]'"
        )
