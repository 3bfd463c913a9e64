"""What a measurement of a language model at its real size costs: time in gradients, and memory of the whole process.

Run ``python benchmarks/large.py [--model gpt2 llama] [--type float32] [--groups blocks tensors] [--mask] [--tokens N]
[--threads N] [--device cuda]``.  Models are transformers' with random weights: GPT-2 (12 layers of width 768, a
vocabulary of 50,257, 124 million parameters, in single precision), and a Llama of 494 million (24 layers of width 896,
a vocabulary of 151,936, shared with the head), in bfloat16 unless said.  The batch is one sequence, the direction the
gradient.  Each configuration has a process of its own.  Times are of the processor, so that other work on the machine
changes little (on an accelerator, between events), and memory is the largest that the process (on an accelerator, its
allocator) ever held.  Figures are added to results/large.json, and results/large.md is written anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cost
import torch
from clock import Clock, add_device, multiply_adds
from torch import Tensor, nn

import newton_summary as ns
from newton_summary.measure import ForwardEngine

RESULTS = Path(__file__).parent.parent / "results"
TOKENS = 128
LLAMA = cost.Shape("llama", 24, 896, 4864, 14, 2, 151_936, TOKENS)
BLOCKS = {"gpt2": ("transformer.h.{}.*", 12), "llama": ("model.layers.{}.*", 24)}
OTHERS = {
    "gpt2": {"embeddings": "transformer.w?e.*", "final norm": "transformer.ln_f.*"},
    "llama": {"embeddings": "model.embed_tokens.*", "final norm": "model.norm.*"},
}
HEAD = """# Language models at their real size

Written by `python benchmarks/large.py`: transformers' models with random weights. "gpt2" is GPT-2, 124 million
parameters; "llama" has 494 million (24 layers of width 896, a vocabulary of 151,936 that the head shares). The batch
is one sequence of so many tokens. "blocks" are groups for the blocks, embeddings and final norm, "tensors" one for
each tensor. Times are those of the processor, in gradients (one forward and backward pass); "counted" are
multiply-adds of matrix products that ran, in the same unit; "first" is the first measurement, which lowers and checks
what it recorded; "of peak" is the rate of these multiply-adds, against that of one large product. Memory is the most
that the process held, with model, gradient and direction.
[cost.md](cost.md) has the count by the shape of a model, and what it predicts for larger ones.

