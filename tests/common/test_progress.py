"""Progress bars: on a terminal they move, elsewhere they are a line now and then."""

from __future__ import annotations

import io
import sys

import pytest
from helpers import small_model
from tqdm.auto import tqdm

from tarflow.common import progress as module
from tarflow.common.progress import INTERVAL, LineProgress, progress_bar, write_line
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of a log of so many steps of so many seconds, each with new numbers shown."""
    now = [1000.0]
    monkeypatch.setattr(LineProgress, "monitor_interval", 0)
    log = io.StringIO()
    bar = progress_bar(total=steps, unit="step", file=log)
    bar._time = lambda: now[0]
    bar.start_t = bar.last_print_t = bar._shown = now[0]
    for step in range(steps):
        now[0] += seconds
        bar.update()
        bar.set_postfix({"loss": f"{step}"})
        with tqdm.external_write_mode(file=log):
            pass
    bar.close()
    assert "\r" not in log.getvalue()
    return log.getvalue().splitlines()


def test_a_log_gets_a_line_every_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(1000, 0.42, monkeypatch)  # seven minutes
    assert len(lines) in (13, 14)
    assert "loss=" in lines[-1] and "/1000" in lines[-1]
    assert sum(map(len, lines)) < 3000
    assert run(10, 1.0, monkeypatch) == []
    assert len(run(3, 100.0, monkeypatch)) == 3


def test_a_terminal_gets_the_bar_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal()
    bar = progress_bar(range(3), file=file)
    assert type(bar) is tqdm
    assert list(bar) == [0, 1, 2]
    assert "3/3" in file.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress_bar(range(3)), LineProgress)
    monkeypatch.setattr(module, "is_notebook", lambda: True)
    assert not isinstance(progress_bar(range(3), disable=True), LineProgress)


def test_lines_between(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in progress_bar(range(3)):
        write_line("a line")
    captured = capsys.readouterr()
    assert captured.out == "a line\n" * 3
    assert captured.err == ""
    assert INTERVAL == 30


def test_pipelines_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TARFlowPipeline(flow=small_model())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(pipe.progress_bar(total=4), LineProgress)
    assert list(pipe.progress_bar(range(2))) == [0, 1]
    pipe.set_progress_bar_config(disable=True)
    assert pipe.progress_bar(total=4).disable
    with pytest.raises(ValueError, match="total"):
        pipe.progress_bar()
    monkeypatch.setattr(sys, "stderr", Terminal())
    pipe.set_progress_bar_config()
    assert type(pipe.progress_bar(total=4)) is tqdm
