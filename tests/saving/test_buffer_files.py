import io
import json
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hostile import Payload
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from tiny import FAST

from sb3_mbpo import MBPO, MixedReplayBuffer
from sb3_mbpo.buffers import checks
from sb3_mbpo.buffers.replay_buffer import ROWS
from sb3_mbpo.saving.serialization import decode, encode
from sb3_mbpo.saving.whole_files import with_checksum


def make(env="Pendulum-v1", **kwargs):
    return MBPO("MlpPolicy", env, **{**FAST, **kwargs})


def same_rows(first, second):
    return all(th.equal(*pair) for pair in zip(first.real_transitions()[:5], second.real_transitions()[:5], strict=True))


@pytest.mark.parametrize("imagined", [False, True])
@pytest.mark.parametrize("name", ["buffer.pt", "buffer"])
def test_saved_and_loaded(tmp_path, imagined, name):
    agent, other = make().learn(60), make()
    agent.save_replay_buffer(tmp_path / name, imagined=imagined, safe=True)
    assert (tmp_path / "buffer.pt").stat().st_size < 15_000
    other.load_replay_buffer(tmp_path / name, safe=True)
    buffer = other.replay_buffer
    assert same_rows(agent.replay_buffer, buffer) and buffer.pos == 60 and not buffer.full
    assert len(buffer.model_buffer) == 30 * imagined
    if imagined:
        assert th.equal(buffer.model_buffer.contents()[0], agent.replay_buffer.model_buffer.contents()[0])
    other.learn(20)
    assert buffer.size() == 80


def test_the_suffix_is_enough(tmp_path):
    agent, other = make().learn(10), make()
    agent.save_replay_buffer(str(tmp_path / "buffer.pt"))
    for kwargs in ({}, {"safe": True}):
        other.replay_buffer.reset()
        other.load_replay_buffer(str(tmp_path / "buffer.pt"), **kwargs)
        assert same_rows(agent.replay_buffer, other.replay_buffer)


def test_open_files():
    agent, other, file = make().learn(10), make(), io.BytesIO()
    agent.save_replay_buffer(file, safe=True)
    for safe in (False, True):
        file.seek(0)
        other.load_replay_buffer(file, safe=safe)
        assert same_rows(agent.replay_buffer, other.replay_buffer) and not file.closed


@pytest.mark.parametrize("size", [25, 40, 100])
def test_a_full_buffer_in_one_of_another_size(tmp_path, size):
    agent, other = make(buffer_size=40).learn(60), make(buffer_size=size)
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    agent_rows, other_rows = (
        {tuple(row) for row in one.replay_buffer.real_transitions().next_observations.tolist()} for one in (agent, other)
    )
    assert len(other_rows) == min(size, 40) and other_rows <= agent_rows
    newest = (agent.replay_buffer.pos - 1) % 40
    assert tuple(agent.replay_buffer.next_observations[newest, 0].tolist()) in other_rows
    assert other.replay_buffer.buffer_size == size and other.learn(3).replay_buffer.size() == min(size, min(size, 40) + 3)


def test_several_envs_and_time_limits(tmp_path):
    agent = make(make_vec_env("Pendulum-v1", 2), gradient_steps=1).learn(420)
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    other = make(make_vec_env("Pendulum-v1", 2), gradient_steps=1)
    other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert agent.replay_buffer.timeouts.sum() == other.replay_buffer.timeouts.sum() == 2
    assert same_rows(agent.replay_buffer, other.replay_buffer)
    with pytest.raises(ValueError, match="this replay buffer has n_envs=2, but the agent's must have n_envs=1"):
        make().load_replay_buffer(tmp_path / "buffer.pt", safe=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "uint16", "int64"])
