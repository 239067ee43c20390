"""What would be published: a source distribution that is the whole repository, a wheel with the package alone, and
metadata that a package index can show. Both are built once, without isolation and without the network."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest

from lion_dist import __version__, deepspeed

ROOT = Path(__file__).parents[2]
NAME = f"lion_dist-{__version__}"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def build(kind: str, source: Path, out: Path) -> Path:
    program = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return built


class Built(NamedTuple):
    """The files of the repository by name, the source distribution, the same unpacked, and the wheel made from that, as
    pip makes it."""

    files: set[str]
    sdist: Path
    unpacked: Path
    wheel: Path


def repository() -> set[str]:
    """The files that git tracks; in an unpacked source distribution, those that it lists."""
    sources = ROOT / "lion_dist.egg-info" / "SOURCES.txt"
    if (ROOT / ".git").exists():
        git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if git.returncode:
            pytest.skip(f"git does not list the files: {git.stderr}")
        names = git.stdout.split("\0")
    elif (ROOT / "PKG-INFO").exists():
        names = [name for name in sources.read_text().splitlines() if not name.startswith("lion_dist.egg-info/")]
    else:
        pytest.skip("neither a git repository nor an unpacked source distribution")
    return {name for name in names if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("package")
    copy, out = folder / "copy", folder / "dist"
    files = repository()
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    sdist = build("sdist", copy, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return Built(files, sdist, folder / NAME, build("wheel", folder / NAME, out))


def test_the_source_distribution_is_the_repository(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("lion_dist.egg-info/")}
    assert names - made == built.files - made
    for script in ("launch/train", "launch/test", "launch/setup"):
        assert (built.unpacked / script).stat().st_mode & 0o111, f"{script} cannot be run"


def test_the_wheel_holds_the_package_alone(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    assert names == {name for name in built.files if name.startswith("lion_dist/")}
    assert {"lion_dist/py.typed", "lion_dist/plan/__main__.py"} <= names


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))


def test_the_metadata_says_what_an_index_shows(built: Built) -> None:
    found = metadata(built.wheel)
    for key in ("Summary", "Author", "Keywords", "License-Expression", "Requires-Python", "Project-URL"):
        assert found[key], key
    classifiers = found.get_all("Classifier", [])
    assert any(c.startswith("Programming Language :: Python :: 3.") for c in classifiers)
    assert not any(c.startswith("License") for c in classifiers), "an SPDX expression stands in their place"


def test_the_description_has_no_link_that_only_works_in_a_clone(built: Built) -> None:
    found = metadata(built.wheel)
    assert found["Description-Content-Type"] == "text/markdown"
    text, readme = str(found.get_payload()), (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert all(re.match(r"https?://", link) for link in links)
    for path in re.findall(r"\]\((?!\w+:)([^)#]+)", readme):
        assert path in text or path.endswith(".png"), f"the description does not name {path}"
        assert (built.unpacked / path).exists(), f"the source distribution has no {path}"
    assert FENCE.findall(text) == FENCE.findall(readme), "code is as in the README"


def test_the_tools_of_the_index_accept_both(built: Built) -> None:
    pytest.importorskip("twine")
    pytest.importorskip("check_wheel_contents")
    both = [str(built.sdist), str(built.wheel)]
    for command in (["twine", "check", "--strict", *both], ["check_wheel_contents", both[1]]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("module", "package"), [("huggingface", "accelerate"), ("lightning", "lightning")])
def test_what_an_integration_lacks_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"lion_dist.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"lion_dist.{module} needs .*: pip install {package}"):
        importlib.import_module(f"lion_dist.{module}")


def test_extras_that_errors_name_exist(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [path.read_text() for path in (ROOT / "lion_dist").rglob("*.py")]
    named = {extra for text in sources for extra in re.findall(r"lion_dist\[(\w+)\]", text)}
    assert "deepspeed" in named <= set(metadata(built.wheel).get_all("Provides-Extra", []))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'lion_dist\[deepspeed\]'"):
        deepspeed.register()
