"""The user's own code: `path/to/file.py:factory` or `package.module:factory`."""

import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lance_edge.errors import ModelError
from lance_host.model_source import ModelSource
from lance_host.text import one_line

CLASSES_PARAMETER = "num_classes"


def factory_source(text: str) -> ModelSource:
    """A function or class that gives an `nn.Module`, or such a module itself.

    A parameter `num_classes` is given the number of classes; no other may lack a default.

    Raises:
        ModelError: if file, module or attribute are not to be found, or the attribute is no factory.
    """
    where, _, attribute = text.rpartition(":")
    is_file = where.endswith(".py")
    module = _load_file(text, Path(where)) if is_file else _import(text, where)
    factory = _attribute(text, module, attribute)
    _check_signature(text, factory)
    name = f"{Path(where).name}:{attribute}" if is_file else text
    return ModelSource(name=name, build=functools.partial(_build, text, factory))


def _load_file(text: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"--model {text}: {path} is no file; give the path of a Python file")
    folder = str(path.parent.resolve())
    spec = importlib.util.spec_from_file_location(f"lance_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickling look a module up by its name
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script: it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(
            f"--model {text}: importing {path} raised {one_line(error)}; correct the file"
        ) from error
    return module


def _import(text: str, name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as for python -m
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ModelError(
                f"--model {text}: no module {error.name} here; install it, run lance-host in the folder that"
                f" holds it, or give the file: path/to/{name.rpartition('.')[2]}.py:FACTORY"
            ) from None
        raise ModelError(f"--model {text}: importing {name} raised {one_line(error)}; install it") from error
    except Exception as error:
        raise ModelError(f"--model {text}: importing {name} raised {one_line(error)}; correct it") from error


def _attribute(text: str, module: ModuleType, attribute: str) -> Any:
    try:
        found = getattr(module, attribute)
    except AttributeError:
        raise ModelError(
            f"--model {text}: {module.__name__.removeprefix('lance_model_')} has no {attribute!r};"
            f" {_offers(module, attribute)}"
        ) from None
    if not callable(found):  # a module is callable, too
        raise ModelError(
            f"--model {text}: expected a function or class that gives an nn.Module, or such a module, found"
            f" {type(found).__name__}"
        )
    return found


def _offers(module: ModuleType, attribute: str) -> str:
    """All that could be meant: what the module defines itself, or else what it imports."""
    public = {name: value for name, value in vars(module).items() if callable(value) and name[0] != "_"}
    own = [
        name
        for name, value in public.items()
        if isinstance(value, nn.Module) or getattr(value, "__module__", None) == module.__name__
    ]
    close = difflib.get_close_matches(attribute, public, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}it has {', '.join(own or public) or 'nothing that could be called'}"


def _check_signature(text: str, factory: Any) -> None:
    if isinstance(factory, nn.Module):
        return
    needed = [
        parameter.name
        for parameter in _parameters(factory)
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name != CLASSES_PARAMETER
    ]
    if needed:
        raise ModelError(
            f"--model {text}: needs the arguments {', '.join(needed)}; give a function without arguments, or"
            f" with {CLASSES_PARAMETER} alone"
        )


def _parameters(factory: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except ValueError:  # built-in callables have none
        return []


def _build(text: str, factory: Any, classes: int) -> nn.Module:
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)
    takes_classes = any(parameter.name == CLASSES_PARAMETER for parameter in _parameters(factory))
    network = factory(**({CLASSES_PARAMETER: classes} if takes_classes else {}))
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"--model {text}: expected it to give an nn.Module, found {type(network).__name__};"
            " return the network"
        )
    return network
