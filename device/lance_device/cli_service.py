"""Whether a service could do what it is asked for: found out when it is installed, not after a reboot."""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import click

from lance_device.cli_train import expect_sense, train
from lance_device.options import resolve
from lance_device.service import ServiceRequest
from lance_edge.bundle import Bundle
from lance_edge.errors import ArtifactError, DataError, LanceError

OWN_OPTIONS = ("artifact", "data", "out")  # every service names them itself
# Of the characters of systemd.unit(5) those that mean nothing else; "@" makes a template, "/" another folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,199}")


def service_name(context: click.Context, option: click.Parameter, text: str) -> str:
    """The name of a unit, with or without `.service`."""
    name = text.removesuffix(".service")
    if NAME.fullmatch(name) is None:
        raise click.BadParameter(
            f"expected letters, digits and _ . : - only, such as lance-train, found {text!r}"
        )
    return name


def check_service(request: ServiceRequest) -> tuple[str, ...]:
    """See that `lance-device train` takes the options, and the package what they ask for, if it is there.

    Returns:
        what is not there (yet), a line for each.

    Raises:
        UsageError: if train would refuse its command line, or the service could not hand it on.
        LanceError: if the package is there and cannot be used.
    """
    values = _parsed(request)
    _expect_printable(request)
    if request.artifact.exists():
        with Bundle(request.artifact) as bundle:
            resolve(values, bundle.manifest)
    places = {"--artifact": request.artifact, "--data": request.data}
    if values["public_key"] is not None:
        places["--require-signature"] = values["public_key"]
    return tuple(f"{option} {place}: not there" for option, place in places.items() if not place.exists())


def refuse_missing(request: ServiceRequest, missing: tuple[str, ...]) -> None:
    """What is done about what is not there, unless that is meant.

    Raises:
        LanceError: of the kind of the first that is missing.
    """
    if missing:
        kind: type[LanceError] = DataError if request.artifact.exists() else ArtifactError
        raise kind(
            f"{'; '.join(missing)}; check the path, or give --allow-missing if it comes with a disk that is"
            " mounted later"
        )


def _parsed(request: ServiceRequest) -> Mapping[str, Any]:
    """The options as train itself reads them."""
    own = [word for name in OWN_OPTIONS for word in (f"--{name}", str(getattr(request, name)))]
    try:
        context = train.make_context("lance-device train", [*own, *request.arguments])
        expect_sense(context)
    except click.UsageError as error:
        raise click.UsageError(f"lance-device train would refuse this: {error.format_message()}") from None
    values = context.params
    if values["resume"] or values["resume_or_start"]:
        raise click.UsageError("--resume: a service takes its run up by itself; leave it out")
    for name in OWN_OPTIONS:
        if values[name] != getattr(request, name):
            raise click.UsageError(f"--{name} is given twice")
    return values


def _expect_printable(request: ServiceRequest) -> None:
    """A line break in a path would begin another setting."""
    for word in map(str, (request.artifact, request.data, request.out, *request.arguments)):
        if any(unicodedata.category(character) == "Cc" for character in word):
            raise click.UsageError(f"{word!r}: a unit cannot hold such a character; rename it")
