"""The arguments that editors and type checkers see are those that the algorithms take."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import sb3_mbpo
from sb3_mbpo.model_based import constructor_arguments

ROOT = Path(__file__).parents[2]
TABLES = {
    "MBPO": "SACArguments",
    "DHMBPO": "SACArguments",
    "MBTD3": "TD3Arguments",
    "MBTQC": "TQCArguments",
    "MBCrossQ": "CrossQArguments",
}


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_typed_names_are_those_of_the_signature(name: str, table: str) -> None:
    if name in ("MBTQC", "MBCrossQ"):
        pytest.importorskip("sb3_contrib")
    cls = getattr(sb3_mbpo, name)
    own = {key for key, item in inspect.signature(cls.__init__).parameters.items() if item.kind is not item.VAR_KEYWORD}
    typed = get_type_hints(getattr(constructor_arguments, table))
    assert (own | typed.keys()) - {"self", "args"} == inspect.signature(cls).parameters.keys()
    assert not own & typed.keys()


WRONG = """
from sb3_mbpo import DHMBPO, MBPO, MBTD3
MBPO("MlpPolicy", "Pendulum-v1", learning_rat=1e-3)
DHMBPO("MlpPolicy", "Pendulum-v1", training_horizons=3)
MBTD3("MlpPolicy", "Pendulum-v1", ent_coef=0.1)
MBPO("MlpPolicy", "Pendulum-v1", real_ratio=[0.1])
MBPO("MlpPolicy", "Pendulum-v1", 1e-3, real_ratio=0.1, fast_update=True, policy_kwargs={"net_arch": [8]})
"""


@pytest.mark.expensive
def test_a_type_checker_refuses_what_is_no_argument(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--follow-imports=silent", str(tmp_path / "wrong.py")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert 'Unexpected keyword argument "learning_rat" for "MBPO"; did you mean "learning_rate"?' in said
    assert 'Unexpected keyword argument "training_horizons" for "DHMBPO"' in said
    assert 'Unexpected keyword argument "ent_coef" for "MBTD3"' in said
    assert 'Argument "real_ratio" to "MBPO" has incompatible type' in said
    assert "Found 4 errors" in said
