"""How commands end."""

from __future__ import annotations

import pytest

from tarflow.common.command import ending, sentence


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\n  b"), "a b"),
        (ValueError("Caught ValueError in DataLoader worker\nTraceback\nValueError: the cause"), "the cause"),
        (PermissionError(13, "Permission denied", "x.json"), "Permission denied: 'x.json'"),
        (OSError("cannot load"), "cannot load"),
        (FloatingPointError(), "FloatingPointError"),
    ],
)
def test_errors_are_one_sentence(error: Exception, text: str, capsys: pytest.CaptureFixture) -> None:
    assert sentence(error) == text
    with pytest.raises(SystemExit) as done, ending():
        raise error
    assert done.value.code == 2
    assert capsys.readouterr().err == f"error: {text}\n"


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done, ending():
        raise KeyboardInterrupt
    assert done.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("error", [ValueError("the cause"), KeyboardInterrupt()])
def test_debugging_shows_tracebacks(
    error: BaseException, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARFLOW_DEBUG", "1")
    with pytest.raises(SystemExit), ending():
        raise error
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "test_debugging_shows_tracebacks" in printed
    assert printed.splitlines()[-1] in ("error: the cause", "stopped")


def test_faults_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(KeyError), ending():
        raise KeyError("x")
