"""What a measurement of GPT-2 at its real size costs: time in gradients, and memory of the whole process.

Run ``python benchmarks/large.py [--groups blocks tensors] [--mask] [--threads N] [--device cuda]``.  The model is
transformers' with random weights: 12 layers of width 768, a vocabulary of 50,257, 124 million parameters; the batch is
one sequence of 128 tokens, the direction the gradient.  Each configuration has a process of its own.  Times are of the
processor, so that other work on the machine changes little (on an accelerator, between events), and memory is the
largest that the process (on an accelerator, its allocator) ever held.  Figures are added to results/large.json, and
results/large.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from clock import Clock, add_device, multiply_adds
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine

RESULTS = Path(__file__).parent.parent / "results"
TOKENS = 128
PATTERNS = {"embeddings": "transformer.w?e.*", "final norm": "transformer.ln_f.*"}
HEAD = """# A language model at its real size

Written by `python benchmarks/large.py`: transformers' GPT-2, random weights, 124 million parameters in single
precision, one sequence of 128 tokens. "blocks" are 14 groups (12 blocks, embeddings, final norm), "tensors" 148.
Times are those of the processor, in gradients (one forward and backward pass); "counted" are multiply-adds of
matrix products that ran, in the same unit; "first" is the first measurement, which lowers and checks what it
recorded; "of peak" is the rate of these multiply-adds, against that of one large product. Memory is the most that
the process held, with model, gradient and direction (0.5 GB each).

| groups | S | mask | order | device | threads | gradients | counted | first | gradient, s | of peak | memory, GB |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def loss_fn(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


def build(mask: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    ids = torch.randint(50257, (1, TOKENS))
    batch = {"input_ids": ids, "labels": ids}
    return model, batch | ({"attention_mask": torch.ones_like(ids)} if mask else {})


def partition_of(model: nn.Module, groups: str) -> ns.Partition:
    if groups == "tensors":
        return ns.Partition.canonical(model)
    return ns.Partition.from_patterns(model, {f"block {i}": f"transformer.h.{i}.*" for i in range(12)} | PATTERNS)


def run(groups: str, mask: bool, order: int, threads: int, device: str) -> dict[str, Any]:
    """One configuration, in this process."""
    torch.set_num_threads(threads)
    clock = Clock(device, processor=True)
    model, batch = build(mask)
    model, batch = model.to(device), {name: value.to(device) for name, value in batch.items()}
    partition, engine = partition_of(model, groups), ForwardEngine()

    def gradient() -> None:
        model.zero_grad()
        loss_fn(model, batch).backward()

    unit = clock.least(gradient)
    products = multiply_adds(gradient)
    direction = [p.grad.clone() for p in partition.parameters if p.grad is not None]
    model.zero_grad()

    def measure() -> ns.Summary:
        return ns.summarize(
            loss_fn, model, [batch], partition=partition, direction=direction, order=order, engine=engine
        )

    first = clock.once(measure)
    later = clock.least(measure, repeats=2 if groups == "blocks" else 1, warm_up=0)
    memory = clock.memory() / 1e9
    products_of_measure = multiply_adds(measure)
    return {
        "groups": groups,
        "S": len(partition),
        "mask": mask,
        "order": order,
        "device": clock.name,
        "threads": threads,
        "gradients": later / unit,
        "counted": products_of_measure / products,
        "peak": products_of_measure / later / clock.peak(),
        "first": first / unit,
        "seconds": unit,
        "memory": memory,
    }


def write(records: list[dict[str, Any]]) -> None:
    """The figures as a file and as a table."""
    RESULTS.joinpath("large.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = [
        f"| {r['groups']} | {r['S']} | {'yes' if r['mask'] else 'no'} | {r['order']} | {r['device']} | {r['threads']} "
        f"| {r['gradients']:.1f} | {r['counted']:.1f} | {r['first']:.1f} | {r['seconds']:.2f} | {r['peak']:.2f} "
        f"| {r['memory']:.1f} |"
        for r in records
    ]
    RESULTS.joinpath("large.md").write_text(HEAD + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=["blocks", "tensors"], choices=["blocks", "tensors"])
    parser.add_argument("--orders", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--mask", action="store_true", help="with an attention_mask")
    parser.add_argument("--threads", type=int, default=1)
    add_device(parser)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(run(given.groups[0], given.mask, given.orders[0], given.threads, given.device)))
        return
    path = RESULTS / "large.json"
    records = json.loads(path.read_text()) if path.exists() else []
    for groups in given.groups:
        for order in given.orders:
            asked = ["--groups", groups, "--orders", str(order), "--threads", str(given.threads)]
            asked += ["--device", given.device]
            command = [sys.executable, __file__, "--here", *asked, *(["--mask"] if given.mask else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            new = json.loads(done.stdout.splitlines()[-1])
            print(new, flush=True)
            key = ("groups", "mask", "order", "device", "threads")
            records = [r for r in records if any(r[k] != new[k] for k in key)] + [new]
            write(records)


if __name__ == "__main__":
    main()
