"""The workflows and the configuration of cibuildwheel: their schemas, and that what they name is there.

They run elsewhere. What is checked here is what can be known without running them.
"""

import re
import subprocess
import sys

import pytest

from cases.pages import ROOT

yaml = pytest.importorskip("yaml")

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def jobs():
    found = ((path, *pair) for path in FILES for pair in yaml.safe_load(path.read_text())["jobs"].items())
    return [pytest.param(job, id=f"{path.stem}-{name}") for path, name, job in found]


def named(path):
    return path.name


@pytest.mark.parametrize("path", FILES, ids=named)
def test_schema(path):
    """The schema that editors use, from the package check-jsonschema; it needs no network."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_finds_errors(tmp_path):
    pytest.importorskip("check_jsonschema")
    broken = tmp_path / "ci.yml"
    broken.write_text(FILES[0].read_text().replace("runs-on:", "runs-in:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(broken)]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.parametrize("path", FILES, ids=named)
def test_workflow(path):
    flow = yaml.safe_load(path.read_text())
    assert set(flow) <= {"name", True, "permissions", "concurrency", "env", "jobs"}  # True: what YAML 1.1 makes of `on`
    assert flow[True] and flow["permissions"] == {"contents": "read"}


def test_what_there_is():
    names = {name for path in FILES for name in yaml.safe_load(path.read_text())["jobs"]}
    assert names == {"lint", "tests", "docs", "plain", "compiled"}


@pytest.mark.parametrize("job", jobs())
def test_job(job):
    assert job["runs-on"].startswith("ubuntu-") and 0 < job["timeout-minutes"] <= 240
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step
            assert all(isinstance(value, (str, int, bool)) for value in step.get("with", {}).values())
        for target in re.findall(r"\bmake ((?:[\w-]+ ?)+)(?= |$)", step.get("run", "")):
            assert all(re.search(rf"^{word}:", MAKEFILE, re.M) for word in target.split()), target
        for variable in re.findall(r"\bmake .*?([A-Z]+)=", step.get("run", "")):
            assert f"$({variable})" in MAKEFILE


@pytest.mark.parametrize("job", jobs())
def test_expressions_name_what_is_there(job):
    matrix = job.get("strategy", {}).get("matrix", {})
    keys = set(matrix) | {key for row in matrix.get("include", ()) for key in row}
    found = re.findall(r"\$\{\{ (.+?) \}\}", yaml.safe_dump(job, width=1000))
    known = r"matrix\.(\w+)|vars\.TORCH_\w+|vars\[matrix\.(\w+)\]"
    for expression in found:
        match = re.fullmatch(known, expression)
        assert match and {name for name in match.groups() if name} <= keys, expression


def test_paths_that_start_the_wheels_exist():
    (path,) = (path for path in FILES if path.stem == "wheels")
    for pattern in yaml.safe_load(path.read_text())[True]["pull_request"]["paths"]:
        assert any(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize("path", [*FILES, ROOT / "pyproject.toml"], ids=named)
def test_no_index_is_named(path):
    """Which index torch comes from is a variable of the repository."""
    assert not re.search(r"https?://|index-url|pypi\.org|pytorch\.org", path.read_text())


# ---- pyproject.toml


def test_pyproject_schema():
    """Of setuptools and of cibuildwheel, which bring theirs."""
    api = pytest.importorskip("validate_pyproject.api")
    tomllib = pytest.importorskip("tomllib")
    plugins = pytest.importorskip("validate_pyproject.plugins")
    pytest.importorskip("cibuildwheel")
    found = plugins.list_from_entry_points()
    assert {"setuptools", "cibuildwheel"} <= {plugin.tool for plugin in found if hasattr(plugin, "tool")}
    given = tomllib.loads(PYPROJECT)
    validate = api.Validator(plugins=found)
    validate(given)
    given["tool"]["cibuildwheel"]["tests"] = "pytest"
    with pytest.raises(ValueError, match="tests"):
        validate(given)


def test_cibuildwheel_reads_its_configuration():
    pytest.importorskip("cibuildwheel")
    command = [
        sys.executable,
        "-m",
        "cibuildwheel",
        "--platform",
        "linux",
        "--archs",
        "x86_64",
        "--print-build-identifiers",
    ]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"cp{minor}-manylinux_x86_64" for minor in (310, 311, 312, 313)]


def test_one_version_of_torch():
    (torch_of_make,) = re.findall(r"^TORCH  \?= (torch==[\d.]+)$", MAKEFILE, re.M)
    assert re.findall(r'"(torch==[\d.]+)"', PYPROJECT) == [torch_of_make]


def test_named_files_exist():
    section = PYPROJECT.split("[tool.cibuildwheel]")[1].split("[tool.pytest")[0]
    named = re.findall(r"\b(?:wheels|python_tests)/[\w/]+\.py", section)
    assert len(named) == 4 and all((ROOT / name).is_file() for name in named)
