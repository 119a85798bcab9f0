"""The report of `sage-edge bench --suite irp` as tables."""

from __future__ import annotations

from typing import Any

from sage_edge.cli.output import print_table


def show_irp(report: dict[str, Any]) -> None:
    for plugin in report.get("plugins", []):
        _show_plugin(plugin)
    for skipped in report.get("skipped", []):
        print(f"{skipped['plugin']}: not measured: {skipped['why']}")
    if scheduler := report.get("scheduler"):
        _show_simulated(scheduler["simulated"])
        real = scheduler["real"]
        print_table(
            f"sharing a device, real engines, {real['seconds']:g} s of arrivals, once: noisy on a busy machine",
            ("rule", "loss", "against round-robin", "misses", "never began", "latest, ms", "deciding, ms CPU"),
            [(r["rule"], f"{r['loss']:.4f}", _change(r["loss_change"]), f"{r['misses']:.1%}", f"{r['never_began']:.1%}",
              f"{r['late_ms']:.1f}", f"{r['deciding_ms']:.3f}") for r in real["rows"]],
        )  # fmt: skip


def _show_plugin(plugin: dict[str, Any]) -> None:
    rows = []
    for row in plugin["halting"]:
        low, high = row["speed_up_interval"]
        loss = "–" if row["quality_loss"] is None else f"{row['quality_loss']:+.2%}"
        span = "" if row["quality_loss"] is None else " [{:+.2%}, {:+.2%}]".format(*row["quality_loss_interval"])
        latency = row.get("latency")
        rows.append((row["halting"], row["policy"] or "", f"{row['mean_quality']:.4f}", loss + span, f"{row['mean_steps']:.2f}",
                     f"{row['speed_up']:.2f}× [{low:.2f}, {high:.2f}]",
                     f"{latency['p50_ms']:.1f}" if latency else None,
                     f"{row['time_speed_up']:.2f}×" if latency else None))  # fmt: skip
    print_table(
        f"{plugin['plugin']} {plugin['version']}: {plugin['quality']}, {plugin['test_examples']} held-out examples, "
        f"{plugin['max_steps']} steps",
        ("halting", "policy", "quality", "quality lost [95 %]", "mean steps", "fewer steps [95 %]", "answer, ms", "faster"), rows,
    )  # fmt: skip
    if plugin["not_certified"]:
        print(f"not certified: {plugin['not_certified']}")
    if plugin["groups"]:
        print_table("by group, certified halting", ("group", "from", "to", "examples", "mean steps", "quality", "at full steps"),
                    [(g["group"], f"{g['from']:g}", f"{g['to']:g}", g["examples"], f"{g['mean_steps']:.2f}",
                      f"{g['mean_quality']:.4f}", f"{g['full_quality']:.4f}") for g in plugin["groups"]])  # fmt: skip


def _show_simulated(simulated: dict[str, Any]) -> None:
    costs = ", ".join(f"{p['plugin']} {p['step_ms']:g} ms a step, {p['policy']}" for p in simulated["plugins"])
    print_table(
        f"sharing a device, simulated clock, {simulated['seeds']} × {simulated['seconds']:g} s, profile {simulated['profile']} "
        f"({costs})",
        ("load", "rule", "loss", "against round-robin [95 %]", "energy loss", "misses", "never began", "worst plugin"),
        [(f"{r['load']:g}", r["rule"], f"{r['loss']:.4f}",
          f"{_change(r.get('loss_change'))} [{_change(r.get('loss_change_low'))}, {_change(r.get('loss_change_high'))}]",
          f"{r['energy_loss']:.4f}", f"{r['misses']:.1%}", f"{r['never_began']:.1%}", f"{r['worst_plugin_loss']:.4f}")
         for r in simulated["rows"]],
    )  # fmt: skip


def _change(value: float | None) -> str:
    return "–" if value is None else f"{value:+.0%}"
