import ast
import base64
import builtins
import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.save_util as save_util
import torch as th
from architecture import FILES, imported_modules, module_of
from hostile import Payload
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from tiny import FAST, equal_agents

from sb3_mbpo import MBPO, MBTD3
from sb3_mbpo.saving.safe_loading import MEMBER
from sb3_mbpo.variants import MBTQC, MBCrossQ

OBS = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


def equal(a, b):
    """Of states: tensors, numbers and what holds them."""
    if isinstance(a, th.Tensor):
        return th.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        *((MBPO, {}), (MBTD3, {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))}), (MBTQC, {}), (MBCrossQ, {})),
        *((MBPO, {"use_sde": True}), (MBPO, {"ent_coef": 0.2}), (MBPO, {"real_ratio": 1.0}), (MBPO, {"fast_update": False})),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)[:20]),
)
def test_the_same_agent(tmp_path, cls, kwargs):
    agent = cls("MlpPolicy", "Pendulum-v1", **FAST, **kwargs).learn(60)
    agent.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), safe=True)
    assert type(loaded) is cls and equal(loaded.get_parameters(), agent.get_parameters())
    for name in agent._get_torch_save_params()[1]:
        assert th.equal(getattr(loaded, name), getattr(agent, name))
    assert np.array_equal(loaded.predict(OBS, deterministic=True)[0], agent.predict(OBS, deterministic=True)[0])
    assert loaded.num_timesteps == 60 and loaded._n_updates == agent._n_updates
    assert loaded.termination == agent.termination and loaded.dynamics_fitted_at == agent.dynamics_fitted_at
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    loaded.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    loaded.learn(40, reset_num_timesteps=False)
    assert loaded.lifetime_timesteps == 100 and loaded.replay_buffer.size() == 100
    # What was loaded safely can be saved and loaded safely again.
    loaded.save(tmp_path / "again")
    assert equal(cls.load(tmp_path / "again", safe=True).get_parameters(), loaded.get_parameters())


def test_it_goes_on_as_when_loaded_by_sb3(tmp_path):
    """To the last bit."""
    agent = MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(60)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer.pt", imagined=True)
    loaded = []
    for safe in (False, True):
        loaded.append(MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), safe=safe))
        loaded[-1].load_replay_buffer(tmp_path / "buffer.pt")
        loaded[-1].learn(40, reset_num_timesteps=False)
    assert equal_agents(*loaded)
    assert equal(loaded[0].dynamics.state_dict(), loaded[1].dynamics.state_dict())


@pytest.fixture(scope="module")
def agent():
    return MBPO("MlpPolicy", "Pendulum-v1", **FAST).learn(40)


@pytest.fixture(scope="module")
def members(agent):
    file = io.BytesIO()
    agent.save(file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


def test_places(tmp_path, agent):
    agent.save(tmp_path / "agent")
    with open(tmp_path / "agent.zip", "rb") as file:
        for path in (tmp_path / "agent", str(tmp_path / "agent.zip"), file, io.BytesIO((tmp_path / "agent.zip").read_bytes())):
            assert equal_agents(MBPO.load(path, safe=True), agent)
    with pytest.raises(FileNotFoundError):
        MBPO.load(tmp_path / "nowhere", safe=True)


def test_other_arguments(members):
    loaded = MBPO.load(zipped(members), env=make_vec_env("Pendulum-v1", 2), safe=True, real_ratio=0.5, device="cpu")
    assert loaded.real_ratio == 0.5 and loaded.n_envs == 2
    with pytest.raises(ValueError, match="did you mean 'real_ratio'"):
        MBPO.load(zipped(members), safe=True, real_ration=0.5)
    with pytest.raises(ValueError, match="custom_objects are for pickles"):
        MBPO.load(zipped(members), safe=True, custom_objects={"lr_schedule": 1})
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        MBPO.load(zipped(members), env=gym.make("InvertedPendulum-v5"), safe=True)
    with pytest.raises(ValueError, match=r"policy: .* must be .* of shape"):
        MBPO.load(zipped(members), safe=True, policy_kwargs={"net_arch": [9]})


def falls(obs, actions, next_obs):
    return next_obs[:, 0] > 5


def test_functions_come_from_the_caller(tmp_path):
    agent = MBPO("MlpPolicy", "Pendulum-v1", learning_rate=lambda progress: 1e-3, termination_fn=falls, **FAST)
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"agent: learning_rate was .*<lambda>.*pass your own: learning_rate="):
        MBPO.load(tmp_path / "agent", safe=True)
    with pytest.raises(ValueError, match=r"termination_fn was test_safe_loading.falls.*pass your own: termination_fn="):
        MBPO.load(tmp_path / "agent", safe=True, learning_rate=1e-3)
    loaded = MBPO.load(tmp_path / "agent", safe=True, learning_rate=1e-3, termination_fn=falls)
    assert loaded.termination is falls


