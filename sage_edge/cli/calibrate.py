"""`sage-edge calibrate`: a halting policy with a promise, and its certificate."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sage_edge.cli.output import Subparsers, bar, command, positive, print_json, print_table, stages
from sage_edge.dataset import Dataset, load_dataset
from sage_edge.errors import GateError, InputError
from sage_edge.irp.families import FAMILIES


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "calibrate", run, "choose a halting policy whose loss is certified on held-out data",
        "Run the calibration data DIR once to the last step, then choose the policy with the fewest mean steps whose mean\n"
        "loss against full steps is at most --max-loss with probability --confidence (Learn then Test, arXiv 2110.01052).\n"
        "The data must not have been used for training and must be drawn like what the model will meet.\n\n"
        "The result is certificate.yaml in the engine's folder, bound to this engine and this data; `run` and `bench` use it\n"
        "by default. With --accept RATE it also says which answers are unsettled: the others are right at that rate.\n\n"
        "  sage-edge calibrate sudoku9 --data export/sudoku9/data/calibration --max-loss 0.01\n"
        "  sage-edge calibrate sudoku9 --data DIR --accept 0.99      with abstention\n"
        "  sage-edge calibrate sudoku9 --verify                      is the certificate whole, and of this engine?\n"
        "  sage-edge calibrate sudoku9 --verify --data DIR           ... and of this data? derive it again (exit 1 if not)\n\n"
        "losses: exact_lost (full steps right, halted answer wrong), absolute (halted answer wrong), tokens_lost (fall of\n"
        "token accuracy), or MODULE:NAME of a function (traces, steps taken) -> values in 0..1, or of a calibrate.Loss.",
    )  # fmt: skip
    parser.add_argument("engine", metavar="ENGINE")
    parser.add_argument("--data", metavar="DIR", type=Path, help="calibration data (a dataset folder)")
    parser.add_argument("--max-loss", metavar="L", type=float, help="mean loss allowed (default 0.01)")
    parser.add_argument("--confidence", metavar="P", type=float, help="probability of the promise (default 0.95)")
    parser.add_argument("--policy", choices=(*FAMILIES, "all"), action="append",
                        help="family to search; may be repeated (default: all)")  # fmt: skip
    parser.add_argument("--loss", metavar="NAME", help="what is counted as loss (default exact_lost)")
    parser.add_argument("--accept", metavar="RATE", type=float, help="accepted answers are right at least at this rate")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N examples")
    parser.add_argument("--threads", type=positive, help="CPU threads")
    parser.add_argument("--verify", action="store_true", help="check the engine's certificate instead of making one")


def find_loss(name: str) -> Any:
    """A loss by name, or MODULE:NAME of a plugin's own. Raises InputError."""
    from sage_edge.irp.calibrate import LOSSES, Loss

    if name in LOSSES:
        return LOSSES[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise InputError(f"loss {name!r}: not known; use {', '.join(LOSSES)} or MODULE:NAME")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"loss {name!r}: cannot be imported: {error}") from error
    if isinstance(found, Loss):
        return Loss(name, found.of, found.binary)
    if not callable(found):
        raise InputError(f"loss {name!r}: expected a function or a Loss, found {type(found).__name__}")
    return Loss(name, found)


def run(arguments: argparse.Namespace) -> int:
    return _verify(arguments) if arguments.verify else _calibrate(arguments)


def _calibrate(arguments: argparse.Namespace) -> int:
    from sage_edge.irp.calibrate import Promise
    from sage_edge.irp.certificate import save_certificate
    from sage_edge.models import engine_of

    if arguments.data is None:
        raise InputError("--data DIR is needed: held-out examples to calibrate on")
    promise = Promise(
        0.01 if arguments.max_loss is None else arguments.max_loss,
        0.95 if arguments.confidence is None else arguments.confidence,
        find_loss(arguments.loss or "exact_lost"),
        arguments.accept,
    )
    chosen = arguments.policy or ["all"]
    families = FAMILIES if "all" in chosen else tuple(dict.fromkeys(chosen))
    data = load_dataset(arguments.data).first(arguments.limit)
    with stages("build") as progress:
        folder = engine_of(arguments.engine, progress=progress)
    certificate = _derive(folder, data, promise, families, arguments.threads)
    path = save_certificate(folder, certificate)
    if arguments.json:
        print_json({"certificate": str(path), **asdict(certificate)})
    else:
        show(certificate)
        print(f"certificate: {path}")
    return 0


def _derive(folder: Path, data: Dataset, promise: Any, families: tuple[str, ...], threads: int | None) -> Any:
    from sage_edge.engines.build import open_engine
    from sage_edge.evaluate import certificate_for
    from sage_edge.runtime import Session

    with Session(open_engine(folder, threads)) as session, bar("examples", len(data)) as progress_bar:
        return certificate_for(session, folder, data, promise, families, progress_bar)


def _verify(arguments: argparse.Namespace) -> int:
    from sage_edge.irp.calibrate import Promise
    from sage_edge.irp.certificate import load_certificate, require_data
    from sage_edge.models import engine_of

    asked = ("max_loss", "confidence", "policy", "loss", "accept", "limit")
    if given := [name for name in asked if getattr(arguments, name) is not None]:
        raise InputError(
            f"--verify: the certificate says itself what it promises; leave --{given[0].replace('_', '-')} out"
        )
    folder = engine_of(arguments.engine)
    certificate = load_certificate(folder)
    if certificate is None:
        raise InputError(f"{folder}: has no certificate; `sage-edge calibrate {arguments.engine} --data DIR` makes one")
    checked = "whole, and of this engine"
    if arguments.data:
        data = load_dataset(arguments.data).first(certificate.items_total)
        require_data(certificate, data.sha256, str(data.path))
        accept = certificate.acceptance.rate if certificate.acceptance else None
        promise = Promise(certificate.max_loss, certificate.confidence, find_loss(certificate.loss), accept)
        again = _derive(folder, data, promise, certificate.searched, arguments.threads)
        for name in ("chosen", "acceptance", "families"):
            if getattr(again, name) != getattr(certificate, name):
                raise GateError(
                    f"{folder}: this engine and this data now give another {name}: {getattr(again, name)}; the certificate "
                    f"says {getattr(certificate, name)}; calibrate again"
                )
        checked += ", and what this data gives"
    if arguments.json:
        print_json({"engine": str(folder), "verified": checked, **asdict(certificate)})
    else:
        show(certificate)
        print(f"ok: the certificate is {checked}")
    return 0


def show(certificate: Any) -> None:
    """The certificate as sentences and a table."""
    chosen, full = certificate.chosen, certificate.max_steps
    print(f"promise: mean {certificate.loss} at most {certificate.max_loss:g} with confidence {certificate.confidence:g}, "
          f"from {certificate.items_total} items")  # fmt: skip
    rows = [("chosen", chosen), *((f"{family.family} alone", family) for family in certificate.families)]
    print_table("", ("search", "policy", "items", "lost", "bound", "mean steps", "of full"),
                [(name, c.policy, c.items, f"{c.loss_sum:g}", f"{c.bound:.4f}", f"{c.mean_steps:.2f}",
                  f"{c.mean_steps / full:.0%}") for name, c in rows])  # fmt: skip
    if (accept := certificate.acceptance) is not None:
        print(f"settled answers ({accept.policy}): right at a rate of at least {1 - accept.error_bound:.4f} (asked "
              f"{accept.rate:g}); {accept.wrong} of {accept.accepted} wrong; coverage {accept.coverage:.1%} of "
              f"{accept.items} items")  # fmt: skip
