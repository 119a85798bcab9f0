"""`sage-edge eval`: accuracy and steps on a dataset."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sage_edge.cli.output import Subparsers, bar, command, positive, print_json, print_table, stages
from sage_edge.dataset import load_dataset
from sage_edge.errors import InputError
from sage_edge.evaluate import acceptance_score, certified_scores, collect, oracle, per_step, score
from sage_edge.irp.halting import HELP
from sage_edge.models import open_session

POLICIES = ("full", "learned", "patience:1", "patience:2", "entropy:0.05", "entropy:0.01", "slope:0.01,3")


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "eval", run, "accuracy and steps on a dataset, per step and per policy",
        "DIR is a dataset as the original HRM code writes it (dataset.json, SET__inputs.npy, SET__labels.npy, ...), one\n"
        "split or the folder above its `test`. Every example runs to the last step once; the policies are replayed\n"
        "over the recorded signals. Thresholds given here are not calibrated: they only show what they do;\n"
        "those of the engine's certificate are shown as `certified`.\n\n"
        f"halting policies: {HELP}",
    )  # fmt: skip
    parser.add_argument("engine", metavar="ENGINE")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True)
    parser.add_argument("--halt", metavar="POLICY", action="append", help="score this policy; may be repeated")
    parser.add_argument("--by", metavar="NAME", help="break the learned rule down by an attribute (SET__NAME.npy)")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N examples")
    parser.add_argument("--max-steps", metavar="N", type=positive, help="run this many steps (default: the model's)")


def settled_line(settled: dict[str, Any]) -> str:
    """What the certificate's acceptance did on these examples, as a sentence."""
    right = "none" if settled["settled_exact"] is None else f"{settled['settled_exact']:.4f} right"
    return (
        f"settled answers ({settled['policy']}): {settled['coverage']:.1%} of {settled['examples']}, {right} "
        f"(promised {settled['rate']:g})"
    )


def run(arguments: argparse.Namespace) -> int:
    data = load_dataset(arguments.data).first(arguments.limit)
    if arguments.by and arguments.by not in data.attributes:
        known = ", ".join(data.attributes) or "none"
        raise InputError(f"--by {arguments.by}: no such attribute in {data.path} (there: {known})")
    with stages("build") as progress:
        opened = open_session(arguments.engine, progress=progress)
    with opened as session, bar("examples", len(data)) as progress_bar:
        policies = arguments.halt or POLICIES
        for policy in policies:
            session.policy(policy)  # before anything runs
        traces = collect(session, data, arguments.max_steps or session.runner.model.max_steps, progress_bar)
    own = session.certificate
    certified = certified_scores(traces, own) if own and traces.steps == own.max_steps and not arguments.halt else []
    expanded = [own.expand(policy) if own else policy for policy in policies]
    scores = [*(score(traces, policy) for policy in expanded), *certified, oracle(traces)]
    settled = acceptance_score(traces, own) if own and certified else None
    groups = []
    if arguments.by:
        values = data.attributes[arguments.by]
        groups = [
            {"value": int(v), "examples": int((values == v).sum()), **asdict(score(traces, "learned", values == v))}
            for v in np.unique(values)
        ]
    if arguments.json:
        print_json({"data": str(data.path), "examples": len(data), "steps": per_step(traces),
                    "policies": [asdict(s) for s in scores], "settled": settled, "by": groups})  # fmt: skip
        return 0
    print_table(f"{data.path}: {len(data)} examples, step by step",
                ("step", "exact", "tokens", "entropy", "stopped by learned"),
                [(r["step"], f"{r['exact_accuracy']:.4f}", f"{r['token_accuracy']:.4f}", f"{r['mean_entropy']:.4f}",
                  f"{r['stopped_by_learned']:.4f}") for r in per_step(traces)])  # fmt: skip
    print_table("halting policies", ("policy", "exact", "± s.e.", "tokens", "mean steps"),
                [(s.policy, f"{s.exact_accuracy:.4f}", f"{s.standard_error:.4f}", f"{s.token_accuracy:.4f}",
                  f"{s.mean_steps:.2f}") for s in scores])  # fmt: skip
    if settled:
        print(settled_line(settled))
    if groups:
        print_table(f"learned rule by {arguments.by}", (arguments.by, "examples", "exact", "mean steps"),
                    [(g["value"], g["examples"], f"{g['exact_accuracy']:.4f}", f"{g['mean_steps']:.2f}")
                     for g in groups])  # fmt: skip
    return 0
