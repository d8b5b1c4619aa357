"""Signatures of packages: the file `pkg.tar.sig` beside `pkg.tar`, and what it signs.

Four lines of text: a title, the SHA-256 of the whole package, the Ed25519 signature (RFC 8032) of title and
digest in base64, and the fingerprint of the public key, which helps to find the right one and is believed by
nobody.  Keys are PEM files as OpenSSL reads and writes them.  Signing and checking need `cryptography` (the
extra `sign`); this module needs nothing and does neither.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lance_edge.errors import ArtifactError, PlatformError

TITLE = "lance-edge signature 1"
SIGNATURE_BYTES = 64
MAX_FILE_BYTES = 1024
_FORM = re.compile(
    rf"{TITLE}\nsha256 ([0-9a-f]{{64}})\ned25519 ([A-Za-z0-9+/]{{86}}==)\nkey ([0-9a-f]{{16}})\n"
)


@dataclass(frozen=True)
class Signature:
    """What `pkg.tar.sig` says.

    Attributes:
        package_sha256: of the whole file.
        signature: of `message(package_sha256)`.
        key: fingerprint of the public key.
    """

    package_sha256: str
    signature: bytes
    key: str


def signature_path(package: Path) -> Path:
    """Where the signature of a package lies."""
    return package.with_name(package.name + ".sig")


def message(package_sha256: str) -> bytes:
    """The bytes that are signed."""
    return f"{TITLE}\n{package_sha256}\n".encode()


def fingerprint(public_key: bytes) -> str:
    """16 hex digits of the raw public key, 32 bytes."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def encode(signature: Signature) -> bytes:
    """The bytes of the file."""
    text = base64.b64encode(signature.signature).decode()
    return f"{TITLE}\nsha256 {signature.package_sha256}\ned25519 {text}\nkey {signature.key}\n".encode()


def read_signature(path: Path) -> Signature:
    """Read `pkg.tar.sig`.

    Raises:
        ArtifactError: if it is missing or anything but such a file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot open the signature ({error.strerror}); the package must be signed here: make one"
            " with lance-host sign, and copy it along"
        ) from None
    found = _FORM.fullmatch(data.decode("ascii", "replace"))
    if found is None:
        raise ArtifactError(
            f"{path}: not a signature of lance-host (expected four lines, {TITLE!r} first); copy it again"
        )
    return Signature(found[1], base64.b64decode(found[2]), found[3])


def no_cryptography() -> PlatformError:
    """What to say where the library is not installed."""
    return PlatformError("cryptography is not installed, and signatures need it: pip install cryptography")
