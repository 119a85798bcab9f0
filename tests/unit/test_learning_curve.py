from pathlib import Path

import pytest

from sage_edge.export.learning_curve import keep_until, plot

LOG = "step,loss,accuracy\n20,1.5,\n40,1.0,0.25\n60,0.5,\n80,0.25,0.75\n"


def test_steps_after_the_saved_state_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(LOG)
    keep_until(log, 40)
    assert log.read_text() == "step,loss,accuracy\n20,1.5,\n40,1.0,0.25\n"
    keep_until(tmp_path / "lost.csv", 40)
    assert not (tmp_path / "lost.csv").exists()


def test_the_picture_is_drawn_from_the_log_and_an_unknown_column_is_an_error(tmp_path: Path) -> None:
    log, image = tmp_path / "log.csv", tmp_path / "curve.png"
    log.write_text(LOG)
    plot(log, image, {"accuracy": "full steps"}, "loss")
    assert image.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError, match="lost"):
        plot(log, image, {"accuracy": "full steps"}, "lost")
