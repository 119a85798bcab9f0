"""Type stubs of TensorRT's Python API, made from NVIDIA's own binding wheels on a machine without TensorRT.

    python -m tests.tensorrt_api.stubs            # make them under build/tensorrt-stubs, and run mypy against each

The wheels hold only the compiled extension. It links against libnvinfer, libnvinfer_plugin and libnvonnxparser, but
calls nothing of them while it is imported: shared objects with functions of the right names, which do nothing, satisfy
the loader. mypy's stubgen then reads classes, methods, signatures and enum members from the imported module. The
stubs describe somebody else's program and are never committed: `make tensorrt-api` and CI make them anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT = REPOSITORY / "build" / "tensorrt-stubs"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


@dataclass(frozen=True)
class Release:
    """One TensorRT release that the code must work with, and the wheel of its bindings."""

    version: str
    distribution: str

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


# JetPack 6.2, the newest bindings published for JetPack 7.2's 10.16, and the newest of 11.
RELEASES = (
    Release("10.3.0", "tensorrt-cu12-bindings"),
    Release("10.16.1.11", "tensorrt-cu13-bindings"),
    Release("11.4.0.106", "tensorrt-cu13-bindings"),
)


class UnavailableError(Exception):
    """The wheel cannot be had here (no network, no wheel for this Python), or there is no C compiler."""


def install(release: Release, folder: Path) -> None:
    """Put the bindings of a release into `folder`. Raises UnavailableError."""
    requirement = f"{release.distribution}=={release.version}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check",
               "--only-binary", ":all:", "--target", str(folder), requirement]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"{requirement} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")


def empty_libraries(folder: Path, major: str, symbols: set[str]) -> None:
    """Shared objects with TensorRT's names whose functions do nothing. Raises UnavailableError without a C compiler."""
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in sorted(symbols)))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", "-o", str(folder / name), f"-Wl,-soname,{name}", str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise UnavailableError("no C compiler (cc)") from error


def environment(release: Release, wheel: Path, libraries: Path) -> dict[str, str]:
    """Environment in which `import tensorrt_bindings` works: the missing functions are found by trying."""
    variables = os.environ | {"PYTHONPATH": str(wheel), "LD_LIBRARY_PATH": str(libraries)}
    symbols = {"createInferBuilder_INTERNAL"}
    for _ in range(64):
        empty_libraries(libraries, release.major, symbols)
        done = subprocess.run([sys.executable, "-c", "import tensorrt_bindings"], env=variables, capture_output=True,
                              text=True, check=False)  # fmt: skip
        missing = re.search(r"undefined symbol: (\w+)", done.stderr)
        if missing is None:
            break
        symbols.add(missing.group(1))
    if done.returncode:
        raise UnavailableError(f"TensorRT {release.version}: {done.stderr.strip().splitlines()[-1]}")
    return variables


def stub(release: Release, wheel: Path, libraries: Path, work: Path) -> str:
    """The stub of one release as text."""
    command = [sys.executable, "-c", "from mypy.stubgen import main; main()", "--quiet", "--inspect-mode",
               "-m", "tensorrt_bindings.tensorrt", "--output", str(work)]  # fmt: skip
    variables = environment(release, wheel, libraries)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"TensorRT {release.version}: stubgen failed: {done.stderr.strip()}")
    return tidy((work / "tensorrt_bindings" / "tensorrt.pyi").read_text(encoding="utf-8"))


def tidy(text: str) -> str:
    """What stubgen writes from the docstrings, as valid stubs of the package `tensorrt`."""
    # The alias tensorrt.bool would hide the type bool in every signature; our code says DataType.BOOL.
    text = re.sub(r"^bool: DataType\n", "", text, flags=re.M)
    text = re.sub(r"\b(?:typing_extensions\.)?[bB]uffer\b", "typing_extensions.Buffer", text)
    # The buffer protocol is not in the docstrings.
    text = text.replace(
        "class IHostMemory:\n", "class IHostMemory:\n    def __buffer__(self, flags: int) -> memoryview: ...\n"
    )
    # pybind11 turns a tuple into Dims by itself, which the signature in the docstring does not say.
    text = re.sub(r"\b(min|opt|max): Dims\b", r"\1: Dims | tuple[int, ...]", text)
    # add_scale_nd has an argument without a default after arguments that have one: Python's syntax has no such thing.
    text = re.sub(r"(power: Weights = \.\.\., channel_axis: [\w.]+)\)", r"\1 = ...)", text)
    return f"import typing_extensions\n{text}\n__version__: str\n"


def make(folder: Path, releases: tuple[Release, ...] = RELEASES) -> dict[str, Path]:
    """Write FOLDER/VERSION/tensorrt.pyi for each release that is not there yet; the folders by version.

    Raises UnavailableError.
    """
    made = {}
    for release in releases:
        path = folder / release.version / "tensorrt.pyi"
        if not path.is_file():
            with tempfile.TemporaryDirectory() as scratch:
                wheel, libraries, work = (Path(scratch) / name for name in ("wheel", "libraries", "work"))
                for part in (wheel, libraries, work):
                    part.mkdir()
                install(release, wheel)
                text = stub(release, wheel, libraries, work)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        made[release.version] = path.parent
    return made


def run_mypy(made: dict[str, Path]) -> bool:
    """Check sage_edge/engines/tensorrt*.py against each release; prints mypy's output. True when all pass."""
    sources = sorted(str(path) for path in (REPOSITORY / "sage_edge" / "engines").glob("tensorrt*.py"))
    passed = True
    for version, folder in made.items():
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder.parent / f"mypy-{version}"), *sources]
        print(f"TensorRT {version}: ", end="", flush=True)
        environment = os.environ | {"MYPYPATH": str(folder)}
        passed &= subprocess.run(command, env=environment, cwd=REPOSITORY, check=False).returncode == 0
    return passed


if __name__ == "__main__":
    try:
        sys.exit(0 if run_mypy(make(DEFAULT)) else 1)
    except UnavailableError as error:
        sys.exit(f"tensorrt stubs: {error}")
