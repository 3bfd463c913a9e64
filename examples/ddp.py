"""Trains with several processes, and goes on where it was stopped.

    torchrun --nproc-per-node 2 examples/ddp.py --checkpoint run.pt

With graphics processors each process takes one; without, they share the host's cores. Started by `python` alone it is
a single process, which may go on with what two have begun.
"""

import argparse
import datetime
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import newton_summary as ns

BATCH = 100  # samples of a step, of all processes together


def spirals(count: int = 2000) -> TensorDataset:
    """Points on three spirals, and which of them each is on."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.arange(count) % 3
    radius = torch.rand(count, generator=generator)
    angle = 4 * radius + 2 * torch.pi / 3 * arm + 0.2 * torch.randn(count, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], 1), arm)


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean over the samples of the batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def join(timeout: float) -> torch.device:
    """Joins the other processes, and says what to compute on."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if gpu else "gloo", timeout=datetime.timedelta(seconds=timeout))
    return device


def main() -> None:
    """Trains; the first process prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="saved after every epoch; read at the start if it is there")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for another process")
    arguments = parser.parse_args()

    device = join(arguments.timeout)
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)  # the same model in every process
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).to(device)
    parallel = DistributedDataParallel(model) if count > 1 else model

    data = spirals()
    sampler = DistributedSampler(data, count, rank)  # every process has samples of its own
    loader = DataLoader(data, batch_size=BATCH // count, sampler=sampler)
    optimizer = ns.NewtonSummary(parallel, loss_fn, curvature_data=loader)

    start = 0
    if arguments.checkpoint is not None and arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"]

    for epoch in range(start, arguments.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            x, y = (tensor.to(device) for tensor in batch)
            optimizer.zero_grad()
            loss = loss_fn(parallel, (x, y))
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch + 1}: the loss is {loss.item():.4f}", flush=True)
            if arguments.checkpoint is not None:
                save(arguments.checkpoint, model, optimizer, epoch + 1)
    leave()


def leave() -> None:
    """Leaves the other processes."""
    if dist.is_initialized():
        time.sleep(0.1)  # gloo's threads need the interpreter to let go of the last exchange, and abort if it has ended
        dist.destroy_process_group()


def save(path: Path, model: nn.Module, optimizer: ns.NewtonSummary, epoch: int) -> None:
    """Writes a checkpoint; whenever this process ends, the file is whole: the old one or the new one."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, part)
    part.replace(path)


if __name__ == "__main__":
    main()
