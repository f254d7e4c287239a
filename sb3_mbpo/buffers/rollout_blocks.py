"""A refill of the model buffer, in blocks that memory has room for."""

from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.model_buffer import ModelBuffer

# Start states imagined at once: larger blocks no longer fit a CPU's caches, and a block bounds the memory in use.
ROLLOUT_BLOCK = {"cpu": 5_000, "cuda": 100_000}
# How PyTorch says, in a plain RuntimeError, that memory has run out: on Linux, on Windows, from CUDA's libraries.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, the CPU's or the GPU's."""
    if isinstance(error, MemoryError | th.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)


def refill(
    model_buffer: ModelBuffer,
    imagine: Callable[[th.Tensor], ReplayBufferSamples],
    start_obs: th.Tensor,
    block: int,
    say: Callable[[str], None],
) -> int:
    """
    Imagine from every start state, a block at a time. Where memory runs out, a block is imagined anew by halves, and so are
    those after it; a block is added as a whole or not at all.

    :param model_buffer: where a refill was begun
    :param imagine: start states ``(B, obs_dim)`` -> the transitions imagined from them
    :param start_obs: ``(N, obs_dim)``
    :param block: start states imagined at once
    :param say: called with a few words after each block
    :return: the block that memory had room for: ``block``, or less
    :raises MemoryError: there is none for a single start state
    """
    done = 0
    while done < len(start_obs):
        piece = start_obs[done : done + block]
        try:
            model_buffer.add(imagine(piece))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(piece) == 1:
                raise MemoryError(
                    f"There is no memory for the rollout of one start state, after {done} of rollout_batch_size="
                    f"{len(start_obs)}; the model buffer holds {len(model_buffer)} transitions of at most model_buffer_size="
                    f"{model_buffer.max_rows}. Lower rollout_batch_size, or set model_buffer_size"
                ) from error
            block = len(piece) // 2
        else:
            done += len(piece)
            say(f"imagining, {done:,} of {len(start_obs):,} branches")
            continue
        # Not before the handler is left: its exception keeps what the attempt had allocated.
        if start_obs.device.type == "cuda":
            th.cuda.empty_cache()
    return block
