from unittest import mock

import pytest
import torch as th

from sb3_mbpo.fast_sac.side_stream import SideStream

# There is no second stream without one; what is asked of CUDA is tested below by stand-ins.
gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


def test_each_in_its_turn_on_a_cpu():
    side, value = SideStream(th.device("cpu")), th.ones(1)
    with side.beside():
        value += 1
    assert value == 2
    side.join()
    with pytest.raises(ZeroDivisionError), side.beside():
        1 / 0  # noqa: B018


def test_what_waits_for_what(monkeypatch):
    cuda = mock.MagicMock()
    cuda.stream.return_value.__exit__.return_value = False
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(th.cuda, name, getattr(cuda, name))
    side = SideStream(th.device("cuda", 1))
    # Nothing is beside yet, and later no longer: in a capture, to wait for it then would be an error.
    side.join()
    with side.beside():
        cuda.work()
    side.join()
    side.join()
    stream, main = cuda.Stream.return_value, cuda.current_stream.return_value
    steps = [call for call in cuda.mock_calls if call[0].endswith(("wait_stream", "work", "__enter__", "__exit__"))]
    assert steps == [
        mock.call.Stream().wait_stream(main),
        mock.call.stream().__enter__(),
        mock.call.work(),
        mock.call.stream().__exit__(None, None, None),
        mock.call.current_stream().wait_stream(stream),
    ]
    cuda.Stream.assert_called_once_with(th.device("cuda", 1))
    cuda.stream.assert_called_once_with(stream)
    cuda.current_stream.assert_called_with(stream.device)


def turns(side: SideStream, value: th.Tensor, n: int) -> None:
    """``v -> 2 (v + 1) - 1``, by turns on both streams, each late."""
    for _ in range(n):
        th.cuda._sleep(300_000)
        value += 1
        with side.beside():
            th.cuda._sleep(300_000)
            value *= 2
        side.join()
        value -= 1


@gpu
@pytest.mark.parametrize("captured", [False, True])
def test_by_turns_on_a_gpu(captured):
    value = th.zeros(1000, device="cuda")
    side, graph, main = SideStream(value.device), th.cuda.CUDAGraph(), th.cuda.Stream()
    th.cuda.synchronize()
    with th.cuda.stream(main):
        turns(side, value, 3)
        if captured:
            with th.cuda.graph(graph, stream=main):
                turns(side, value, 3)
            graph.replay()
            graph.replay()
    th.cuda.synchronize()
    assert (value == 2.0 ** (9 if captured else 3) - 1).all()


@gpu
def test_the_main_stream_need_not_wait():
    value = th.zeros(1, device="cuda")
    side = SideStream(value.device)
    # A kernel that is launched for the first time may wait for the whole GPU.
    turns(side, value, 1)
    value.zero_()
    th.cuda.synchronize()
    with side.beside():
        # About half a second.
        th.cuda._sleep(1_000_000_000)
    value += 1
    assert value.item() == 1 and side._stream is not None and not side._stream.query()
    side.join()
    value += 1
    assert value.item() == 2 and side._stream.query()
