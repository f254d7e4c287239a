"""What an installed copy offers: version, public names, and the files that are not Python."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sb3_mbpo

ROOT = Path(__file__).parent.parent


def test_version_is_the_same_everywhere() -> None:
    version = (ROOT / "sb3_mbpo" / "version.txt").read_text(encoding="utf-8").strip()
    assert sb3_mbpo.__version__ == version
    assert metadata.version("sb3_mbpo") == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_core_needs_little() -> None:
    lines = metadata.requires("sb3_mbpo") or []
    required = {Requirement(line).name for line in lines if "extra ==" not in line}
    assert required == {"stable-baselines3", "torch", "gymnasium", "typing_extensions"}


def test_public_names_exist() -> None:
    assert "MBPO" in sb3_mbpo.__all__
    assert len(set(sb3_mbpo.__all__)) == len(sb3_mbpo.__all__)
    for name in sb3_mbpo.__all__:
        # The variants of sb3-contrib are loaded when asked for.
        if name in vars(sb3_mbpo) or util.find_spec("sb3_contrib") is not None:
            assert getattr(sb3_mbpo, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        sb3_mbpo.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_pages_show_the_same_first_program() -> None:
    """Its names are public, and what it ends with is a page to look at."""
    pages = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "guide" / "quickstart.md"]
    programs = {re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0] for page in pages}
    assert len(programs) == 1
    imports = ast.parse(programs.pop()).body[0]
    assert isinstance(imports, ast.ImportFrom) and imports.module == "sb3_mbpo"
    names = [alias.name for alias in imports.names]
    assert names == ["DHMBPO", "write_report"]
    # The report needs matplotlib.
    assert util.find_spec("matplotlib") is None or all(callable(getattr(sb3_mbpo, name)) for name in names)


def test_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"sb3_mbpo/{file.name}" for file in (ROOT / "sb3_mbpo").glob("*.py")}
    expected |= {f"sb3_mbpo/hyperparams/{file.name}" for file in (ROOT / "hyperparams").glob("*.yml")}
    expected |= {"sb3_mbpo/py.typed", "sb3_mbpo/version.txt", "sb3_mbpo/hyperparams/mbpo.yml"}
    assert expected <= names
    # Nothing else may land in the users' site-packages.
    assert {name.split("/")[0] for name in names} == {"sb3_mbpo", f"sb3_mbpo-{sb3_mbpo.__version__}.dist-info"}


@pytest.mark.expensive
def test_installed_copy_learns_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    code = "import sb3_mbpo; print(sb3_mbpo.__file__); sb3_mbpo.MBPO('MlpPolicy', 'Pendulum-v1', learning_starts=20).learn(25)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.splitlines()[0]).is_relative_to(site)


# What other tests are skipped without.
OPTIONAL = (
    "Box2D dm_control matplotlib minari mujoco onnx onnxruntime onnxscript pandas pygame ray rich rl_zoo3 rliable sb3_contrib "
    "seaborn shimmy submitit tensorboard"
).split()


def test_the_locked_environment_skips_nothing() -> None:
    """A test that is skipped for want of a package shall not hide in the environment that has them all."""
    missing = [name for name in OPTIONAL if util.find_spec(name) is None]
    assert not missing or Path(sys.prefix).resolve() != ROOT.resolve() / ".venv"


def test_install_lines_work_from_a_checkout() -> None:
    """There is no released package: `pip install sb3_mbpo[...]` would find nothing."""
    files = [
        ROOT / "README.md",
        *(ROOT / "hyperparams").glob("*.yml"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "docs/guide/slurm.py",
    ]
    files += (ROOT / "sb3_mbpo").rglob("*.py")
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert re.findall(r"pip install\s+sb3_mbpo\b", text) == []
    named = {extra for group in re.findall(r'pip install\s+"\.\[([^]{]*)\]"', text) for extra in group.split(",")}
    assert {"extra", "zoo", "compare", "plots", "contrib"} <= named - {"..."} <= extras_of_setup()


def extras_of_setup() -> set[str]:
    """Of the checkout: an installed copy may be older."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    extras = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
    )
    return set(ast.literal_eval(extras))
