"""The package as its users get it: built, checked, installed in an environment of its own outside the repository, run.

Nothing is fetched. The new environment reads dependencies from this one's; the package itself it has from the wheel.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

import xformers_lab
from xformers_lab.cli.experiment import DEMO

NEEDED = ("build", "twine", "hatchling")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
]
DATA = ("*.toml", "*.jinja", "*.css", "*.js", "*.txt", "py.typed")
SDIST = (
    "pyproject.toml",
    "constraints/newest.txt",
    "constraints/old.txt",
    ".ci/python",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "Makefile",
)
TINY = '''"""Does it?"""

from xformers_lab.experiment import Claim, at_most, compare

CLAIM = Claim(says="It does.", source="-", literature="-", doubt="-", minutes=1, seeds=1)
STUDIES = {
    "only": compare("task=copy seq_len=16 dim=16 layers=1 heads=2 batch=4 steps=3 lr=1e-3 eval_batches=1")
}


def judge(tables):
    return [at_most("accuracy", tables["only"].metric(), 1)]
'''


def done(*command: object, folder: pathlib.Path, **variables: str) -> str:
    """Run a command without this checkout on its path; -> what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    ran = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> pathlib.Path:
    """A folder with the sdist, and with the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> pathlib.Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The folder of commands of an environment that has the wheel, and for the rest what this one has."""
    folder = tmp_path_factory.mktemp("venv")
    done(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    done(*pip, "install", "-q", "--no-deps", "--no-index", wheel, folder=folder)
    site = done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip()
    # These folders alone: the checkout, which this environment has for editing, is no such folder.
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (pathlib.Path(site) / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return folder / "bin"


def in_wheel(wheel: pathlib.Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def package_files() -> set[str]:
    files = (file for file in (ROOT / "xformers_lab").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(ROOT)) for file in files}


def test_both_pass_the_index_s_checks(built):
    files = sorted(built.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"] or [file.suffix for file in files] == [".gz", ".whl"]
    assert all(f"xformers_lab-{xformers_lab.__version__}" in file.name for file in files)
    assert done(sys.executable, "-m", "twine", "check", "--strict", *files, folder=built).count("PASSED") == 2


def test_the_wheel_has_every_file_of_the_package_the_claims_and_no_other(wheel):
    files = in_wheel(wheel)
    claims = (file for file in (ROOT / "experiments").rglob("*.py") if "__pycache__" not in file.parts)
    assert files == package_files() | {str("xformers_lab" / file.relative_to(ROOT)) for file in claims}
    for pattern in DATA:
        assert any(pathlib.PurePath(file).match(pattern) for file in files), pattern


def test_the_sdist_has_what_its_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names and set(SDIST) <= names
    for folder in ("tests", "docs", "experiments", "benchmarks"):
        files = {str(f.relative_to(ROOT)) for f in (ROOT / folder).rglob("*.py") if "__pycache__" not in f.parts}
        assert files <= names, folder


def test_the_installed_package_is_the_wheel_s(installed, tmp_path):
    where = done(installed / "python", "-c", "import xformers_lab; print(xformers_lab.__file__)", folder=tmp_path)
    assert pathlib.Path(where.strip()).is_relative_to(installed.parent)
    version = done(installed / "xlab", "--version", folder=tmp_path)
    assert version == f"xformers_lab {xformers_lab.__version__}\n"


def test_its_shelves_and_skeletons_are_there(installed, tmp_path):
    shelves = json.loads(done(installed / "xlab", "list", "--json", folder=tmp_path))
    assert shelves == json.loads(done(sys.executable, "-m", "xformers_lab", "list", "--json", folder=ROOT))
    done(installed / "xlab", "new", "attention", "mine", folder=tmp_path)
    assert (tmp_path / "mine.py").is_file()


def test_its_claims_are_there(installed, tmp_path):
    listed = json.loads(done(installed / "xlab", "experiment", "list", "--json", folder=tmp_path))
    assert {claim["name"] for claim in listed} == {file.stem for file in (ROOT / "experiments").glob("*.py")}


def test_its_demo_is_there(installed, tmp_path):
    assert "--report" in done(installed / "xlab", "demo", "--help", folder=tmp_path)
    shown = done(installed / "xlab", "experiment", "show", *DEMO, folder=tmp_path)
    assert all(f"{name}: " in shown for name in DEMO)


def test_an_experiment_and_a_comparison_end_with_their_reports(installed, tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    done(installed / "xlab", "experiment", "run", "tiny.py", "--pilot", "--report", "tiny.html", folder=tmp_path)
    assert "<style" in (tmp_path / "tiny.html").read_text()
    page = (tmp_path / "runs" / "experiments" / "tiny" / "only" / "report.html").read_text()
    assert "<style" in page and "<script" in page
