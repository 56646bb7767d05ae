"""Two processes of a gloo group, for the tests that compare them with one."""

import os
import socket
import sys
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def two_processes(work, *args, timeout=240):
    """What `work(rank, *args)` returns on each of two ranks, tensors in nested containers included: [of 0, of 1].

    `work` is a function of a module, for the processes import it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_on_rank, args=(rank, port, queue, work, args)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = {}
    try:
        while len(found) < len(workers):
            rank, result, error = queue.get(timeout=timeout)
            assert error is None, f"rank {rank}:\n{error}"
            found[rank] = _each(result, _tensor)
    finally:
        for worker in workers:
            worker.join(30 if len(found) == len(workers) else 1)
            if worker.is_alive():
                worker.terminate()
    return [found[0], found[1]]


class _Array:
    """A tensor on its way between processes: by value, for its memory ends with the process that made it."""

    def __init__(self, numpy):
        self.numpy = numpy


def _array(value):
    return _Array(value.detach().numpy()) if isinstance(value, torch.Tensor) else value


def _tensor(value):
    return torch.from_numpy(value.numpy) if isinstance(value, _Array) else value


def _each(value, change):
    if isinstance(value, dict):
        return {key: _each(one, change) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each(one, change) for one in value]
    return change(value)


def _on_rank(rank, port, queue, work, args):
    torch.set_num_threads(1)
    if sys.platform.startswith("linux"):
        # a machine without a network cannot tell gloo its own address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        result = work(rank, *args)
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
        raise
    queue.put((rank, _each(result, _array), None))
    dist.barrier()
    dist.destroy_process_group()