"""
TITLES = [
    "model",
    "type",
    "tokens",
    "groups",
    "S",
    "mask",
    "order",
    "device",
    "threads",
    "gradients",
    "counted",
    "first",
]
TITLES += ["gradient, s", "of peak", "memory, GB"]
NOTES = """
A processor without instructions for bfloat16, as this one, multiplies it six to sixty times more slowly than single
precision, by layout: seconds in bfloat16 say nothing of an accelerator, memory and count (here by shape, as in cost.md)
do. Gradients of a model of this depth in bfloat16 are known to some 5 %, whoever computes them.
"""


def loss_fn(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss  # type: ignore[no-any-return]


TYPES = {"gpt2": "float32", "llama": "bfloat16"}


def build(name: str, dtype: str, tokens: int, mask: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**none)).to(getattr(torch, dtype))
    else:
        model = cost.build(LLAMA).to(getattr(torch, dtype))
    ids = torch.randint(model.config.vocab_size, (1, tokens))
    batch = {"input_ids": ids, "labels": ids}
    return model, batch | ({"attention_mask": torch.ones_like(ids)} if mask else {})


def partition_of(model: nn.Module, name: str, groups: str) -> ns.Partition:
    if groups == "tensors":
        return ns.Partition.canonical(model)
    pattern, count = BLOCKS[name]
    return ns.Partition.from_patterns(model, {f"block {i}": pattern.format(i) for i in range(count)} | OTHERS[name])


def run(
    name: str, dtype: str, tokens: int, groups: str, mask: bool, order: int, threads: int, device: str
) -> dict[str, Any]:
    """One configuration, in this process."""
    torch.set_num_threads(threads)
    clock = Clock(device, processor=True)
    model, batch = build(name, dtype, tokens, mask)
    model, batch = model.to(device), {name: value.to(device) for name, value in batch.items()}
    partition, engine = partition_of(model, name, groups), ForwardEngine()

    def gradient() -> None:
        model.zero_grad()
        loss_fn(model, batch).backward()

    dear = dtype == "bfloat16" and device == "cpu"  # minutes a gradient: nothing runs only to warm up or to be counted
    unit = clock.once(gradient) if dear else clock.least(gradient)
    direction = [p.grad.clone() for p in partition.parameters if p.grad is not None]
    model.zero_grad()

    def measure() -> ns.Summary:
        return ns.summarize(
            loss_fn, model, [batch], partition=partition, direction=direction, order=order, engine=engine
        )

    first = clock.once(measure)
    later = clock.least(measure, repeats=2 if groups == "blocks" and not dear else 1, warm_up=0)
    memory = clock.memory() / 1e9
    if dear and name == "llama":
        shape = dataclasses.replace(LLAMA, tokens=tokens)
        by = cost.tensors if groups == "tensors" else cost.blocks()
        products, products_of_measure = shape.gradient, cost.Count(shape, by, order == 3).model().total
    else:
        products, products_of_measure = multiply_adds(gradient), multiply_adds(measure)
    return {
        "model": name,
        "type": dtype,
        "tokens": tokens,
        "groups": groups,
        "S": len(partition),
        "mask": mask,
        "order": order,
        "device": clock.name,
        "threads": threads,
        "gradients": later / unit,
        "counted": products_of_measure / products,
        "peak": None if dear else products_of_measure / later / clock.peak(direction[0].dtype),
        "first": first / unit,
        "seconds": unit,
        "memory": memory,
    }


def write(records: list[dict[str, Any]]) -> None:
    """The figures as a file and as a table."""
    RESULTS.joinpath("large.json").write_text(json.dumps(records, indent=1) + "\n")
    rows = [TITLES, ["---"] * len(TITLES)]
    for r in records:
        given = [r[k] for k in ("model", "type", "tokens", "groups", "S")] + ["yes" if r["mask"] else "no"]
        given += [r[k] for k in ("order", "device", "threads")]
        times = [f"{r[k]:.1f}" for k in ("gradients", "counted", "first")] + [f"{r['seconds']:.2f}"]
        peak = "" if r["peak"] is None else f"{r['peak']:.2f}"
        rows.append([*given, *times, peak, f"{r['memory']:.1f}"])
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    notes = NOTES if any((r["type"], r["device"]) == ("bfloat16", "cpu") for r in records) else ""
    RESULTS.joinpath("large.md").write_text(HEAD + "\n".join(lines) + "\n" + notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["gpt2"], choices=list(BLOCKS))
    parser.add_argument("--type", choices=["float32", "bfloat16"], help="default: single for gpt2, bfloat16 for llama")
    parser.add_argument("--groups", nargs="+", default=["blocks", "tensors"], choices=["blocks", "tensors"])
    parser.add_argument("--orders", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--mask", action="store_true", help="with an attention_mask")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    add_device(parser)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        (model,), (groups,), (order,) = given.model, given.groups, given.orders
        found = run(model, given.type, given.tokens, groups, given.mask, order, given.threads, given.device)
        print(json.dumps(found))
        return
    path = RESULTS / "large.json"
    records = json.loads(path.read_text()) if path.exists() else []
    for model, groups, order in itertools.product(given.model, given.groups, given.orders):
        dtype = given.type or TYPES[model]
        asked = ["--model", model, "--type", dtype, "--groups", groups, "--orders", str(order)]
        asked += ["--tokens", str(given.tokens), "--threads", str(given.threads), "--device", given.device]
        command = [sys.executable, __file__, "--here", *asked, *["--mask"] * given.mask]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        new = json.loads(done.stdout.splitlines()[-1])
        print(new, flush=True)
        key = ("model", "type", "tokens", "groups", "mask", "order", "device", "threads")
        records = [r for r in records if any(r[k] != new[k] for k in key)] + [new]
        write(records)


if __name__ == "__main__":
    main()
