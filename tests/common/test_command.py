"""How commands end, and what they do not show."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from helpers import small_model

from tarflow.cli.quiet import hush_libraries
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


def test_remarks_of_libraries_that_nobody_can_act_on_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DATASETS_VERBOSITY", "critical")
    remarks = [
        "`torch_dtype` is deprecated! Use `dtype` instead!",
        "The `local_dir_use_symlinks` argument is deprecated and ignored in `hf_hub_download`.",
        "Removed shared tensor {'shared.weight'} while saving.",
    ]
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hush_libraries()
        for text in (*remarks, "the disk is nearly full"):
            warnings.warn(text, stacklevel=1)
            logging.getLogger("accelerate.utils.other").warning(text)
        small_model().to(torch.float32)  # of which Diffusers says that no module should be kept in float32
    assert [str(one.message) for one in caught] == caplog.messages == ["the disk is nearly full"]