def test_sb3_reads_the_zip_as_ever(tmp_path, agent):
    agent.save(tmp_path / "agent")
    data, parameters, variables = save_util.load_from_zip_file(tmp_path / "agent")
    assert MEMBER not in data and set(parameters) == set(agent.get_parameters()) and set(variables) == {"log_ent_coef"}
    other = MBPO("MlpPolicy", "Pendulum-v1", **{**FAST, "seed": 3})
    other.set_parameters(tmp_path / "agent")
    assert equal(other.get_parameters(), agent.get_parameters())
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        assert archive.namelist()[-1] == MEMBER and archive.testzip() is None
        text = archive.read(MEMBER)
    assert json.loads(text, parse_constant=pytest.fail)["class"] == "MBPO"


# ---------------------------------------------------------------------- what acts when it is unpickled


def hostile_data(members, key, payload):
    data = json.loads(members["data"])
    data[key] = {":type:": "x", ":serialized:": base64.b64encode(cloudpickle.dumps(payload)).decode()}
    return json.dumps(data).encode()


def torch_saved(value):
    file = io.BytesIO()
    th.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("function", [os.system, exec, eval])
@pytest.mark.parametrize("key", ["lr_schedule", "an_extra_key"])
def test_a_pickle_in_data_is_not_opened(tmp_path, members, key, function):
    """Stable-Baselines3's loader runs it; so the payload is a real one."""
    file = zipped({**members, "data": hostile_data(members, key, Payload(tmp_path / "marker", function))})
    MBPO.load(file, safe=True)
    assert not (tmp_path / "marker").exists()
    file.seek(0)
    try:
        MBPO.load(file)
    except (AssertionError, AttributeError, TypeError):
        pass  # what comes of it is no schedule
    assert (tmp_path / "marker").exists()


def test_data_need_not_be_there_or_make_sense(members):
    for data in ({}, {"data": b"\xff"}):
        rest = {name: content for name, content in members.items() if name != "data"}
        assert MBPO.load(zipped({**rest, **data}), safe=True).num_timesteps == 40


@pytest.mark.parametrize("function", [os.system, exec, eval])
@pytest.mark.parametrize("name", ["policy", "dynamics", "pytorch_variables", "ent_coef_optimizer", "extra"])
@pytest.mark.parametrize("form", [torch_saved, pickle.dumps], ids=["torch", "pickle"])
def test_a_pickle_among_the_tensors(tmp_path, members, name, function, form):
    file = zipped({**members, f"{name}.pth": form({"actor.mu.bias": Payload(tmp_path / "marker", function)})})
    with pytest.raises(ValueError, match=rf"load: .*: {name}.pth: it (holds something else than tensors|is not a zip file)"):
        MBPO.load(file, safe=True)
    assert not (tmp_path / "marker").exists()


