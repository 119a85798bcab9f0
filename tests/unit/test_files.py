"""Files are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_edge.errors import InputError
from sage_edge.files import replacing, replacing_directory, require_writable, sha256, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, "old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    with replacing_directory(target, "manifest.yaml") as folder:
        (folder / "manifest.yaml").write_text("one")

    def half() -> None:
        with replacing_directory(target, "manifest.yaml") as folder:
            (folder / "manifest.yaml").write_text("two")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        half()
    assert (target / "manifest.yaml").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]
    with replacing_directory(target, "manifest.yaml") as folder:
        (folder / "manifest.yaml").write_text("three")
    assert (target / "manifest.yaml").read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_only_folders_of_ours_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")

    def replace(name: str) -> None:
        with replacing_directory(tmp_path / name, "manifest.yaml"):
            pass

    with pytest.raises(InputError, match="not empty and holds no manifest.yaml"):
        replace("home")
    with pytest.raises(InputError, match="it is a file"):
        replace("file")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "report.json")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="is a folder"):
        require_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder that you may write to"):
        require_writable(tmp_path / "file" / "report.json")
