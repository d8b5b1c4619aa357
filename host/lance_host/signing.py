"""Keys and signatures of packages, so that a board trains from those of its owner only."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lance_edge.bundle import Bundle
from lance_edge.errors import LanceError, ModelError, StorageError
from lance_edge.files import atomic_writer, file_digest
from lance_edge.signature import Signature, encode, fingerprint, message, no_cryptography, signature_path

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def make_keys(private: Path) -> Path:
    """Make a key pair: `private`, readable by its owner alone, and `private.pub`, which is returned.

    Raises:
        StorageError: if one of them exists or cannot be written.
        PlatformError: if the extra is not installed.
    """
    serialization, ed25519 = _library()
    public = private.with_name(private.name + ".pub")
    if public.exists():
        raise StorageError(f"{public}: exists already; choose another name, or remove it")
    key = ed25519.Ed25519PrivateKey.generate()
    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_secret(private, secret)
    with atomic_writer(public) as file:
        file.write(key.public_key().public_bytes(pem, form))
    return public


def sign(package: Path, private: Path) -> Path:
    """Sign a package that is whole, or an exported model; `pkg.tar.sig`, which is returned, lies beside it.

    Raises:
        ArtifactError: if the package is damaged.
        ModelError: if the key cannot be read.
        PlatformError: if the extra is not installed.
    """
    key = _read_key(private)
    if package.suffix != ".onnx":
        with Bundle(package):  # nobody wants to have signed a damaged one
            pass
    try:
        digest = file_digest(package).hexdigest()
    except OSError as error:
        raise ModelError(
            f"{package}: cannot open the model ({error.strerror}); make one with lance-host merge"
        ) from None
    name = fingerprint(key.public_key().public_bytes_raw())
    path = signature_path(package)
    with atomic_writer(path) as file:
        file.write(encode(Signature(digest, key.sign(message(digest)), name)))
    return path


def _write_secret(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except FileExistsError:
        raise StorageError(f"{path}: exists already; choose another name, or remove it") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot write ({error.strerror}); choose another place") from None


def _read_key(path: Path) -> "Ed25519PrivateKey":
    serialization, ed25519 = _library()
    key = _parsed(path, lambda data: serialization.load_pem_private_key(data, password=None))
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ModelError(f"{path}: expected an Ed25519 private key; make one with lance-host keygen")
    private: Ed25519PrivateKey = key
    return private


def _parsed(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"{path}: cannot open the key ({error.strerror}); make one with lance-host keygen"
        ) from None
    except (ValueError, TypeError, LanceError) as error:  # TypeError: it has a pass phrase
        raise ModelError(f"{path}: not a key in PEM ({error}); make one with lance-host keygen") from None


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise no_cryptography() from None
    return serialization, ed25519
