"""Whether a package is signed by whom the user trusts: asked before anything in it is read."""

from pathlib import Path
from typing import Any

from lance_edge.errors import ArtifactError
from lance_edge.signature import fingerprint, message, no_cryptography, read_signature, signature_path


def signed_digest(package: Path, public_key: Path) -> str:
    """Check `package.sig` against a public key in PEM.

    Returns:
        the SHA-256 that the package must have: whoever opens it compares (`Bundle`, `classifier.from_onnx`), so
        that no other file can take its place in between.

    Raises:
        ArtifactError: if signature and key do not belong together, or one is missing.
        PlatformError: if the extra is not installed.
    """
    key = _read_key(public_key)
    path = signature_path(package)
    signature = read_signature(path)
    own = fingerprint(key.public_bytes_raw())
    if not _is_signed(key, signature.signature, message(signature.package_sha256)):
        by = "" if signature.key == own else f": it says {signature.key}, this key is {own}"
        raise ArtifactError(f"{path}: not signed with {public_key}{by}; do not use this package")
    return signature.package_sha256


def _is_signed(key: Any, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _read_key(path: Path) -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise no_cryptography() from None
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot open the key ({error.strerror}); give the .pub file of lance-host keygen"
        ) from None
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not a public key in PEM ({error}); give the .pub file of lance-host keygen"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ArtifactError(f"{path}: expected an Ed25519 key; give the .pub file of lance-host keygen")
    return key
