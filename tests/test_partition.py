"""Partitions: what is in which group, in which order, and what is refused."""

import copy
import pickle

import pytest
import torch
from cases import Tempered, Tied
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import newton_summary as ns
from newton_summary import Partition
from newton_summary.measure.along import losses_along
from newton_summary.partition import resolve_partition, unwrap


def small():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Sequential(nn.Linear(3, 2), nn.Tanh()))


NAMES = ("0.weight", "0.bias", "1.weight", "1.bias", "3.0.weight", "3.0.bias")


def members(partition):
    """The names of the tensors in each group."""
    return {
        group: tuple(partition.parameter_names[i] for i in tensors)
        for group, tensors in zip(partition.names, partition.tensors_of, strict=True)
    }


# Builders -------------------------------------------------------------------------------------------------------------


def test_canonical_has_a_group_for_each_tensor():
    partition = Partition.canonical(small())
    assert partition.names == partition.parameter_names == NAMES
    assert partition.sizes == (12, 3, 3, 3, 6, 2)
    assert partition.labels == (0, 1, 2, 3, 4, 5)
    assert len(partition) == 6


def test_trivial_has_one_group():
    partition = Partition.trivial(small())
    assert members(partition) == {"all": NAMES}
    assert partition.sizes == (29,)


def test_discrete_has_a_group_for_each_scalar():
    partition = Partition.discrete(Tempered())
    assert partition.names[:3] == ("temperature", "layer.weight[0, 0]", "layer.weight[0, 1]")
    assert partition.names[-1] == "layer.bias[2]"
    assert len(partition) == 13
    assert partition.sizes == (1,) * 13
    assert torch.equal(partition.labels[0], torch.tensor(0))
    assert torch.equal(partition.labels[1], torch.arange(1, 10).view(3, 3))
    assert torch.equal(partition.labels[2], torch.arange(10, 13))


def test_by_kind_separates_weights_biases_and_others():
    partition = Partition.by_kind(small())
    assert members(partition) == {
        "weights": ("0.weight", "3.0.weight"),
        "biases": ("0.bias", "1.bias", "3.0.bias"),
        "others": ("1.weight",),
    }
    assert partition.sizes == (18, 8, 3)


def test_by_kind_leaves_absent_kinds_out():
    assert Partition.by_kind(nn.Linear(2, 2, bias=False)).names == ("weights",)


def test_by_kind_knows_the_biases_of_recurrent_layers_and_of_attention():
    assert Partition.by_kind(nn.LSTM(2, 3)).sizes == (4 * 3 * 5, 2 * 4 * 3)
    assert Partition.by_kind(nn.MultiheadAttention(4, 2)).sizes == (64, 16)


def test_by_module_groups_submodules_at_a_depth():
    assert members(Partition.by_module(small())) == {"0": NAMES[:2], "1": NAMES[2:4], "3": NAMES[4:]}
    assert Partition.by_module(small(), depth=2).names == ("0", "1", "3.0")
    assert Partition.by_module(small(), depth=9).names == ("0", "1", "3.0")


def test_by_module_looks_into_what_has_all_parameters():
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"body": small()})})
    assert Partition.by_module(wrapped).names == ("model.body.0", "model.body.1", "model.body.3")
    assert Partition.by_module(wrapped, depth=2).names == ("model.body",)
    assert Partition.by_module(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))).names == ("0.0",)


def test_by_module_makes_groups_of_parameters_above_its_depth():
    assert members(Partition.by_module(Tempered())) == {
        "temperature": ("temperature",),
        "layer": ("layer.weight", "layer.bias"),
    }
    assert Partition.by_module(nn.Linear(2, 2)).names == ("weight", "bias")


def deep(layers):
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)])


def test_chunks_are_consecutive_layers_split_into_weights_and_biases():
    partition = Partition.chunks(deep(5), 2)
    assert members(partition) == {
        "chunk1.weights": ("0.weight", "1.weight", "2.weight"),
        "chunk1.biases": ("0.bias", "1.bias", "2.bias"),
        "chunk2.weights": ("3.weight", "4.weight"),
        "chunk2.biases": ("3.bias", "4.bias"),
    }


def test_chunks_of_a_hundred_and_one_layers():
    """The partition of the deepest network of the paper: 5 chunks, 10 groups."""
    partition = Partition.chunks(deep(101), 5)
    assert len(partition) == 10
    assert [len(t) for t in partition.tensors_of[::2]] == [21, 20, 20, 20, 20]


