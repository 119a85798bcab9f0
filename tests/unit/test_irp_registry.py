"""Finding plugins: in folders, in the project, by entry point; and what is said of those that do not work."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from sage_edge.errors import InputError
from sage_edge.irp.home import home_of
from sage_edge.irp.measure import keep_calibration, record_traces
from sage_edge.irp.registry import VARIABLE, find_plugins, open_plugin
from sage_edge.irp.skeleton import new_plugin

REASON = Path(__file__).resolve().parents[2] / "plugins_irp" / "reason"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_plugin("smooth", tmp_path / "mine")


def names(*folders: Path) -> dict[str, str]:
    return {found.name: found.origin for found in find_plugins(folders)}


def test_the_projects_plugins_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names()["reason"] == "project"
    with pytest.raises(InputError, match=r"neither a folder with a plugin.yaml nor a known plugin \(known: .*reason"):
        open_plugin("vizion")


def test_given_folders_the_variable_and_the_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names(folder)["smooth"] == "given"
    assert names(folder.parent)["smooth"] == "given"
    assert "smooth" not in names()
    monkeypatch.setenv(VARIABLE, f"{folder.parent}:")
    assert names()["smooth"] == "given"
    monkeypatch.delenv(VARIABLE)
    folder.parent.rename(tmp_path / "plugins_irp")
    assert names()["smooth"] == "here"
    with pytest.raises(InputError, match="no such folder"):
        find_plugins([tmp_path / "nowhere"])


def test_two_of_one_name_must_be_told_apart(folder: Path, tmp_path: Path) -> None:
    other = new_plugin("smooth", tmp_path / "other")
    with pytest.raises(InputError, match="give the folder instead"):
        open_plugin("smooth", [folder, other])
    assert open_plugin(other).folder == other


def test_a_broken_plugin_is_listed_with_its_error_and_hides_no_other(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "mine" / "bad"
    bad.mkdir()
    (bad / "plugin.yaml").write_text("format: sage-edge-plugin/1\nname: bad\n")
    found = {one.name: one for one in find_plugins([folder.parent])}
    assert "missing key" in found["bad"].error
    assert not found["smooth"].error
    with pytest.raises(InputError, match="missing key"):
        open_plugin(bad)


def distribution(site: Path, entry: str) -> None:
    info = site / "somebodys-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sage_edge.plugins]\n{entry}\n")


def test_a_package_by_entry_point_is_found_without_running_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    shutil.copytree(folder, site / "somebodys_plugin")
    (site / "somebodys_plugin" / "__init__.py").write_text("raise RuntimeError('was run')\n")
    distribution(site, "smooth = somebodys_plugin")
    monkeypatch.syspath_prepend(str(site))
    assert names()["smooth"] == "entry point"
    with open_plugin("smooth") as plugin:
        assert plugin.spec.name == "smooth"


def test_a_class_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    distribution(
        site, "solve = sage_edge.bench.solvers:Solve\nbroken = sage_edge.bench.solvers:Nothing\nodd = json:dumps"
    )
    monkeypatch.syspath_prepend(str(site))
    found = {one.name: one for one in find_plugins()}
    assert found["solve"].origin == "entry point"
    assert "AttributeError" in found["broken"].error
    assert "no attribute `spec`" in found["odd"].error
    assert open_plugin("solve", options={"size": 16}).digest != open_plugin("solve", options={"size": 17}).digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("raise ValueError('mine')\n", "plugin.py: cannot be loaded: ValueError: mine"),
        ("class Smooth: pass\n", "is not a class derived from"),
        ("x = 1\n", "holds no class Smooth"),
        ("from sage_edge.irp.plugin import Plugin\nclass Smooth(Plugin):\n    def __init__(self, spec, weight): ...\n",
         "energy, init_state, result, step must be written"),
    ],
)  # fmt: skip
def test_code_that_cannot_be_used_says_why(damage: str, message: str, folder: Path) -> None:
    (folder / "plugin.py").write_text(damage)
    with pytest.raises(InputError) as error:
        open_plugin(folder)
    assert message in str(error.value)


def test_options_come_from_the_yaml_and_must_fit(folder: Path) -> None:
    assert open_plugin(folder).weight == 4.0  # type: ignore[attr-defined]
    assert open_plugin(folder, options={"weight": 1.0}).weight == 1.0  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"options \['colour', 'weight'\] do not fit Smooth"):
        open_plugin(folder, options={"colour": 1})
    (folder / "plugin.py").unlink()
    with pytest.raises(InputError, match="missing; plugin.yaml names it as entry"):
        open_plugin(folder)


def test_a_plugins_modules_may_import_each_other_and_two_plugins_do_not_mix(tmp_path: Path) -> None:
    opened = []
    for name in ("one", "two"):
        folder = new_plugin(name, tmp_path)
        (folder / "helper.py").write_text(f"NAME = {name!r}\n")
        source = (folder / "plugin.py").read_text()
        (folder / "plugin.py").write_text(source + "\nfrom .helper import NAME\n")
        opened.append(open_plugin(folder))
    assert [sys.modules[type(plugin).__module__].NAME for plugin in opened] == ["one", "two"]


def test_the_digest_follows_code_options_and_weights_and_nothing_else(folder: Path) -> None:
    before = open_plugin(folder).digest
    (folder / "test_plugin.py").write_text("# other tests\n")
    (folder / "NOTES.md").write_text("a note\n")
    assert open_plugin(folder).digest == before
    assert open_plugin(folder, options={"weight": 2.0}).digest != before
    (folder / "weights.bin").write_bytes(b"1")
    changed = open_plugin(folder).digest
    assert changed != before
    (folder / "weights.bin").write_bytes(b"2")
    assert open_plugin(folder).digest not in (before, changed)


def test_what_was_calibrated_is_of_this_code_alone(folder: Path) -> None:
    with open_plugin(folder) as plugin:
        recorded = record_traces(plugin, plugin.examples("calibration", 320))
        certificate, _ = keep_calibration(plugin, recorded)
    again = open_plugin(folder)
    assert again.certificate == certificate
    assert again.default_halt == "certified"
    assert again.worth is not None
    (folder / "plugin.py").write_text((folder / "plugin.py").read_text() + "\n# changed\n")
    changed = open_plugin(folder)
    assert changed.certificate is None
    assert changed.worth is None


def test_a_damaged_home_is_refused(folder: Path) -> None:
    with open_plugin(folder) as plugin:
        keep_calibration(plugin, record_traces(plugin, plugin.examples("calibration", 320)))
        home = home_of(plugin)
    worth = (home / "worth.npz").read_bytes()
    (home / "worth.npz").write_bytes(worth[:-40])
    with pytest.raises(InputError, match=r"worth\.npz: not an \.npz"):
        open_plugin(folder)
    (home / "worth.npz").write_bytes(worth)
    text = (home / "certificate.yaml").read_text()
    (home / "certificate.yaml").write_text(text.replace("confidence: 0.95", "confidence: 0.99"))
    with pytest.raises(InputError, match="changed since it was written"):
        open_plugin(folder)


def test_reason_names_its_engine_in_its_digest() -> None:
    plugin = open_plugin(REASON)
    assert len(plugin.weights_digest()) == 64
    with pytest.raises(InputError, match="expected 81 characters"), plugin:
        plugin.init_state({"puzzle": "12"})
