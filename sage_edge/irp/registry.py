"""Finding and opening plugins.

Where they are looked for, all at once:
  folders that the user gives (`--plugins DIR`, $SAGE_EDGE_PLUGINS): DIR itself, or its sub-folders with a plugin.yaml
  `plugins_irp/` below the current folder
  the project's own: `sage_edge/plugins_irp/` of an installation, `plugins_irp/` of the repository
  entry points of the group `sage_edge.plugins`: a package with a plugin.yaml in it, or a Plugin class with a `spec`
Listing reads plugin.yaml only. Opening a plugin runs its code: open only what you trust.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from sage_edge.config import dump_yaml
from sage_edge.errors import InputError
from sage_edge.files import sha256
from sage_edge.irp.home import load_home
from sage_edge.irp.plugin import Plugin
from sage_edge.irp.spec import PLUGIN_FILE, PluginSpec, load_spec

GROUP = "sage_edge.plugins"
VARIABLE = "SAGE_EDGE_PLUGINS"
PACKAGE = Path(__file__).resolve().parents[1]
# Parts of a plugin's folder that do not change what it does.
IGNORED = re.compile(r"(__pycache__|tests|\..*|test_.*\.py|.*\.md)")
Origin = Literal["given", "here", "project", "entry point"]


@dataclass(frozen=True)
class Found:
    """A plugin that was found. folder: None for a class of an entry point. error: why it cannot be used, or ""."""

    name: str
    origin: Origin
    where: str
    folder: Path | None
    spec: PluginSpec | None
    error: str = ""


def find_plugins(folders: Sequence[Path] = ()) -> list[Found]:
    """All plugins, those of given folders first. A plugin.yaml that cannot be read is listed with its error."""
    found: dict[Path | str, Found] = {}
    own = next(
        (f for f in (PACKAGE / "plugins_irp", PACKAGE.parent / "plugins_irp") if f.is_dir()), PACKAGE / "plugins_irp"
    )
    given = [*folders, *(Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p)]
    places: list[tuple[Origin, Path]] = [
        *(("given", f) for f in given),
        ("here", Path("plugins_irp")),
        ("project", own),
    ]
    for origin, place in places:
        if origin == "given" and not place.is_dir():
            raise InputError(f"{place}: no such folder; expected a plugin's folder, or one that holds such folders")
        for folder in _folders(place):
            found.setdefault(folder.resolve(), _read(folder, origin))
    for entry in metadata.entry_points(group=GROUP):
        listed = _entry(entry)
        found.setdefault(listed.folder.resolve() if listed.folder else listed.where, listed)
    return list(found.values())


def open_plugin(
    target: str | Path, folders: Sequence[Path] = (), options: Mapping[str, Any] | None = None
) -> Plugin[Any]:
    """A plugin by name or by folder, not yet active, with its certificate and what is known of its steps.

    options: over those of plugin.yaml. Raises InputError when there is none, two of that name, or it cannot be loaded.
    """
    if (Path(target) / PLUGIN_FILE).is_file():
        found = _read(Path(target), "given")
    else:
        everything = find_plugins(folders)
        named = [one for one in everything if one.name == str(target)]
        if not named:
            known = ", ".join(sorted({one.name for one in everything if not one.error})) or "none"
            raise InputError(
                f"plugin {target!s}: neither a folder with a {PLUGIN_FILE} nor a known plugin (known: {known})"
            )
        if len(named) > 1:
            raise InputError(
                f"plugin {target!s}: found {' and '.join(one.where for one in named)}; give the folder instead"
            )
        found = named[0]
    if found.error or found.spec is None:
        raise InputError(f"plugin {found.name}: {found.error}")
    kind = _class(found, found.spec)
    chosen = {**found.spec.options, **(options or {})}
    plugin = _made(kind, found.spec, chosen)
    plugin.folder, plugin.options = found.folder, dict(options or {})
    plugin.digest = _digest(found, found.spec, plugin, chosen)
    load_home(plugin)
    return plugin


def _folders(place: Path) -> Iterator[Path]:
    if (place / PLUGIN_FILE).is_file():
        yield place
    elif place.is_dir():
        yield from (path.parent for path in sorted(place.glob(f"*/{PLUGIN_FILE}")))


def _read(folder: Path, origin: Origin) -> Found:
    try:
        spec = load_spec(folder)
    except InputError as error:
        return Found(folder.name, origin, str(folder), folder, None, str(error))
    return Found(spec.name, origin, str(folder), folder, spec)


def _entry(entry: metadata.EntryPoint) -> Found:
    """An entry point; a package is found without running it, a class is imported to read its `spec`."""
    where = f"entry point {entry.name} = {entry.value}"
    try:
        if not entry.attr:
            located = importlib.util.find_spec(entry.module)
            paths = list(located.submodule_search_locations or ()) if located else []
            folder = next((Path(p) for p in paths if (Path(p) / PLUGIN_FILE).is_file()), None)
            if folder is None:
                return Found(entry.name, "entry point", where, None, None, f"{where}: no package with a {PLUGIN_FILE}")
            return _read(folder, "entry point")
        spec = getattr(entry.load(), "spec", None)
    except Exception as error:  # somebody else's package may fail in any way; the others must still be listed
        return Found(entry.name, "entry point", where, None, None, f"{where}: {type(error).__name__}: {error}")
    if not isinstance(spec, PluginSpec):
        return Found(
            entry.name, "entry point", where, None, None, f"{where}: has no attribute `spec` of type PluginSpec"
        )
    return Found(spec.name, "entry point", where, None, spec)


def _class(found: Found, spec: PluginSpec) -> type[Plugin[Any]]:
    if found.folder is None:
        (entry,) = (e for e in metadata.entry_points(group=GROUP) if found.where.endswith(f"= {e.value}"))
        kind = entry.load()
    else:
        file, _, name = spec.entry.partition(":")
        kind = getattr(_module(found.folder, file), name, None)
        if kind is None:
            raise InputError(f"{found.folder / file}.py: holds no class {name}, which {PLUGIN_FILE} names as entry")
    if not (isinstance(kind, type) and issubclass(kind, Plugin)):
        raise InputError(f"plugin {found.name}: {spec.entry} is not a class derived from sage_edge.irp.plugin.Plugin")
    return kind


def _module(folder: Path, file: str) -> ModuleType:
    """The module FILE.py of a plugin's folder. The folder is a package of its own, so `from .model import X` works there."""
    path = folder.resolve() / f"{file}.py"
    if not path.is_file():
        raise InputError(f"{path}: missing; {PLUGIN_FILE} names it as entry")
    package = f"sage_edge_plugin_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    if package not in sys.modules:
        parent = ModuleType(package)
        parent.__path__ = [str(folder.resolve())]
        sys.modules[package] = parent
    name = f"{package}.{file}"
    located = importlib.util.spec_from_file_location(name, path)
    assert located is not None
    assert located.loader is not None
    module = importlib.util.module_from_spec(located)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        located.loader.exec_module(module)
    except Exception as error:  # the plugin's own code
        del sys.modules[name]
        raise InputError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _made(kind: type[Plugin[Any]], spec: PluginSpec, options: Mapping[str, Any]) -> Plugin[Any]:
    try:
        inspect.signature(kind).bind(spec, **options)
    except TypeError as error:
        raise InputError(
            f"plugin {spec.name}: options {sorted(options)} do not fit {kind.__name__}: {error}"
        ) from error
    try:
        return kind(spec, **options)
    except NotImplementedError as error:
        raise InputError(f"plugin {spec.name}: {error}") from error
    except TypeError as error:
        missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        raise InputError(f"plugin {spec.name}: {f'{missing} must be written' if missing else error}") from error


def _digest(found: Found, spec: PluginSpec, plugin: Plugin[Any], options: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the plugin's files (of the source of its class, without a folder), options, and what it loads."""
    facts = (dump_yaml(spec), repr(sorted(options.items())), plugin.weights_digest())
    digest = hashlib.sha256("\n".join(facts).encode())
    if found.folder is None:
        digest.update(inspect.getsource(type(plugin)).encode())
        return digest.hexdigest()
    for path in sorted(found.folder.rglob("*")):
        inside = path.relative_to(found.folder)
        if path.is_file() and not any(map(IGNORED.fullmatch, inside.parts)):
            digest.update(f"\n{inside.as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