@given(layers=st.integers(1, 30), data=st.data())
@settings(max_examples=40, deadline=None)
def test_chunks_are_even_and_in_order(layers, data):
    count = data.draw(st.integers(1, layers))
    partition = Partition.chunks(deep(layers), count)
    sizes = [len(tensors) for tensors in partition.tensors_of[::2]]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)
    weights = [i for tensors in partition.tensors_of[::2] for i in tensors]
    assert weights == sorted(weights)


def test_chunks_without_biases_have_no_groups_for_them():
    assert Partition.chunks(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)), 2).names == (
        "chunk1.weights",
        "chunk2.weights",
        "chunk2.biases",
    )


def test_patterns_take_parameters_in_their_order():
    partition = Partition.from_patterns(small(), {"tail": "3.*", "weights": "*.weight"}, rest="other")
    assert members(partition) == {
        "tail": ("3.0.weight", "3.0.bias"),
        "weights": ("0.weight", "1.weight"),
        "other": ("0.bias", "1.bias"),
    }


def test_a_group_may_have_several_patterns():
    partition = Partition.from_patterns(small(), {"ends": ["3.*", "0.*"], "middle": ("1.*",)})
    assert members(partition) == {"ends": (*NAMES[:2], *NAMES[4:]), "middle": NAMES[2:4]}


def test_patterns_leave_an_empty_rest_out_and_may_share_it():
    assert Partition.from_patterns(small(), {"all": "*"}, rest="other").names == ("all",)
    joined = Partition.from_patterns(small(), {"a": "0.*", "b": "3.*"}, rest="a")
    assert members(joined) == {"a": NAMES[:4], "b": NAMES[4:]}


def test_groups_hold_names_or_parameters_in_the_models_order():
    model = small()
    groups = {"b": [model[3][0].bias, "0.weight"], "a": ["0.bias", model[1].weight, model[1].bias, "3.0.weight"]}
    partition = Partition(groups, model)
    assert partition.names == ("b", "a")
    assert partition.parameter_names == NAMES
    assert partition.labels == (0, 1, 1, 1, 1, 0)
    assert all(a is b for a, b in zip(partition.parameters, model.parameters(), strict=True))


def test_groups_hold_parts_of_parameters():
    model = nn.Linear(4, 3)
    upper = torch.ones(3, 4).triu().bool()
    groups = {
        "triangle": [("weight", upper)],
        "rest": [(model.weight, ~upper), ("bias", slice(0, 2))],
        "last": [("bias", 2)],
    }
    partition = Partition(groups, model)
    assert partition.sizes == (9, 5, 1)
    assert torch.equal(partition.labels[0], torch.where(upper, 0, 1))
    assert torch.equal(partition.labels[1], torch.tensor([1, 1, 2]))
    assert partition.groups_of == ((0, 1), (1, 2))
    assert partition.tensors_of == ((0,), (0, 1), (1,))


def test_a_scalar_parameter_can_be_given_as_a_part():
    partition = Partition({"t": [("temperature", ...)], "l": ["layer.weight", "layer.bias"]}, Tempered())
    assert partition.sizes == (1, 12)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_assignment_of_entries_is_kept(data):
    model = nn.Linear(3, 2)
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=8, max_size=8)))
    labels[:3] = torch.arange(3)  # no group is empty
    weight, bias = labels[:6].view(2, 3), labels[6:]
    partition = Partition({str(s): [("weight", weight == s), ("bias", bias == s)] for s in range(3)}, model)
    assert torch.equal(partition.labels[0], weight)
    assert torch.equal(partition.labels[1], bias)
    assert list(partition.sizes) == labels.bincount(minlength=3).tolist()
    values = torch.arange(8.0, dtype=torch.float64)
    reduced = partition.reduce([values[:6].view(2, 3), values[6:]])
    assert reduced.tolist() == pytest.approx([values[labels == s].sum().item() for s in range(3)])


# What counts ----------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_left_out_by_every_builder():
    model = small()
    model[0].requires_grad_(False)
    builders = (Partition.canonical, Partition.trivial, Partition.discrete, Partition.by_kind, Partition.by_module)
    for builder in (*builders, lambda m: Partition.chunks(m, 2), lambda m: Partition.from_patterns(m, {"a": "*"})):
        assert builder(model).parameter_names == NAMES[2:]
        assert sum(builder(model).sizes) == 14


def test_parameters_without_entries_are_left_out():
    model = nn.Linear(2, 1)
    model.empty = nn.Parameter(torch.empty(0, 3))
    assert Partition.canonical(model).names == ("weight", "bias")
    assert len(Partition.discrete(model)) == 3