def test_observations_of_any_type(tmp_path, dtype):
    class Env(gym.Env):
        observation_space = spaces.Box(0, 100, (3,), dtype)
        action_space = spaces.Box(-1, 1, (1,))

        def reset(self, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    agent, other = make(Env(), real_ratio=1.0).learn(10), make(Env(), real_ratio=1.0)
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    other.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert np.array_equal(agent.replay_buffer.observations[:10], other.replay_buffer.observations[:10])
    assert other.replay_buffer.observations.dtype == dtype


def test_a_buffer_that_was_thrown_away(tmp_path):
    agent = make().learn(30)
    agent.save_replay_buffer(tmp_path / "buffer.pt", imagined=True)
    agent.replay_buffer = None
    with pytest.raises(FileNotFoundError):
        agent.load_replay_buffer(tmp_path / "other", safe=True)
    agent.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert isinstance(agent.replay_buffer, MixedReplayBuffer) and agent.replay_buffer.size() == 30


# ---------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("name", ["buffer.pkl", "buffer.pt", "buffer"])
def test_a_pickle_is_not_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    agent = make()
    with pytest.raises(ValueError, match=rf"load_replay_buffer: .*{name}: it is not a replay buffer saved with safe=True"):
        agent.load_replay_buffer(tmp_path / name, safe=True)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(ValueError, match=rf"load_replay_buffer: .*{name}: .*"):
        agent.load_replay_buffer(tmp_path / name)
    assert (tmp_path / "marker").exists() == (name != "buffer.pt"), "the payload is a real one"


@pytest.mark.parametrize("name", ["evil.pt", "evil.PT"])
def test_a_name_that_promises_tensors_is_enough(tmp_path, name):
    """Without ``safe`` too, by its name or as an open file: a pickle under such a name is refused unopened."""
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    agent = make()
    with open(tmp_path / name, "rb") as file:
        for path in (tmp_path / name, str(tmp_path / name), file):
            with pytest.raises(ValueError, match=r"load_replay_buffer: .*a pickle is not opened.*must not end in .pt then"):
                agent.load_replay_buffer(path)
    assert not (tmp_path / "marker").exists()
    # What the error says works.
    honest = make().learn(10)
    honest.save_replay_buffer(tmp_path / "honest")
    (tmp_path / "honest.pkl").rename(tmp_path / "honest.pt")
    with pytest.raises(ValueError, match="a pickle is not opened"):
        agent.load_replay_buffer(tmp_path / "honest.pt")
    (tmp_path / "honest.pt").rename(tmp_path / "honest.pkl")
    agent.load_replay_buffer(tmp_path / "honest.pkl")
    assert agent.replay_buffer.size() == 10


def test_an_open_file_with_such_a_name_gets_tensors(tmp_path):
    with open(tmp_path / "buffer.pt", "wb") as file:
        make().learn(10).save_replay_buffer(file)
    agent = make()
    agent.load_replay_buffer(tmp_path / "buffer.pt", safe=True)
    assert agent.replay_buffer.size() == 10


def test_an_honest_pickle_is_not_opened_either(tmp_path):
    agent = SAC("MlpPolicy", "Pendulum-v1").learn(10)
    agent.save_replay_buffer(tmp_path / "buffer.pkl")
    with pytest.raises(ValueError, match="Load it with safe=False if you trust its author"):
        make().load_replay_buffer(tmp_path / "buffer.pkl", safe=True)


@pytest.fixture(scope="module")
def content():
    file = io.BytesIO()
    make().learn(40).save_replay_buffer(file, imagined=True, safe=True)
    return file.getvalue()


def changed(content, change):
    """The file with other contents of the buffer."""
    value = th.load(io.BytesIO(content), weights_only=True)
    contents, tensors = decode(json.loads(value["content"]), value["tensors"]), {}
    contents = change(contents) or contents
    encoded = encode(contents, tensors)
    return file_of({**value, "content": json.dumps(encoded), "tensors": tensors})


def changed_file(content, change):
    """The file with other content of its own."""
    value = th.load(io.BytesIO(content), weights_only=True)
    return file_of(change(value) or value)


def file_of(value):
    file = io.BytesIO()
    with with_checksum(file) as summed:
        th.save(value, summed)
    file.seek(0)
    return file


def in_rows(name, array):
    return lambda value: value["rows"].update({name: array})


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [1, 2], "handle_timeout_termination must be"),
        (lambda v: v.update(more=1), "contents of a replay buffer must be"),
        (lambda v: {key: v[key] for key in v if key != "pos"}, "contents of a replay buffer must be"),
        (lambda v: v.update(handle_timeout_termination=1), "handle_timeout_termination must be"),
        (lambda v: v.update(rows=[]), "rows must be"),
        (lambda v: v.update(rows={key: v["rows"][key] for key in ROWS[1:]}), "rows must be"),
        (in_rows("rewards", np.zeros((41, 1), np.float32)), "rows must have the same number of steps"),
        (in_rows("rewards", np.zeros((40, 2), np.float32)), "this replay buffer has n_envs=2"),
        (in_rows("rewards", np.zeros((40, 1))), "rewards must be an array of float32"),
        (in_rows("rewards", [0.0] * 40), "rewards must be an array"),
        (in_rows("rewards", np.float32(0)), "rewards must be an array"),
        (in_rows("rewards", np.array(0, np.float32)), r"rewards has shape \(\)"),
        (in_rows("observations", np.zeros((40, 1, 4), np.float32)), "observations has shape"),
        (lambda v: v.update(pos=39), "do not fit 40 steps"),
        (lambda v: v.update(pos=-1), "do not fit"),
        (lambda v: v.update(pos=True), "do not fit"),
        (lambda v: v.update(full=True), "do not fit"),
        (lambda v: v.update(full=1), "must be true or false"),
        (lambda v: v.update(buffer_size=10), "do not fit"),
        (lambda v: v.update(imagined=th.zeros(30, 3)), "imagined must be"),
        (lambda v: v.update(imagined=th.tensor(0.0)), "imagined must be"),
        (lambda v: v.update(imagined=np.zeros((30, 9), np.float32)), "imagined must be"),
        (lambda v: v.update(refills=[31]), "refills must be"),
        (lambda v: v.update(refills=[-1, 31]), "refills must be"),
        (lambda v: v.update(refills=[10**12]), "refills must be"),
        (lambda v: v.update(refills=None), "refills must be"),
    ],
)
def test_hostile_buffers(content, change, message, safe):
    """Refused before anything of the agent's own buffer is touched."""
    agent = make().learn(5)
    before = agent.replay_buffer.observations[:5].copy()
    with pytest.raises(ValueError, match=f"^load_replay_buffer: .*{message}"):
        agent.load_replay_buffer(changed(content, change), safe=safe)
    assert agent.replay_buffer.size() == 5 and np.array_equal(agent.replay_buffer.observations[:5], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [1, 2], "not a replay buffer"),
        (lambda v: v.update(more=1), "not a replay buffer"),
        (lambda v: v.update(format=1), "format=1 is unknown; it must be 2"),
        (lambda v: v.update(content=3), "not a replay buffer"),
        (lambda v: v.update(content="[" * 10_000), "too many levels"),
        (lambda v: v.update(content="\ud800"), "JSON cannot be read"),
        (lambda v: v.update(content='{"$class": "torch.nn.ReLU"}'), "unknown kind"),
        (lambda v: v.update(tensors=[]), "not a replay buffer"),
        (lambda v: v.update(tensors={}), "no tensor"),
        (lambda v: v["tensors"].update({".rows.observations": th.zeros(1, 1, 1).expand(10**9, 1, 3)}), "plain tensor"),
        (lambda v: v["tensors"].update({".rows.observations": th.zeros(40, 1, 3).to_sparse()}), "plain tensor"),
        (lambda v: v["tensors"].update({".rows.observations": th.zeros(40, 1, 3).double()}), "has a tensor of float64"),
        (lambda v: v["tensors"].update({".rows.observations": th.zeros(40, 1, 2)}), "does not have 80 numbers"),
    ],
)
def test_hostile_files(content, change, message):
    with pytest.raises(ValueError, match=f"^load_replay_buffer: .*{message}"):
        make().load_replay_buffer(changed_file(content, change), safe=True)


