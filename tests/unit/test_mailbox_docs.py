"""What docs/mailbox.md shows runs as it stands."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

from sage_edge.mailbox import load_ports

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "mailbox.md").read_text()


def test_the_programs_run(mailbox_memory: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    out = io.StringIO()
    with redirect_stdout(out):
        for program in programs:
            exec(compile(program, "docs/mailbox.md", "exec"), {"__name__": "__main__"})
    assert out.getvalue() == "7.0 0.9000076295109484 1 (480, 640, 3)\n3 3 9\n"


def test_the_table_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "ports.yaml").write_text(text)
    assert set(load_ports(tmp_path / "ports.yaml").ports) == {"camera", "salience"}


def test_the_number_of_seeded_bugs_is_right() -> None:
    from tests.mailbox_model.test_models import SEEDED

    assert f"{sum(map(len, SEEDED.values()))} seeded bugs" in PAGE