def test_tied_parameters_count_once_and_answer_to_both_names():
    model = Tied()
    assert Partition.canonical(model).names == ("encoder.weight", "encoder.bias", "decoder.bias")
    assert Partition.trivial(model).sizes == (24,)
    for name in ("encoder.weight", "decoder.weight", model.decoder.weight):
        partition = Partition({"tied": [name], "biases": ["encoder.bias", "decoder.bias"]}, model)
        assert partition.sizes == (16, 8)
        assert partition.parameter_names[0] == "encoder.weight"


def test_order_is_the_same_every_time():
    for builder in (Partition.canonical, Partition.by_kind, Partition.by_module, Partition.discrete):
        first, second = builder(small()), builder(small())
        assert first.names == second.names
        assert repr(first) == repr(second)


def test_groups_of_whole_tensors_take_no_memory():
    """Numbers of groups for each entry would take four times what a model in half precision takes."""
    model = nn.Sequential(nn.Linear(10**6, 10**6, device="meta"), nn.Linear(10**6, 1, device="meta"))
    for partition in (Partition.canonical(model), Partition.by_kind(model), Partition.trivial(model)):
        assert all(isinstance(label, int) for label in partition.labels)
        assert sum(partition.sizes) == 10**12 + 2 * 10**6 + 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_model_has_the_names_of_its_module():
    model = small()
    compiled = torch.compile(model)
    assert Partition.canonical(compiled).names == NAMES
    assert Partition({"a": [compiled.get_parameter("_orig_mod.0.weight")], "b": NAMES[1:]}, compiled).sizes == (12, 17)
    assert unwrap(compiled) is model
    assert unwrap(model) is model


# Reading and using ----------------------------------------------------------------------------------------------------


def test_repr_is_a_table():
    assert repr(Partition.by_kind(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2)))) == (
        "Partition of 1,292 scalars into 2 groups\n"
        "  group    tensors  scalars\n"
        "  weights        2    1,260\n"
        "  biases         2       32"
    )
    assert repr(Partition.trivial(nn.Linear(1, 1))).startswith("Partition of 2 scalars into 1 group\n")


@pytest.mark.parametrize(
    ("scalars", "shown", "hidden"), [(40, 40, None), (41, 40, "  … and 1 more"), (1000, 40, "960")]
)
def test_repr_of_many_groups_is_cut(scalars, shown, hidden):
    lines = repr(Partition.discrete(nn.Linear(scalars, 1, bias=False))).splitlines()
    assert len(lines) == 2 + shown + (hidden is not None)
    assert lines[41].split() == ["weight[0,", "39]", "1", "1"]
    if hidden:
        assert hidden in lines[-1]


def test_param_groups_are_what_torch_takes():
    model = small()
    groups = Partition.by_kind(model).param_groups()
    assert [group["name"] for group in groups] == ["weights", "biases", "others"]
    assert [len(group["params"]) for group in groups] == [2, 3, 1]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "biases", "others"]


def test_param_groups_hold_a_split_tensor_once():
    model = nn.Linear(4, 3)
    groups = Partition({"top": [("weight", 0)], "rest": [("weight", slice(1, 3)), "bias"]}, model).param_groups()
    assert [group["name"] for group in groups] == ["rest", "weight"]
    assert groups[0]["params"] == [model.bias]
    assert groups[1]["params"] == [model.weight]
    assert [g["name"] for g in Partition.discrete(model).param_groups()] == ["weight", "bias"]


@pytest.mark.parametrize("builder", [Partition.trivial, Partition.canonical, Partition.by_kind, Partition.discrete])
def test_reduce_is_the_transposed_partition_matrix_and_spread_the_matrix(builder):
    model = small().double()
    partition = builder(model)
    pairs = zip(partition.labels, partition.parameters, strict=True)
    flat = torch.cat([(torch.as_tensor(label) + torch.zeros(p.shape, dtype=int)).flatten() for label, p in pairs])
    matrix = torch.nn.functional.one_hot(flat, len(partition)).double()
    vectors = [torch.randn_like(p) for p in partition.parameters]
    expected = matrix.T @ torch.cat([v.flatten() for v in vectors])
    torch.testing.assert_close(partition.reduce(vectors), expected, rtol=1e-13, atol=1e-13)
    values = torch.randn(len(partition), dtype=torch.float64)
    factors = [torch.as_tensor(f, dtype=torch.float64) for f in partition.spread(values.tolist())]
    spread = torch.cat([f.expand(p.shape).flatten() for f, p in zip(factors, partition.parameters, strict=True)])
    assert torch.equal(spread, matrix @ values)