def test_a_declared_size_costs_nothing(content):
    agent = make()
    agent.load_replay_buffer(changed(content, lambda v: v.update(buffer_size=10**15)), safe=True)
    assert agent.replay_buffer.size() == 40 and agent.replay_buffer.buffer_size == make().replay_buffer.buffer_size


def test_cut_off_anywhere(content):
    for length in (0, 2, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(ValueError, match="load_replay_buffer: "):
            make().load_replay_buffer(io.BytesIO(content[:length]), safe=True)


@pytest.fixture(scope="module")
def learned():
    return make().learn(40)


def all_of(agent):
    buffer = agent.replay_buffer
    return [
        buffer.pos,
        buffer.full,
        *(getattr(buffer, name)[: buffer.size()].tobytes() for name in ROWS),
        *map(str, imagined_of(buffer)),
    ]


def imagined_of(buffer):
    rows, refills = buffer.model_buffer.contents()
    return rows.tolist(), refills


@pytest.mark.parametrize("safe", [False, True])
def test_flipped_bits(learned, safe):
    """Of 200 flips none loads altered, and none of an altered file is read."""
    file, agent, rng = io.BytesIO(), make(), np.random.default_rng(0)
    learned.save_replay_buffer(file, imagined=True, safe=safe)
    content, loaded = file.getvalue(), 0
    agent.replay_buffer.reset()
    before = all_of(agent)
    # The last bytes are the checksum itself.
    for place in [*rng.integers(len(content) - 48, size=170), *rng.integers(len(content) - 48, len(content), size=30)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        try:
            agent.load_replay_buffer(io.BytesIO(flipped), safe=safe)
        except ValueError as error:
            assert "checksum" in str(error) and all_of(agent) == before
        else:
            assert all_of(agent) == all_of(learned) and place >= len(content) - 48 and not safe
            agent.replay_buffer.reset()
            loaded += 1
    assert loaded < 20
    agent.load_replay_buffer(io.BytesIO(content), safe=safe)
    assert all_of(agent) == all_of(learned)


def test_cut_off_pickles(learned):
    file = io.BytesIO()
    learned.save_replay_buffer(file)
    content = file.getvalue()
    for length in (0, 2, 100, len(content) // 2, len(content) - 60):
        with pytest.raises(ValueError, match=r"load_replay_buffer: .*it is damaged"):
            make().load_replay_buffer(io.BytesIO(content[:length]))


def test_what_follows_a_pickle_in_an_open_file_is_left_to_be_read(learned):
    file = io.BytesIO()
    learned.save_replay_buffer(file)
    pickle.dump("more", file)
    file.seek(0)
    agent = make()
    agent.load_replay_buffer(file)
    assert pickle.load(file) == "more" and agent.replay_buffer.size() == 40


# ---------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("rewards", (3, 0), np.nan, r"rewards=nan \(env 0, step 3\)"),
        ("rewards", (39, 0), np.inf, r"rewards=inf \(env 0, step 39\)"),
        ("observations", (20, 0, 1), -np.inf, r"observations\[1\]=-inf \(env 0, step 20\)"),
        ("next_observations", (0, 0, 2), np.nan, r"next_observations\[2\]=nan \(env 0, step 0\)"),
        ("actions", (7, 0, 0), np.nan, r"actions\[0\]=nan \(env 0, step 7\)"),
        ("dones", (7, 0), np.nan, r"dones=nan \(env 0, step 7\)"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path, safe, name, place, value, message):
    """Refused, with what and where; what the error recommends works."""
    agent, other = make().learn(40), make().learn(5)
    getattr(agent.replay_buffer, name)[place] = value
    agent.save_replay_buffer(tmp_path / "buffer", safe=safe)
    buffer, before = other.replay_buffer, all_of(other)
    with pytest.raises(ValueError, match=rf"load_replay_buffer: .*: the replay buffer has {message}\. Learning from it"):
        other.load_replay_buffer(tmp_path / "buffer", safe=safe)
    assert other.replay_buffer is buffer and all_of(other) == before
    rows = {key: getattr(agent.replay_buffer, key)[:40, 0] for key in ROWS}
    finite = np.all([np.isfinite(rows[key]).reshape(40, -1).all(axis=1) for key in ROWS], axis=0)
    names = {"observations": "observations", "next_observations": "next_observations", "rewards": "rewards"}
    names |= {"dones": "terminations"}
    data = {ours: rows[key][finite] for key, ours in names.items()}
    other.prefill(data | {"actions": 2 * rows["actions"][finite], "terminations": data["terminations"] > 0})
    assert other.replay_buffer.size() == 44 and other.learn(10).replay_buffer.size() == 54


def test_far_into_a_large_file(monkeypatch, learned):
    """The rows are looked at in blocks."""
    monkeypatch.setattr(checks, "_ROWS_AT_ONCE", 7)
    file, agent = io.BytesIO(), make().learn(40)
    agent.replay_buffer.observations[33, 0, 2] = np.nan
    agent.save_replay_buffer(file)
    file.seek(0)
    with pytest.raises(ValueError, match=r"observations\[2\]=nan \(env 0, step 33\)"):
        make().load_replay_buffer(file)


@pytest.mark.parametrize("safe", [False, True])
def test_imagined_numbers_that_are_not_finite(tmp_path, safe):
    agent = make().learn(40)
    agent.replay_buffer.model_buffer.rows[4, 2] = float("nan")
    agent.save_replay_buffer(tmp_path / "buffer", imagined=True, safe=safe)
    other = make()
    with pytest.raises(ValueError, match=r"imagined transitions after number 0 are not finite.*without imagined=True"):
        other.load_replay_buffer(tmp_path / "buffer", safe=safe)
    agent.save_replay_buffer(tmp_path / "buffer", safe=safe)
    other.load_replay_buffer(tmp_path / "buffer", safe=safe)
    assert other.replay_buffer.size() == 40


# ---------------------------------------------------------------------- what is no buffer, and plain buffers


@pytest.mark.parametrize(
    "content", [pickle.dumps({"a": 1}), pickle.dumps(None), b"", b"nothing", b"\x80\x05", b"cos\nnothing\n."]
)
def test_what_is_no_buffer_leaves_the_agents_own(tmp_path, content):
    (tmp_path / "file.pkl").write_bytes(content)
    agent = make().learn(5)
    buffer, before = agent.replay_buffer, all_of(agent)
    with pytest.raises(ValueError, match=r"load_replay_buffer: .*file.pkl: (it is damaged|replay_buffer=\{'a': 1\} must be)"):
        agent.load_replay_buffer(tmp_path / "file.pkl")
    assert agent.replay_buffer is buffer and all_of(agent) == before
    agent.learn(5, reset_num_timesteps=False)


@pytest.mark.parametrize(("kind", "name"), [(SAC, "file.pkl"), (MBPO, "file.pkl"), (MBPO, "file.pt")])
def test_buffers_of_other_envs_leave_the_agents_own(tmp_path, kind, name):
    """The error names a way to use the transitions, which works."""
    learned = kind("MlpPolicy", make_vec_env("Pendulum-v1", 2), gradient_steps=1).learn(10)
    learned.save_replay_buffer(tmp_path / name)
    agent = make().learn(5)
    buffer, before = agent.replay_buffer, all_of(agent)
    message = r"load_replay_buffer: .*file.p.*: this replay buffer has n_envs=2, but .* agent\.prefill\(other\.replay_buffer\)"
    with pytest.raises(ValueError, match=message):
        agent.load_replay_buffer(tmp_path / name)
    assert agent.replay_buffer is buffer and all_of(agent) == before
    other = MBPO("MlpPolicy", make_vec_env("Pendulum-v1", 2), gradient_steps=1)
    other.load_replay_buffer(tmp_path / name)
    agent.prefill(other.replay_buffer)
    assert agent.replay_buffer.size() == 15
    assert np.array_equal(agent.replay_buffer.rewards[5:15].flatten(), learned.replay_buffer.rewards[:5].T.flatten())


@pytest.mark.parametrize("name", ["file.pkl", "file.pt"])
def test_that_ends_are_copied_is_saved(tmp_path, name):
    """Otherwise, a loaded agent takes episodes that all end where they start for lost ones, until it learns in its env."""
    learned, loaded = make().learn(5), make()
    learned.save_replay_buffer(tmp_path / name)
    loaded.load_replay_buffer(tmp_path / name)
    assert learned.replay_buffer.copies_ends and loaded.replay_buffer.copies_ends
    learned.replay_buffer = plain_buffer()
    assert not learned.replay_buffer.copies_ends


def plain_buffer(n=20):
    sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=1000, seed=0).learn(n)
    return sac.replay_buffer


def test_a_plain_buffer_in_its_place(tmp_path):
    """The agent makes it its own, and everything works."""
    agent, plain = make(), plain_buffer()
    agent.replay_buffer = plain
    buffer = agent.replay_buffer
    assert type(buffer) is MixedReplayBuffer and buffer.observations is plain.observations and buffer.size() == 20
    agent.set_random_seed(3)
    agent.learn(40)
    assert buffer.size() == 60 and len(buffer.model_buffer) > 0
    agent.save_replay_buffer(tmp_path / "buffer.pt")
    agent.load_replay_buffer(tmp_path / "buffer.pt")
    assert agent.replay_buffer.size() == 60


def test_a_plain_buffer_inside_a_zip(tmp_path):
    agent = make().learn(30)
    vars(agent)["replay_buffer"] = plain_buffer()
    agent.save(tmp_path / "agent", include=["replay_buffer"])
    loaded = MBPO.load(tmp_path / "agent", env=gym.make("Pendulum-v1"))
    assert type(loaded.replay_buffer) is MixedReplayBuffer
    assert loaded.learn(30).replay_buffer.size() == 50


def test_what_is_put_in_its_place_must_fit():
    agent = make().learn(5)
    buffer = agent.replay_buffer
    with pytest.raises(ValueError, match=r"replay_buffer=\[1\] must be a ReplayBuffer of Stable-Baselines3, or None"):
        agent.replay_buffer = [1]
    two = make(make_vec_env("Pendulum-v1", 2), gradient_steps=1)
    with pytest.raises(ValueError, match="n_envs=2"):
        agent.replay_buffer = two.replay_buffer
    assert agent.replay_buffer is buffer
    agent.replay_buffer = None
    with pytest.raises(ValueError, match="save_replay_buffer: the agent's replay_buffer is None"):
        agent.save_replay_buffer("buffer")


def test_a_pickle_inside_the_zip(tmp_path, content):
    with pytest.raises(ValueError, match="something else than tensors"):
        make().load_replay_buffer(changed_file(content, lambda v: v.update(content=Payload(tmp_path / "marker"))))
    assert not (tmp_path / "marker").exists()
