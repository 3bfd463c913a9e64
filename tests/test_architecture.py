"""Attention heads, experts, channels and rows of tables as groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo_models import ZOO, make

import newton_summary as ns
from newton_summary import Partition
from newton_summary.measure import Loss

pytestmark = pytest.mark.filterwarnings("ignore")

HEADS = {  # of the first attention module: its name, queries, and heads with keys and values of their own
    "GPT-2": ("transformer.h.0.attn", 4, 4),
    "Llama": ("model.layers.0.self_attn", 4, 2),
    "Phi 3": ("model.layers.0.self_attn", 4, 2),
    "GPT-NeoX": ("gpt_neox.layers.0.attention", 4, 4),
    "BERT": ("bert.encoder.layer.0.attention.self", 4, 4),
    "DistilBERT": ("distilbert.transformer.layer.0.attention", 4, 4),
    "T5": ("encoder.block.0.layer.0.SelfAttention", 4, 4),
    "ModernBERT": ("model.layers.0.attn", 4, 4),
    "Whisper": ("model.encoder.layers.0.self_attn", 4, 4),
    "ViT": ("vit.layers.0.attention", 4, 4),
    "U-Net": ("down_blocks.1.attentions.0", 2, 2),
    "torch's encoder": ("encoder.layers.0.self_attn", 4, 4),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_without_its_weights_changes_nothing_but_what_it_would_add(name):
    """Whatever the layout: a head whose output columns are zero is one that its other weights do not matter to."""
    if not ZOO[name].is_here:
        pytest.skip("needs the extra: pip install 'newton-summary[zoo]'")
    model, loss_fn, batch = make(name, train=False)
    check_heads(model, lambda: loss_fn(model, batch), *HEADS[name])


def check_heads(model, loss, path, count, own):
    partition = Partition.heads(model)
    assert [n for n in partition.names if n.startswith(f"{path}.head")] == [f"{path}.head{i}" for i in range(count)]
    if own == count:
        assert not any("kv" in n for n in partition.names)
    else:
        assert [n for n in partition.names if n.startswith(f"{path}.kv")] == [f"{path}.kv{i}" for i in range(own)]
    group = partition.names.index(f"{path}.head1")
    masks = {
        n: label == group
        for n, label in zip(partition.parameter_names, partition.labels, strict=True)
        if not isinstance(label, int) and bool((label == group).any())
    }
    named = dict(model.named_parameters())
    output = next(n for n in masks if any(f".{key}.weight" in n for key in OUTPUTS) and n.endswith("weight"))
    with torch.no_grad():
        named[output][masks[output]] = 0.0
        expected = loss()
        for n, mask in masks.items():
            if n != output:
                named[n][mask] += 1.0
        assert loss() == pytest.approx(float(expected), rel=1e-9)
        named[output][masks[output]] = torch.randn(int(masks[output].sum()), dtype=torch.float64)
        assert loss() != pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("own", [4, 1])
def test_fused_projections_whose_order_is_not_as_their_name_says(own):
    model = tiny("GPTBigCode", multi_query=own == 1).double()
    check_heads(model, lambda: model(torch.arange(10)[None]).last_hidden_state.square().sum(), "h.0.attn", 4, own)


def test_heads_before_a_normalisation_of_them_all():
    model = tiny("MiniMax", layer_types=["linear_attention"], intermediate_size=32, head_dim=8, block_size=4)
    attention, found = model.layers[0].self_attn, []
    attention.norm.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].detach().clone()))
    model(torch.arange(10)[None])
    partition = Partition.heads(model)
    place = partition.parameter_names.index("layers.0.self_attn.qkv_proj.weight")
    rows = (partition.labels[place] == partition.names.index("layers.0.self_attn.head1"))[:, 0]
    with torch.no_grad():
        attention.qkv_proj.weight[rows] += 1.0
    model(torch.arange(10)[None])
    assert int(rows.sum()) == 24
    assert (found[0] - found[1]).abs().amax((0, 1)).nonzero().flatten().tolist() == list(range(8, 16))


def test_fused_projections_of_an_order_by_blocks_are_not_guessed():
    model = tiny("CodeGen", rotary_dim=4, n_ctx=32, n_positions=32)
    with pytest.raises(ValueError, match=r"h\.0\.attn: in a CodeGenAttention, qkv_proj has no order that is known"):
        Partition.heads(model)


def tiny(name, **options):
    """A model of transformers, with weights that are not small."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'newton-summary[zoo]'")
    torch.manual_seed(0)
    options |= {"vocab_size": 20, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


OUTPUTS = ("o_proj", "out_proj", "c_proj", "out_lin", "to_out.0", "Wo", "dense", "o")


def test_a_summary_by_heads_adds_up_to_that_by_tensors():
    model, loss_fn, batch = make("torch's encoder")
    heads, whole = Partition.heads(model), Partition.trivial(model)
    direction = [torch.randn_like(p) for p in whole.parameters]

    def measured(partition):
        return ns.summarize(
            loss_fn, model, [batch], partition=partition, direction=direction, engine="forward", third="full"
        )

    torch.manual_seed(0)
    fine = measured(heads)
    torch.manual_seed(0)
    coarse = measured(whole)
    torch.testing.assert_close(fine.hessian.sum(), coarse.hessian.sum())
    torch.testing.assert_close(fine.third.sum(), coarse.third.sum())


def test_models_without_attention_are_named():
    with pytest.raises(ValueError, match=r"Sequential has no attention whose projections are known"):
        Partition.heads(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Sequential has no parameters below a module named 'experts'"):
        Partition.experts(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("says", [{"num_heads": 3}, {"num_heads": 16}, {"head_dim": 0}, {}])
def test_heads_that_do_not_divide_their_projections_are_named(says):
    layer = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer, name, nn.Linear(8, 8))
    for name, value in says.items():
        setattr(layer, name, value)
    with pytest.raises(
        ValueError, match=r"Module: 8 outputs for queries and 8 for keys are not a whole number of heads"
    ):
        Partition.heads(layer)


def test_an_order_that_is_not_known_is_not_guessed():
    """Falcon's: the keys and values that all queries share lie behind these, or, in groups, among them."""
    layer = nn.Module()
    layer.query_key_value, layer.dense, layer.num_heads = nn.Linear(8, 12), nn.Linear(8, 8), 4
    with pytest.raises(ValueError, match=r"attention: where heads share keys and values, query_key_value has no order"):
        Partition.heads(nn.ModuleDict({"attention": layer}))


def test_frozen_projections_are_left_out():
    layer = nn.MultiheadAttention(4, 2)
    layer.in_proj_weight.requires_grad_(False)
    partition = Partition.heads(layer)
    assert partition.names == ("head0", "head1", "rest")
    assert partition.sizes == (2 * 3 + 2 * 4, 2 * 3 + 2 * 4, 4)


def test_experts_in_lists_and_in_stacks():
    class Layer(nn.Module):
        def __init__(self, stacked):
            super().__init__()
            self.router = nn.Linear(2, 3)
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            if stacked:
                self.experts = nn.Module()
                self.experts.weight = nn.Parameter(torch.ones(3, 2, 2))

    for stacked, size in ((False, 6), (True, 4)):
        partition = Partition.experts(Layer(stacked), rest=None)
        assert partition.names == ("experts.0", "experts.1", "experts.2", "router.weight", "router.bias")
        assert partition.sizes == (size, size, size, 6, 3)


def test_channels_of_a_layer():
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 1, 1))
    partition = Partition.channels(model, "0")
    assert partition.names == ("0.channel0", "0.channel1", "0.channel2", "1.weight", "1.bias")
    assert partition.sizes == (5, 5, 5, 3, 1)
    with pytest.raises(ValueError, match=r"no trainable weight '2.weight'"):
        Partition.channels(model, "2")


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_transposed_convolution_are_its_outputs(groups):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=groups))
    partition = Partition.channels(model, "0")
    assert partition.sizes == (4 // groups * 4 + 1,) * 6
    slopes = partition.dot(
        torch.autograd.grad(model(torch.randn(1, 4, 3, 3))[0, 4].sum(), partition.parameters),
        [torch.ones_like(p) for p in partition.parameters],
    )
    assert [bool(slope) for slope in slopes] == [False] * 4 + [True, False]


def test_rows_by_frequency():
    model = nn.Sequential(nn.Embedding(6, 2), nn.Linear(2, 6))
    counts = torch.tensor([1, 0, 6, 2, 3, 0])
    partition = Partition.by_frequency(model, "0.weight", counts, bins=2, rest="rest")
    assert partition.names == ("0.weight.frequency1", "0.weight.frequency2", "0.weight.unseen", "rest")
    assert partition.labels[0][:, 0].tolist() == [1, 2, 0, 1, 1, 2]
    with pytest.raises(ValueError, match=r"'0.weight' has 6 rows, but counts have shape \(5,\)"):
        Partition.by_frequency(model, "0.weight", counts[:5])
    with pytest.raises(ValueError, match=r"no trainable parameter '0': is it '0.weight'\?"):
        Partition.by_frequency(model, "0", counts)
    listed = Partition.by_frequency(model, "0.weight", counts.tolist(), bins=2, rest="rest")
    assert listed.names == partition.names
    for wrong in (0 * counts, counts - 1, counts / 0, counts + float("inf")):
        with pytest.raises(ValueError, match=r"counts must not be negative nor all zero"):
            Partition.by_frequency(model, "0.weight", wrong)


def test_partitions_by_name():
    model, loss_fn, batch = make("torch's encoder", train=False)
    summary = ns.summarize(loss_fn, model, [batch], partition="heads", order=2)
    assert summary.names == Partition.heads(Loss(loss_fn, model).model).names