@pytest.mark.parametrize("size", [300.0, 1e-4])
@pytest.mark.parametrize("split", [False, True])
def test_inner_products_of_half_precision_leave_its_range(size, split):
    model = nn.Linear(4, 1, bias=False, dtype=torch.float16)
    halves = {"a": [("weight", (0, slice(0, 2)))], "b": [("weight", (0, slice(2, 4)))]}
    partition = Partition(halves, model) if split else Partition.trivial(model)
    vector = torch.full((1, 4), size, dtype=torch.float16)
    assert sum(partition.dot([vector], [vector])).item() == pytest.approx(4 * size**2, rel=1e-2)


def test_reduce_takes_none_for_zeros_and_sums_in_float64():
    model = nn.Linear(3, 1)
    partition = Partition({"a": [("weight", (0, 0))], "b": [("weight", (0, slice(1, 3))), "bias"]}, model)
    assert partition.reduce([None, torch.tensor([2.0])]).tolist() == [0.0, 2.0]
    assert partition.reduce([None, None]).tolist() == [0.0, 0.0]
    large = torch.tensor([[1.0, 1e8, 1.0]])
    assert partition.reduce([large, torch.tensor([-1e8])]).tolist() == [1.0, 1.0]
    assert partition.reduce([large, None]).dtype == torch.float64
    assert Partition.canonical(model).reduce([large, None]).tolist() == [1e8 + 2, 0.0]
    products = partition.dot([large, torch.ones(1)], [torch.full_like(large, 2.0), torch.ones(1)])
    assert [product.item() for product in products] == [2.0, 2e8 + 3]


def test_partitions_are_copied_and_pickled():
    partition = Partition.by_kind(small())
    for twin in (copy.deepcopy(partition), pickle.loads(pickle.dumps(partition))):
        assert repr(twin) == repr(partition)
        assert twin.labels == partition.labels


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(groups, model=None, error=ValueError):
    with pytest.raises(error) as caught:
        Partition(groups, model or nn.Linear(4, 3))
    return str(caught.value)


def test_a_parameter_in_two_groups():
    message = refused({"a": ["weight"], "b": ["weight", "bias"]})
    assert message == "parameter 'weight' of shape (3, 4) is in two groups, 'a' and 'b'"
    assert "'weight' of shape (3, 4) is in two groups" in refused({"a": ["weight", "bias"], "b": [("weight", 0)]})
    assert "twice in group 'a'" in refused({"a": ["weight", "weight", "bias"]})
    assert "'encoder.weight'" in refused({"a": ["encoder.weight"], "b": ["decoder.weight"]}, Tied())


def test_a_parameter_in_no_group():
    assert refused({"a": ["weight"]}) == "parameter 'bias' of shape (3,) is in no group: add it to one, or freeze it"
    message = refused({"a": [("weight", slice(0, 2)), "bias"]})
    assert message.startswith("parameter 'weight' of shape (3, 4) is with 4 of its 12 entries in no group")


def test_an_unknown_name_or_parameter():
    assert refused({"a": ["wieght", "bias"]}) == ("group 'a': the model has no parameter 'wieght'; it has weight, bias")
    assert "no parameter of shape (2,)" in refused({"a": [nn.Parameter(torch.ones(2))]})
    assert refused({"a": ["x"]}, deep(5)).endswith("it has 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias, …")


def test_an_empty_group():
    assert refused({"a": [], "b": ["weight", "bias"]}) == "group 'a' is empty: leave it out or give it parameters"
    assert "group 'a' is empty" in refused({"a": [("weight", slice(0, 0))], "b": ["weight", "bias"]})
    assert "in no group" in refused({})


def test_a_frozen_parameter():
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    assert "group 'a': parameter 'bias' is frozen" in refused({"a": ["weight", "bias"]}, model)
    assert "of shape (3,) is frozen" in refused({"a": ["weight", model.bias]}, model)


def test_a_part_that_does_not_exist():
    message = refused({"a": [("weight", 7), "bias"]})
    assert message.startswith("group 'a': no such part of parameter 'weight', of shape (3, 4): index 7")
    for index in (slice(None, None, -1), "x", 0.5):
        assert "group 'a': no such part of parameter 'weight'" in refused({"a": [("weight", index), "bias"]})


