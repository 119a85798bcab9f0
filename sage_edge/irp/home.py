"""A plugin's home: the folder in the cache with what was learned of exactly this plugin.

    manifest.yaml       the plugin's name and digest (code, options, weights, and the engine it opened)
    certificate.yaml    its halting certificate (irp/certificate.py), bound to that manifest
    worth.npz           what its steps are worth (irp/worth.py)

A plugin of another digest has another home, so a change of code or weights voids both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sage_edge.arrays import read_npz
from sage_edge.config import dump_yaml, load_yaml
from sage_edge.engines.build import cache_directory
from sage_edge.errors import InputError
from sage_edge.files import write_atomic
from sage_edge.irp.certificate import load_certificate
from sage_edge.irp.plugin import Plugin
from sage_edge.irp.worth import WorthTable, from_arrays

MANIFEST_FILE = "manifest.yaml"
WORTH_FILE = "worth.npz"


@dataclass(frozen=True)
class HomeManifest:
    """The content of manifest.yaml."""

    format: Literal["sage-edge-plugin-home/1"]
    name: str
    digest: str


def home_of(plugin: Plugin[Any]) -> Path:
    """Where the home is, or would be."""
    return cache_directory() / "plugins" / f"{plugin.spec.name}-{plugin.digest[:20]}"


def make_home(plugin: Plugin[Any]) -> Path:
    """The home, made if it is not there."""
    home = home_of(plugin)
    text = dump_yaml(HomeManifest("sage-edge-plugin-home/1", plugin.spec.name, plugin.digest))
    path = home / MANIFEST_FILE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
    return home


def load_home(plugin: Plugin[Any]) -> None:
    """Give the plugin its certificate and its worth table, if its home holds them.

    Raises IntegrityError for a certificate that was altered, InputError for a table that does not fit.
    """
    home = home_of(plugin)
    if not (home / MANIFEST_FILE).is_file() or load_yaml(home / MANIFEST_FILE, HomeManifest).digest != plugin.digest:
        return
    plugin.certificate = load_certificate(home) or plugin.certificate
    if (home / WORTH_FILE).is_file():
        plugin.worth = _table(home / WORTH_FILE, plugin.max_steps)


def _table(path: Path, max_steps: int) -> WorthTable:
    try:
        table = from_arrays(read_npz(path))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a table of worth: {error}; `sage-edge plugin calibrate` makes a new one"
        ) from error
    if table.max_steps != max_steps:
        raise InputError(f"{path}: of a plugin with {table.max_steps} steps, this one has {max_steps}; calibrate again")
    return table