def test_nothing_is_unpickled(tmp_path, monkeypatch, agent):
    """Every way that Python, cloudpickle and Stable-Baselines3 have is closed, and imports by a name as well."""
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    env = gym.make("Pendulum-v1")
    MBPO.load(tmp_path / "agent", safe=True)  # so that what PyTorch imports on first use is there

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in (
        *((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler"), (cloudpickle, "loads")),
        *((save_util, "json_to_data"), (save_util, "load_from_zip_file"), (save_util, "load_from_pkl"), (builtins, "eval")),
        *((th.serialization, "_legacy_load"), ("importlib.import_module", None)),
    ):
        if name is None:
            monkeypatch.setattr(module, forbidden)
        else:
            monkeypatch.setattr(module, name, forbidden)
    loaded = MBPO.load(tmp_path / "agent", env=env, safe=True)
    loaded.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert loaded.replay_buffer.size() == 40
    with pytest.raises(AssertionError, match="unpickled"):
        MBPO.load(tmp_path / "agent")


# Never to be named on the way from a file to an agent.
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "eval", "exec", "compile", "__import__"}
FORBIDDEN |= {"json_to_data", "load_from_zip_file", "load_from_pkl", "allow_pickle", "add_safe_globals", "safe_globals"}


def forbidden_names(source):
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name.partition(".")[0] for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        names += [part for part in (getattr(node, "module", None) or "").split(".")]
        names += [getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None)]
        found += [name for name in names if name in FORBIDDEN]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("th.load", "torch.load", "load"):
            safe = [keyword for keyword in node.keywords if keyword.arg == "weights_only"]
            if not safe or ast.unparse(safe[0].value) != "True":
                found.append(ast.unparse(node))
    return found


def test_no_pickle_can_be_reached():
    """In the modules that read a file, and in all of ours that they or an algorithm import."""
    sources = {module_of(file): file.read_text(encoding="utf-8") for file in FILES}
    reached, waiting = set(), ["saving.safe_loading", "saving.buffer_files", "mbpo", "variants"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            # The two processes of one agent send each other pickles; no file gets there.
            waiting += [name for name in imported_modules(sources[module], module) if not name.startswith("background.")]
    read = ("description", "serialization", "checked_tensors", "safe_files", "save_load", "agent_state")
    resumed = ("resume_callback", "checkpoint", "training_state", "callback_state", "env_state")
    assert {"validation.rules", *(f"saving.{name}" for name in read)} <= reached
    assert {f"checkpoints.{name}" for name in resumed} <= reached
    assert {module: forbidden_names(sources[module]) for module in reached if forbidden_names(sources[module])} == {}
    # The one import by a name serves what the caller passes; a description's text never gets there, see test_description.py.
    assert [module for module in reached if "import_module" in sources[module]] == ["validation.rules"]
    for name in ("serialization", "safe_loading", "checked_tensors", "agent_state"):
        assert "resolve" not in sources[f"saving.{name}"]


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import cloudpickle as x",
            "eval('1')",
            "f = exec",
            "x.load_from_pkl(f)",
        ),
        *("th.load(f)", "th.load(f, weights_only=False)", "torch.load(f, weights_only=safe)", "np.load(f, allow_pickle=True)"),
        *("from stable_baselines3.common.save_util import json_to_data", "from torch.serialization import add_safe_globals"),
    ],
)
def test_the_check_sees(source):
    assert forbidden_names(source)


# ---------------------------------------------------------------------- files that do not fit


def test_another_algorithms_zip(tmp_path, agent):
    SAC("MlpPolicy", "Pendulum-v1", learning_starts=5).save(tmp_path / "sac")
    TD3("MlpPolicy", "Pendulum-v1", learning_starts=5).save(tmp_path / "td3")
    MBTD3("MlpPolicy", "Pendulum-v1", **FAST).save(tmp_path / "mbtd3")
    for name in ("sac", "td3"):
        with pytest.raises(ValueError, match=rf"{name}: it holds no dynamics.*set_parameters\(path, exact_match=False\)"):
            MBPO.load(tmp_path / name, safe=True)
    with pytest.raises(ValueError, match="mbtd3: it holds an agent of class 'MBTD3', not MBPO"):
        MBPO.load(tmp_path / "mbtd3", safe=True)