@pytest.mark.parametrize(
    "groups",
    [{"a": "weight"}, {"a": [3]}, {"a": [nn.Linear(1, 1)]}, {"a": [(3, 0)]}, {"a": [("weight", 0, 1)]}],
)
def test_what_is_no_group(groups):
    assert "group 'a'" in refused(groups, error=TypeError)
    assert "group 'a' is Parameter, not a list" in refused({"a": nn.Linear(1, 1).weight}, error=TypeError)
    assert "group 'a' is Linear, not a list" in refused({"a": nn.Linear(1, 1)}, error=TypeError)


def test_what_are_no_groups():
    assert refused(["weight"], error=TypeError).endswith("such as {'body': ['0.weight', '0.bias']}, got list")
    assert refused({0: ["weight", "bias"]}, error=TypeError) == "the name of a group must be text, got 0, of type int"


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"group 'x' is empty: '9.\*' matches no trainable parameter"):
        Partition.from_patterns(small(), {"x": "9.*"}, rest="other")
    with pytest.raises(ValueError, match="group 'b' is empty"):
        Partition.from_patterns(small(), {"a": "*", "b": "0.*"})
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"left; '1.weight' is tied to '0.weight', and goes by that name"):
        Partition.from_patterns(model, {"head": "1.*"}, rest="body")
    model[2].requires_grad_(False)
    with pytest.raises(ValueError, match=r"left; '2.weight' is frozen"):
        Partition.from_patterns(model, {"end": "2.*"}, rest="body")


@pytest.mark.parametrize("group", ["a", ""])
def test_a_parameter_that_matches_no_pattern(group):
    with pytest.raises(ValueError, match=r"no pattern matches parameter '1.weight': pass rest="):
        Partition.from_patterns(small(), {group: "0.*"})


def test_depths_and_chunks_out_of_range():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        Partition.by_module(small(), depth=0)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"cannot split 3 layers into {count} chunks: choose 1 to 3"):
            Partition.chunks(small(), count)


@pytest.mark.parametrize("model", [nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)])
def test_a_model_without_trainable_parameters(model):
    for builder in (Partition.canonical, Partition.trivial, Partition.discrete, Partition.by_kind):
        with pytest.raises(ValueError, match="has no trainable parameters"):
            builder(model)


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        Partition.canonical([nn.Linear(1, 1)])


def test_parameters_on_two_devices():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"parameter '1.weight' is on meta, '0.weight' on cpu: move the model to one"):
        _ = Partition.canonical(model).device
    assert Partition.canonical(small()).device == torch.device("cpu")


# By name, wherever a partition is taken -------------------------------------------------------------------------------


def mean_square(model, batch):
    return model(batch).square().mean()


TAKERS = {
    "summarize": lambda model, partition: ns.summarize(mean_square, model, [torch.ones(2, 4)], partition=partition),
    "losses_along": lambda model, partition: losses_along(
        mean_square, model, torch.ones(2, 4), [1.0], direction=list(model.parameters()), partition=partition
    ),
    "NewtonSummary": lambda model, partition: ns.NewtonSummary(model, mean_square, partition=partition),
    "paper": lambda model, partition: ns.NewtonSummary.paper(model, mean_square, partition=partition),
    "Monitor": lambda model, partition: ns.Monitor(
        model, mean_square, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), partition=partition
    ),
    "suggest_rates": lambda model, partition: ns.suggest_rates(
        mean_square,
        model,
        [torch.ones(2, 4)] * 3,
        torch.optim.SGD(model.parameters(), lr=0.01),
        partition=partition,
        steps=2,
    ),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_everything_that_takes_a_partition_takes_names(take):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="unknown partition 'layers': choose one of trivial, canonical, discrete, by_"):
        take(model, "layers")
    with pytest.raises(TypeError, match=r"Partition.canonical\(model\), or one of the names .*; got function"):
        take(model, lambda model: None)
    taken = take(model, "by_kind")
    groups = {"partition": lambda: taken.partition.names, "names": lambda: taken.names, "rates": lambda: [*taken.rates]}
    found = next((read() for what, read in groups.items() if hasattr(taken, what)), None)
    assert len(taken if found is None else found) == 2
    if found is not None:
        assert tuple(found) == ("weights", "biases")


@pytest.mark.parametrize("name", ["trivial", "canonical", "discrete", "by_kind", "by_module"])
def test_a_name_is_that_of_a_constructor(name):
    model = small()
    partition = resolve_partition(name, model)
    assert partition.names == getattr(Partition, name)(model).names
    assert resolve_partition(partition, model) is partition
