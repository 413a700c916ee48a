# SPDX-License-Identifier: Apache-2.0
"""What can't be pruned is refused by name, with what to do instead, and is left exactly as it was."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed
from torch import nn
from torch._subclasses import FakeTensorMode

import fxslim
from fxslim import ConfigError, FxslimError, PlanError, TraceError, UnsupportedLayerError
from tests.pruning.small_models import X, assert_unchanged, small, snapshot


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def refused_everywhere(model: nn.Module, message: str) -> None:
    """Tracing, planning, verifying and applying all say the same."""
    plan = fxslim.plan_pruning(small(), X)
    for attempt in (
        lambda: fxslim.trace(model, X),
        lambda: fxslim.prune(model, X),
        lambda: plan.verify(model, X),
        lambda: plan.apply(model),
    ):
        with pytest.raises(UnsupportedLayerError, match=message):
            attempt()


def test_distributed_wrappers(process_group: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(small())
    before = snapshot(wrapped.module)
    refused_everywhere(wrapped, "DistributedDataParallel: apply before wrapping, on the module inside")
    refused_everywhere(nn.Sequential(wrapped), r"DistributedDataParallel \(0\): apply before wrapping")
    assert_unchanged(before, snapshot(wrapped.module))
    loss = wrapped(X).sum()
    loss.backward()
    pruned = nn.parallel.DistributedDataParallel(fxslim.prune(wrapped.module, X))
    pruned(X).sum().backward()


def test_sharded_models(process_group: None) -> None:
    sharding = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    refused_everywhere(sharding.fully_shard(small(), mesh=mesh), r"FSDP.*apply before fully_shard")
    distributed = small()
    for name, parameter in list(distributed[0].named_parameters()):
        spread = torch.distributed.tensor.distribute_tensor(parameter.detach(), mesh)
        distributed[0].register_parameter(name, nn.Parameter(spread))
    refused_everywhere(distributed, r"0\.weight is a DTensor: it is spread over several devices")


def test_data_parallel() -> None:
    refused_everywhere(nn.DataParallel(small()), "DataParallel: apply before wrapping, on the module inside")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_forms() -> None:
    model = small().eval()
    refused_everywhere(torch.jit.script(model), "ScriptModule: .*use the Python model, and script or trace it after")
    refused_everywhere(torch.jit.trace(model, X), "TopLevelTracedModule: .*use the Python model")
    refused_everywhere(nn.Sequential(torch.jit.script(model)), r"RecursiveScriptModule \(0\): .*use the Python model")
    program = torch.export.export(model, (X,))
    refused_everywhere(program, "ExportedProgram: .*use the model that was exported, and export it afterwards")
    refused_everywhere(program.module(), "GraphModule: .*use the model that was exported")


def test_tensors_without_values_or_shapes() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = small()
    refused_everywhere(fake, r"0\.weight is a FakeTensor: .*meta device")
    lazy = small()
    lazy[0] = nn.LazyConv2d(16, 3)
    refused_everywhere(lazy, r"0\.weight has no shape yet, since it is lazy: call the model once")
    with torch.inference_mode():
        inference = small()
    refused_everywhere(inference, r"0\.weight was made under torch.inference_mode\(\)")


@pytest.mark.parametrize("value", [None, "model", X, nn.Conv2d])
def test_what_is_no_model(value: object) -> None:
    refused_everywhere(value, r"expected a model \(torch\.nn\.Module\), got")


SETTINGS = [
    ({"ratio": 1.0}, ConfigError, r"ratio=1\.0 must be in \[0, 1\)"),
    ({"ratio": -0.1}, ConfigError, r"ratio=-0\.1"),
    ({"ratio": float("nan")}, ConfigError, "ratio=nan"),
    ({"ratio": True}, ConfigError, "ratio=True"),
    ({"max_ratio": 1.5}, ConfigError, r"max_ratio=1\.5"),
    ({"skip": "3.weigth"}, ConfigError, r"skip: unknown layer '3\.weigth'"),
    ({"importance": "random", "seed": -1}, ConfigError, "seed=-1 must be an integer of at least 0"),
    ({"target": "params", "importance": "L2"}, ConfigError, "unknown importance 'L2'; did you mean 'l2'"),
]


@pytest.mark.parametrize("settings, error, message", SETTINGS)
def test_settings(settings: dict, error: type, message: str) -> None:
    model = small()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fxslim.prune(model, X, **settings)
    assert_unchanged(before, snapshot(model))


INPUTS = {
    "one channel too many": torch.randn(2, 4, 16, 16),
    "too small": torch.randn(2, 3, 2, 2),
    "integers": torch.ones(2, 3, 16, 16, dtype=torch.long),
    "another device": X.to("meta"),
    "double": X.double(),
    "text": "image",
    "nothing": None,
    "two": (X, X),
    "unknown keyword": {"pixels": X},
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str) -> None:
    model = small()
    before = snapshot(model)
    plan = fxslim.plan_pruning(model, X)
    message = r"the model's own forward failed while it was recorded in eval mode with Inputs\("
    with pytest.raises(TraceError, match=message):
        fxslim.prune(model, INPUTS[name])
    if name != "double":
        with pytest.raises(TraceError, match=r"verify compares in float64, and the model's own forward fails there"):
            plan.verify(model, INPUTS[name])
    assert_unchanged(before, snapshot(model))


def test_weights_that_are_not_finite() -> None:
    model = small()
    with torch.no_grad():
        model[3].weight[2] = torch.nan
    with pytest.raises(ConfigError, match=r"3\.weight has NaN or infinity in \d+ of \d+ channels: mend"):
        fxslim.plan_pruning(model, X)
    assert fxslim.plan_pruning(model, X, importance="random").cuts


def test_plans_for_other_models_name_the_first_difference() -> None:
    plan = fxslim.plan_pruning(small(), X)
    wider, longer, shorter = small(), small(), small()[:6]
    wider[3] = nn.Conv2d(16, 32, 3, bias=False)
    longer.append(nn.Linear(5, 2))
    cases = [
        (wider, r"3\.weight is \(32, 16, 3, 3\), the plan was made for \(24, 16, 3, 3\)"),
        (longer, r"the plan does not know 9\.bias \(2,\)"),
        (shorter, r"it has no 8\.weight, which the plan knows as \(5, 24\)"),
        (plan.apply(small()), "the plan was made for"),
    ]
    for model, message in cases:
        before = snapshot(model)
        for attempt in (lambda model=model: plan.apply(model), lambda model=model: plan.verify(model, X)):
            with pytest.raises(PlanError, match=f"the plan does not fit this model: .*{message}"):
                attempt()
        assert_unchanged(before, snapshot(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_refusal_is_an_error_of_fxslim() -> None:
    for model in (None, nn.DataParallel(small()), torch.jit.script(small())):
        with pytest.raises(FxslimError, match=r"model|apply|use"):
            fxslim.trace(model, X)
