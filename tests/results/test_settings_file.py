from __future__ import annotations

import pytest

from mmad_cli.errors import DataError, UsageError
from mmad_cli.results.compare import Tolerances, parse_tolerances
from mmad_cli.results.settings_file import find_settings, read_tolerances


def test_tolerances_of_a_file(tmp_path):
    file = tmp_path / "mmad.toml"
    file.write_text("[tolerance]\ndefault = 0.01\ni_auroc = 0\naupro_30 = 1\n")
    assert read_tolerances(file) == Tolerances(0.01, {"i_auroc": 0.0, "aupro_30": 1.0})


@pytest.mark.parametrize("text", ["", "[tolerance]\n", "# nothing\n"])
def test_a_file_that_says_nothing_changes_nothing(tmp_path, text):
    file = tmp_path / "mmad.toml"
    file.write_text(text)
    assert read_tolerances(file) == Tolerances()


def test_the_nearest_file_above_is_found(tmp_path):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert find_settings(below) in (None, find_settings(tmp_path.parent))
    (tmp_path / "mmad.toml").touch()
    assert find_settings(below) == tmp_path / "mmad.toml"
    (tmp_path / "a" / "mmad.toml").touch()
    assert find_settings(below) == tmp_path / "a" / "mmad.toml"
    (below / "mmad.toml").mkdir()
    assert find_settings(below) == tmp_path / "a" / "mmad.toml", "a folder is no file"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[tolerence]\n", "unknown key 'tolerence'; did you mean 'tolerance'"),
        (b"[tolerance]\ni_aurok = 0.1\n", r"\[tolerance\]: unknown key 'i_aurok'; did you mean .*'i_auroc'"),
        (b"[tolerance]\ndefualt = 0.1\n", "did you mean 'default'"),
        (b"tolerance = 0.1\n", "should be a table"),
        (b"[tolerance]\ni_auroc = '0.1'\n", "tolerance.i_auroc: should be a number between 0 and 1, got '0.1'"),
        (b"[tolerance]\ni_auroc = 2\n", "got 2"),
        (b"[tolerance]\ni_auroc = -0.1\n", "got -0.1"),
        (b"[tolerance]\ni_auroc = nan\n", "got nan"),
        (b"[tolerance]\ni_auroc = true\n", "got True"),
        (b"[tolerance\n", "not valid TOML"),
        (b"\xff", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path, content, words):
    file = tmp_path / "mmad.toml"
    file.write_bytes(content)
    with pytest.raises((DataError, UsageError), match=words) as caught:
        read_tolerances(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.toml: cannot be read: No such file"):
        read_tolerances(tmp_path / "nowhere.toml")


def test_options_go_before_the_file():
    base = Tolerances(0.01, {"i_auroc": 0.02, "p_auroc": 0.03})
    assert parse_tolerances([], base=base) == base
    assert parse_tolerances(["i_auroc=0.5"], base=base) == Tolerances(0.01, {"i_auroc": 0.5, "p_auroc": 0.03})
    assert parse_tolerances(["0.1"], base=base) == Tolerances(0.1, {})
    assert parse_tolerances(["i_auroc=0.5", "0.1"], base=base) == Tolerances(0.1, {"i_auroc": 0.5})
