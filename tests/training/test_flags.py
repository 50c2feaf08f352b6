"""Flags that commands share, and errors told in a sentence."""

import argparse

import pytest

from train.flags import add_flag, make_parser, mosaic_size, run_command


@pytest.mark.parametrize("text", ["63", "-5", "many"])
def test_a_mosaic_that_foci_could_fill_is_refused(text: str) -> None:
    assert mosaic_size("64") == 64
    with pytest.raises(argparse.ArgumentTypeError, match=f"64 patches or more, got {text}"):
        mosaic_size(text)


def test_what_was_wrong_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("The slide is gone.")

    with pytest.raises(SystemExit) as end:
        run_command(fail)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: The slide is gone.\n"


def test_a_command_changes_what_it_must_of_a_shared_flag() -> None:
    parser = make_parser("Words.")
    add_flag(parser, "--n", nargs="+", default=[128])
    add_flag(parser, "--seed")
    assert vars(parser.parse_args(["--n", "64", "99"])) == {"n": [64, 99], "seed": 0}
    assert parser.parse_args([]).n == [128]
