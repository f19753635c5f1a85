"""`dataset.toml`: settings of a layout, and own scans in a layout of one's own."""

import shutil

import numpy as np
import pytest

import mmad_cli
from mmad_cli.datasets import open_dataset
from mmad_cli.datasets.check import check_dataset
from mmad_cli.datasets.eyecandies import EyecandiesDataset
from mmad_cli.errors import DataError, UsageError

OWN = """
layout = "files"
good = "ok"
[train]
rgb = "{category}/training/{stem}_colour.png"
xyz = "{category}/training/{stem}_points.tiff"
[test]
rgb = "{category}/test/{defect}/{stem}_colour.png"
xyz = "{category}/test/{defect}/{stem}_points.tiff"
gt = "{category}/masks/{defect}_{stem}.png"
"""


@pytest.fixture
def own(tiny_dataset, tmp_path):
    """The scans of one category of the tiny dataset under other names."""
    root = tmp_path / "own"
    block = tiny_dataset / "block"
    for path in sorted(block.rglob("*.*")):
        split, defect, role, name = path.relative_to(block).parts
        stem, defect = name.split(".")[0], "ok" if defect == "good" else defect
        if split == "validation" or (role == "gt" and defect == "ok"):
            continue
        place = root / "lid" / ("training" if split == "train" else f"test/{defect}")
        target = place / f"{stem}_{'colour.png' if role == 'rgb' else 'points.tiff'}"
        if role == "gt":
            target = root / "lid" / "masks" / f"{defect}_{stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / "dataset.toml").write_text(OWN)
    return root


def test_own_layout(own, tiny_dataset):
    dataset = open_dataset(own)
    assert (dataset.name, dataset.layout, dataset.root) == ("folder", "files", own)
    assert dataset.categories() == ["lid"]
    refs = dataset.samples("lid")
    expected = [ref for ref in open_dataset(tiny_dataset).samples("block") if ref.split != "validation"]
    assert [ref.id for ref in refs] == [ref.id for ref in expected]
    reader = open_dataset(tiny_dataset)
    for mine, theirs in zip(refs, expected, strict=True):
        one, other = dataset.read(mine), reader.read(theirs)
        for name in ("rgb", "xyz", "mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_own_layout_through_the_stages(own, tmp_path):
    assert check_dataset(own / "dataset.toml").usable
    outcomes = mmad_cli.preprocess(own, protocol="none", store=tmp_path / "store")
    assert [outcome.ok for outcome in outcomes] == [True]


def test_root_elsewhere_and_no_category(own, tmp_path):
    file = tmp_path / "lids.toml"
    file.write_text('root = "own/lid"\n' + OWN.replace("{category}/", ""))
    dataset = open_dataset(file)
    assert dataset.categories() == ["lid"]
    assert len(dataset.samples("lid")) == 8
    file.write_text('root = "own/lid"\ncategory = "cover"\n' + OWN.replace("{category}/", ""))
    assert open_dataset(file).categories() == ["cover"]


def test_what_does_not_pair(own):
    (own / "lid" / "masks" / "dent_000.png").unlink()
    (own / "lid" / "training" / "001_colour.png").unlink()
    (own / "lid" / "test" / "ok" / "001_points.tiff").unlink()
    report = check_dataset(own)
    messages = [finding.message for finding in report.findings if finding.level == "error"]
    assert [message.partition(" is missing")[0] for message in messages] == [
        "lid/training/001_colour.png",
        "lid/masks/dent_000.png",
        "lid/test/ok/001_points.tiff",
    ]
    with pytest.raises(DataError, match="001_colour"):
        open_dataset(own).samples("lid")


def test_unknown_category(own):
    with pytest.raises(DataError, match="no category cover; known: lid"):
        open_dataset(own).samples("cover")


def test_names_with_wildcards(own):
    (own / "lid").rename(own / "lid [a]*")
    assert len(open_dataset(own).samples("lid [a]*")) == 8


def test_settings_of_eyecandies(candies, tmp_path):
    file = tmp_path / "light.toml"
    file.write_text('layout = "eyecandies"\nroot = "Eyecandies"\nlight = 0\n')
    assert open_dataset(file) == EyecandiesDataset(candies, light=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layout = ", "cannot be read as TOML"),
        ("light = 1", "has no layout"),
        ('layout = "eyecandys"', "did you mean 'eyecandies'"),
        ('layout = "eyecandies"\nligth = 1', "did you mean 'light'"),
        ('layout = "eyecandies"\nlight = "1"', "light should be a whole number"),
        ('layout = "eyecandies"\nlight = true', "light should be a whole number"),
        ('layout = "eyecandies"\nlight = 9', "light 9: Eyecandies has the images 0 to 5"),
        ('layout = "eyecandies"\nroot = "absent"', "which is no folder"),
        ('layout = "polyurethane"', "has not the layout polyurethane"),
        ('layout = "files"', "patterns for train and test are needed"),
        (OWN.replace("{stem}_colour", "{stm}_colour", 1), "did you mean 'stem'"),
        (OWN.replace("{stem}_colour", "colour", 1), "should contain {stem}"),
        (OWN.replace("gt =", "mask ="), "unknown kind of file 'mask'"),
        (OWN.replace("gt =", "# gt ="), "has no pattern for gt"),
        (OWN.replace("xyz =", "# xyz =", 1), "has no pattern for xyz"),
        (OWN.replace("{category}/training/{stem}_points", "training/{stem}_points"), "lacks {category}"),
        (OWN.replace('rgb = "', 'rgb = "../', 1), "a path below the root"),
    ],
)
def test_faults(candies, tmp_path, text, words):
    file = candies / "dataset.toml"
    file.write_text(text)
    with pytest.raises((DataError, UsageError)) as caught:
        open_dataset(candies)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert caught.value.exit_code == 2
