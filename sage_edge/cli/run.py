"""`sage-edge run`: arrays in, arrays out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from sage_edge.arrays import read_npz, write_npz
from sage_edge.cli.output import Subparsers, bar, command, positive, print_json, stages
from sage_edge.files import write_atomic
from sage_edge.irp.halting import HELP
from sage_edge.models import open_session
from sage_edge.runtime import Session
from sage_edge.specs import Array


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "run", run, "answer the requests in an .npz file, or run a pipeline of ports and plugins",
        "Read arrays named as the model's observation (HRM: `inputs` int [n, seq_len], optional `puzzle_identifiers`\n"
        "int [n]) and write `prediction` [n, ...], `steps` int32 [n], `halt_reason` [n]\n"
        "and `settled` bool [n]: False where the certificate's acceptance is not sure enough of the prediction.\n"
        "With --all-steps every step runs and `logits_K`, `q_halt_K`, `q_continue_K` (K = 1..N) are written as well;\n"
        "prediction, steps, halt_reason and settled remain those of the halting policy.\n\n"
        "With --pipeline, mailbox ports are joined to plugins (docs/irp.md), until interrupted or --answers or --seconds:\n\n"
        "  sage-edge run --pipeline pipeline.yaml --telemetry run.mcap --record run.jsonl\n\n"
        f"halting policies: {HELP};\n`certified` is the policy of the engine's certificate (see `sage-edge calibrate`).",
    )  # fmt: skip
    parser.add_argument("engine", metavar="ENGINE", nargs="?")
    parser.add_argument("--inputs", metavar="NPZ", type=Path)
    parser.add_argument("--outputs", metavar="NPZ", type=Path)
    parser.add_argument(
        "--halt", metavar="POLICY", help="default: `certified` when the engine has a certificate, else `learned`"
    )
    parser.add_argument(
        "--max-steps", metavar="N", type=positive, help="never more steps than this (default: the model's)"
    )
    parser.add_argument(
        "--trace", metavar="JSONL", type=Path, help="write the signals after each step, a line a request"
    )
    parser.add_argument("--all-steps", action="store_true")
    parser.add_argument("--threads", type=positive, help="CPU threads")
    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument("--pipeline", metavar="YAML", type=Path, help="run this pipeline instead of an engine")
    pipeline.add_argument("--answers", metavar="N", type=positive, help="stop after so many answers")
    pipeline.add_argument("--seconds", metavar="S", type=float, help="stop after so long")
    pipeline.add_argument("--record", metavar="JSONL", type=Path, help="record the run for `sage-edge trace replay`")
    pipeline.add_argument(
        "--telemetry", metavar="FILE", type=Path, help="a record a step and an answer: .jsonl or .mcap"
    )
    pipeline.add_argument(
        "--plugins", metavar="DIR", type=Path, action="append", default=[], help="look for plugins there"
    )
    parser.set_defaults(wrong_use=parser.error)


ENGINE_ONLY = ("engine", "inputs", "outputs", "halt", "max_steps", "trace", "threads")
PIPELINE_ONLY = ("answers", "seconds", "record", "telemetry", "plugins")


def run(arguments: argparse.Namespace) -> int:
    kind, other = ("--pipeline", ENGINE_ONLY) if arguments.pipeline else ("ENGINE", PIPELINE_ONLY)
    if foreign := [
        name for name in (*other, "all_steps") if getattr(arguments, name) and (arguments.pipeline or name in other)
    ]:
        arguments.wrong_use(f"{foreign[0].replace('_', '-')} does not go with {kind}")
    if arguments.pipeline:
        from sage_edge.cli.run_pipeline import run_with_pipeline

        return run_with_pipeline(arguments)
    if not (arguments.engine and arguments.inputs and arguments.outputs):
        arguments.wrong_use("ENGINE, --inputs and --outputs are needed, or --pipeline")
    observation = read_npz(arguments.inputs)
    with stages("build") as progress:
        opened = open_session(arguments.engine, arguments.threads, progress)
    with opened as session:
        runner = session.runner
        checked = runner.model.validate_observation(observation, str(arguments.inputs))
        session.policy(arguments.halt, arguments.max_steps)  # before anything runs
        count = len(next(iter(checked.values())))
        with bar("requests", count) as progress_bar:
            answers = session.infer(checked, arguments.halt, arguments.max_steps, progress_bar)
        outputs: dict[str, Array] = {
            "prediction": np.stack([a.prediction for a in answers]),
            "steps": np.array([a.steps for a in answers], np.int32),
            "halt_reason": np.array([a.reason for a in answers]),
            "settled": np.array([a.settled for a in answers]),
        }
        if arguments.all_steps:
            outputs |= _all_steps(session, checked, arguments.max_steps or runner.model.max_steps)
    write_npz(arguments.outputs, outputs)
    if arguments.trace:
        lines = (
            json.dumps({"request": i, "steps": a.steps, "halt_reason": a.reason, "settled": a.settled,
                        "milliseconds": round(a.milliseconds, 3),
                        "signals": {name: [float(v) for v in a.trace[:, k]] for k, name in enumerate(a.signals)}})
            for i, a in enumerate(answers)
        )  # fmt: skip
        write_atomic(arguments.trace, "".join(line + "\n" for line in lines))
    mean = float(np.mean(outputs["steps"]))
    unsettled = int((~outputs["settled"]).sum())
    if arguments.json:
        reasons = {str(k): int(v) for k, v in zip(*np.unique(outputs["halt_reason"], return_counts=True), strict=True)}
        print_json({"requests": count, "mean_steps": mean, "halt_reasons": reasons, "unsettled": unsettled,
                    "outputs": str(arguments.outputs)})  # fmt: skip
    else:
        note = f", {unsettled} unsettled" if unsettled else ""
        print(f"{arguments.outputs}: {count} answers, {mean:.2f} steps on average{note}")
    return 0


def _all_steps(session: Session, observation: dict[str, Array], steps: int) -> dict[str, Array]:
    """logits_K, q_halt_K and q_continue_K for K = 1..steps; only those that the model gives."""
    model = session.runner.model
    parts: dict[str, list[Array]] = {}
    for _, arrays in session.all_steps(observation, steps):
        for k in range(steps):
            if "logits" in arrays:
                parts.setdefault(f"logits_{k + 1}", []).append(arrays["logits"][k])
            for name in ("q_halt", "q_continue"):
                if name in model.signals:
                    parts.setdefault(f"{name}_{k + 1}", []).append(arrays["signals"][k][:, model.signal(name)])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
