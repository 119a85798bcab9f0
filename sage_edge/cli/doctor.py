"""`sage-edge doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import argparse
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

from sage_edge.cli.output import Subparsers, command, print_json, print_table
from sage_edge.device import machine, version
from sage_edge.engines.build import cache_directory
from sage_edge.models import shipped_names

OPTIONAL = {
    "torch": "export", "onnxscript": "export", "tensorrt": "tensorrt", "cuda-bindings": "cuda", "openvino": "peers"
}  # fmt: skip


def add(subparsers: Subparsers) -> None:
    command(
        subparsers, "doctor", run, "what this machine has and lacks",
        "Report the machine, the installed parts and the shipped models, with what to do about each problem.\n"
        "Exit code 1 when something that every command needs is wrong.",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    facts = machine()
    required = {name: version(name) for name in ("numpy", "onnx", "onnxruntime", "PyYAML", "rich")}
    optional = {name: version(name) for name in OPTIONAL}
    cache = cache_directory()
    problems = [f"{name} is not installed: pip install sage-edge" for name, found in required.items() if not found]
    if not shipped_names():
        problems.append("no shipped model was found: the installation is incomplete")
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    free_mib = shutil.disk_usage(existing).free >> 20
    if free_mib < 512:
        problems.append(f"{existing}: only {free_mib} MiB free for the engine cache; set SAGE_EDGE_CACHE elsewhere")
    notes = [f"{name}: not installed; `pip install 'sage-edge[{OPTIONAL[name]}]'` brings it" for name, found in
             optional.items() if not found]  # fmt: skip
    if not Path("/dev/nvidia0").exists() and not Path("/dev/nvmap").exists():
        notes.append("no NVIDIA device node: engines run on the CPU")
    report = {
        "ok": not problems, "machine": asdict(facts), "python": platform.python_version(), "packages": required | optional,
        "engine_cache": str(cache), "engine_cache_free_mib": free_mib, "shipped_models": shipped_names(),
        "problems": problems, "notes": notes,
    }  # fmt: skip
    if arguments.json:
        print_json(report)
    else:
        rows = [(name, str(value)) for name, value in asdict(facts).items()]
        rows += [("python", platform.python_version()), ("engine cache", f"{cache} ({free_mib} MiB free)")]
        rows += [(name, found or "not installed") for name, found in (required | optional).items()]
        rows.append(("shipped models", ", ".join(shipped_names()) or "none"))
        print_table("sage-edge doctor", ("what", "found"), rows)
        for note in notes:
            print(f"note: {note}")
        for problem in problems:
            print(f"PROBLEM: {problem}")
    return 1 if problems else 0
