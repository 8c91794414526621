"""What says which version this is, how to cite it and what hooks run agrees with the package itself."""

import re
import tomllib

import yaml
from conftest import ROOT

import xformers_lab
from xformers_lab.doctor import backends

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "xformers_lab/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", xformers_lab.__version__)


def test_the_newest_version_of_the_changelog_is_this_one():
    heads = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0][0] == xformers_lab.__version__
    assert heads == sorted(heads, key=lambda head: [int(part) for part in head[0].split(".")], reverse=True)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert heads[0] == (citation["version"], citation["date-released"])


def test_the_citation_has_what_its_format_asks_for():
    """https://github.com/citation-file-format: these keys are required, and a key that it does not know is refused."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(citation[key] for key in ("message", "title", "authors"))
    known = "cff-version message type title abstract authors version date-released license keywords"
    assert set(citation) <= set(known.split())
    assert citation["license"] == PROJECT["project"]["license"]


def test_hooks_run_the_ruff_of_the_constraints():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for pins in ("newest", "old"):
        pinned = (ROOT / "constraints" / f"{pins}.txt").read_text()
        assert hooks["rev"].removeprefix("v") in re.findall(r"^ruff==(.*)$", pinned, re.M), pins
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


def test_forms_ask_for_what_the_command_prints():
    """Each form reads as the forge wants it: a name, a description, and fields with ids of their own."""
    forms = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config"]
    assert {file.stem for file in forms} == {"bug", "mechanism", "claim"}
    for file in forms:
        form = yaml.safe_load(file.read_text())
        ids = [field["id"] for field in form["body"]]
        assert form["name"] and form["description"] and len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in form["body"])
        assert file.stem == "mechanism" or "xlab doctor --json" in [f["attributes"]["label"] for f in form["body"]]


def test_the_doctor_names_extras_that_there_are():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {*backends.CUDA, "tpu"} <= extras.keys()
    for extra in (*backends.CUDA, "tpu"):
        assert backends.install(extra) == f"pip install 'xformers_lab[{extra}]'"
