"""States of torch's random generators, of every process of a run."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


def rng_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the states of all processes' generators, on every process.

    Args:
        accelerator: of this process.

    Returns:
        "cpu0", "cpu1", ... by rank, and "cuda0", ... of the device of each rank on GPUs; (S,) uint8 on the CPU.
    """
    own = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    found: dict[str, Tensor] = {}
    for kind, state in own.items():
        states = accelerator.gather(state[None].to(accelerator.device))  # (world, S)
        rows = torch.as_tensor(states).cpu()
        found |= {f"{kind}{rank}": row.clone() for rank, row in enumerate(rows)}
    return found


def restore_rng(states: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Give this process's generators the states they had.

    Processes beyond those that saved take the state of the first, as all start from one seed.

    Args:
        states: from `rng_states`.
        accelerator: of this process.
    """
    rank = accelerator.process_index
    torch.set_rng_state(states.get(f"cpu{rank}", states["cpu0"]))
    if accelerator.device.type == "cuda" and "cuda0" in states:
        torch.cuda.set_rng_state(states.get(f"cuda{rank}", states["cuda0"]), accelerator.device)
