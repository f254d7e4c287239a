import pytest
import torch as th

from sb3_mbpo.runtime.denormals import flush_denormals, flushed

# Where the processor has no such mode, there is nothing to set and nothing to see.
needs_support = pytest.mark.skipif(not th.set_flush_denormal(False), reason="this CPU cannot flush denormals")


@pytest.fixture(autouse=True)
def as_before():
    yield
    th.set_flush_denormal(False)


@needs_support
def test_flushed_within_and_as_before_afterwards():
    tiny = th.full((3,), 1e-39)
    assert not flushed() and (tiny * 1.0).all()
    with flush_denormals():
        assert flushed() and not (tiny * 1.0).any()
        with flush_denormals():
            pass
        assert flushed()
    assert not flushed() and (tiny * 1.0).all()


@needs_support
def test_as_before_after_an_error():
    with pytest.raises(RuntimeError), flush_denormals():
        raise RuntimeError
    assert not flushed()
