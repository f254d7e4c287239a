"""Makes a model rollout in blocks that fit into memory."""

from collections.abc import Callable

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mbpo.buffers.model_buffer import ModelBuffer

# Number of start states per block: larger blocks do not fit a CPU's caches, and the block size limits the memory in use.
ROLLOUT_BLOCK = {"cpu": 5_000, "cuda": 100_000}
# Texts of PyTorch's plain RuntimeError when memory runs out: on Linux, on Windows, from CUDA's libraries.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """
    :param error: any exception
    :return: whether it reports that the memory of the CPU or the GPU ran out
    """
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
    Imagine transitions from every start state, one block at a time.

    If memory runs out, the block size is halved for this block and all later ones. A block is added completely or not at all.

    :param model_buffer: the buffer, after ``begin_refill``
    :param imagine: maps start states ``(B, obs_dim)`` to the transitions imagined from them
    :param start_obs: start states ``(N, obs_dim)``
    :param block: number of start states per block
    :param say: called with a short text after each block
    :return: the final block size: ``block``, or less if memory ran out
    :raises MemoryError: memory is not enough for a single start state
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
                    f"{len(start_obs)}; the model buffer contains {len(model_buffer)} transitions of at most "
                    f"model_buffer_size={model_buffer.max_rows}. Reduce rollout_batch_size, or set model_buffer_size"
                ) from error
            block = len(piece) // 2
        else:
            done += len(piece)
            say(f"imagining, {done:,} of {len(start_obs):,} branches")
            continue
        # Only after the except block: its exception still references the memory of the failed attempt.
        if start_obs.device.type == "cuda":
            th.cuda.empty_cache()
    return block