def test_a_zip_of_an_earlier_version(members):
    file = zipped({name: content for name, content in members.items() if name != MEMBER})
    with pytest.raises(ValueError, match=r"no sb3_mbpo.json.*Save it again with this version, or load it with safe=False if"):
        MBPO.load(file, safe=True)


@pytest.mark.parametrize("name", ["policy.pth", "dynamics.pth", "dynamics.optimizer.pth", "pytorch_variables.pth"])
def test_a_missing_member(members, name):
    file = zipped({other: content for other, content in members.items() if other != name})
    with pytest.raises(ValueError, match=rf"the file lacks \['{name[:-4]}'\]"):
        MBPO.load(file, safe=True)


@pytest.mark.parametrize("name", ["extra", "../policy.pth", "/tmp/x.pth", "policy.pth/x", "a.pkl", "tensors.pth", "env.pth"])
def test_an_extra_member(members, name):
    with pytest.raises(ValueError, match=r"not a member of|unknown keys"):
        MBPO.load(zipped({**members, name: members["policy.pth"]}), safe=True)


def test_compressed(members):
    with pytest.raises(ValueError, match="compressed"):
        MBPO.load(zipped(members, zipfile.ZIP_DEFLATED), safe=True)


def changed(members, change):
    description = json.loads(members[MEMBER])
    change(description)
    return zipped({**members, MEMBER: json.dumps(description).encode()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["arguments"].update(termination_fn="os.system"), "termination_fn='os.system'"),
        (lambda d: d["arguments"].update(learning_rate=float("nan")), "sb3_mbpo.json: its JSON has NaN"),
        (lambda d: d.update(more=1), r"unknown keys \['more'\]"),
        (lambda d: d["arguments"]["policy_kwargs"].update(net_arch=[10**5, 10**5]), "larger than the tensors in the file"),
        (lambda d: d["arguments"]["policy_kwargs"].update(net_arch=[1] * 50_000), "larger than the tensors in the file"),
        (lambda d: d["arguments"]["policy_kwargs"].update(n_critics=1000), "larger than the tensors in the file"),
        (lambda d: d["arguments"]["policy_kwargs"].update(net_arch=[10**17]), "net_arch=.* must be"),
        (
            lambda d: d["arguments"]["dynamics_kwargs"].update(n_members=1000, net_arch=[200] * 4),
            "larger than the tensors in the file",
        ),
        (lambda d: d["arguments"]["policy_kwargs"].update(net_arch=[9]), r"policy: .* must be .* of shape"),
        (lambda d: d["arguments"].update(ent_coef=0.1), "unknown keys"),
    ],
)
def test_hostile_descriptions(members, change, message):
    with pytest.raises(ValueError, match=rf"^load: .*{message}"):
        MBPO.load(changed(members, change), safe=True)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\x80\x04N.", b"[" * 10_000, b'{"format": 1, "format": 1}'])
def test_descriptions_that_are_none(members, text):
    with pytest.raises(ValueError, match=r"^load: .*(sb3_mbpo.json: its JSON|the description of the agent)"):
        MBPO.load(zipped({**members, MEMBER: text}), safe=True)


def test_cut_off_anywhere(members):
    content = zipped(members).getvalue()
    for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999):
        with pytest.raises(ValueError, match=r"^load: .*(cut off|damaged|not a member)"):
            MBPO.load(io.BytesIO(content[: int(share * len(content))]), safe=True)


def test_flipped_bits(members, agent):
    """A changed file is refused, or what was changed is nothing that is read."""
    draw = random.Random(0)
    content, refused = zipped(members).getvalue(), 0
    for _ in range(60):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            loaded = MBPO.load(io.BytesIO(flipped), safe=True)
        except ValueError:
            refused += 1
        else:
            assert equal(loaded.get_parameters(), agent.get_parameters())
    assert refused > 30


def test_the_error_names_the_file(tmp_path):
    path = Path(tmp_path / "agent.zip")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"load: .*agent\.zip: it is not a zip file"):
        MBPO.load(path, safe=True)
