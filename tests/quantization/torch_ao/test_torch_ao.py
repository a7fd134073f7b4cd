"""The fx and eager backends: prepared models equal float ones, int8 ones fake-quantized ones; others are refused."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub

from dist_train.config.stages import RuleConfig
from dist_train.errors import ArtifactError, QuantizationError
from dist_train.models.quantizable import build
from dist_train.programs.program import Program, open_program
from dist_train.quantization.backend import QuantizationBackend
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.torch_ao.prepared_modules import PreparedModules
from dist_train.registry import torchvision_names
from tests.support.one_net_all_backends import StubNet, backend, digests
from tests.support.ranks import ROOT, call
from tests.support.tiny_nets import calibrate, draw_statistics
from tests.support.versions import NEEDS_PT2E

BOUND = 1e-4
BACKENDS = ["fx", "eager"]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.abs().max())


def statistics(model: nn.Module) -> list[Tensor]:
    return [value.clone() for name, value in model.named_buffers() if "running_" in name]


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def net() -> nn.Module:
    return draw_statistics(StubNet()).eval()


@pytest.fixture
def prepared(name: str, net: nn.Module, images: Tensor) -> PreparedModules:
    made = backend(name).prepare(net, images)
    assert isinstance(made, PreparedModules)
    return made


def test_the_backends_keep_the_protocol(name: str) -> None:
    assert isinstance(backend(name), QuantizationBackend)


def test_prepared_equals_float_and_a_planted_eps_does_not(
    net: nn.Module, prepared: PreparedModules, images: Tensor
) -> None:
    prepared.fake_quantize(False)
    assert relative(prepared(images), net(images)) < BOUND
    assert sorted(prepared.batch_norms) == ["bn1", "bn2"]
    prepared.get_submodule(prepared.batch_norms["bn1"]).eps = 1e-5
    assert relative(prepared(images), net(images)) > 100 * BOUND


def test_the_float_model_and_the_global_generator_are_left_alone(name: str, net: nn.Module, images: Tensor) -> None:
    before, random, engine = copy.deepcopy(net.state_dict()), torch.get_rng_state(), torch.backends.quantized.engine
    made = backend(name, "onednn").prepare(net.train(), images)
    backend(name, "onednn").convert(calibrate(made, images))(images)
    assert net.training and made.training
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.quantized.engine == engine


def test_without_fake_quantization_a_training_step_is_that_of_the_float_model(
    net: nn.Module, prepared: PreparedModules, images: Tensor
) -> None:
    net.train()
    net.get_submodule("dropout").eval()  # it is off in the prepared model
    prepared.train()
    prepared.fake_quantize(False)
    for _ in range(3):
        for model in (net, prepared):
            model.zero_grad()
            model(images).square().sum().backward()
    grad, expected = prepared.get_parameter("model.conv1.weight").grad, net.get_parameter("conv1.weight").grad
    assert grad is not None and expected is not None
    assert (grad - expected).norm() <= 1e-4 * expected.norm()
    for float_name, here in prepared.batch_norms.items():  # momentum 0.01 and 0.3, each kept
        for kind in ("running_mean", "running_var"):
            torch.testing.assert_close(
                prepared.get_buffer(f"{here}.{kind}"), net.get_buffer(f"{float_name}.{kind}"), rtol=1e-4, atol=1e-5
            )


def test_freezing_batch_norm_stops_statistics_in_every_later_mode_and_lets_gradients_flow(
    prepared: PreparedModules, images: Tensor
) -> None:
    calibrate(prepared, images).train()
    before = statistics(prepared)
    prepared(images)
    assert not all(map(torch.equal, before, statistics(prepared)))
    prepared.freeze_batch_norm()
    before = statistics(prepared)
    prepared.eval().train()
    prepared(images).sum().backward()
    assert all(map(torch.equal, before, statistics(prepared)))
    assert all(parameter.grad is not None for parameter in prepared.parameters())


def test_state_and_copies_make_the_round_trip_bit_by_bit(prepared: PreparedModules, images: Tensor) -> None:
    fresh = copy.deepcopy(prepared)
    calibrate(prepared, images).observe(False)
    copied, expected = copy.deepcopy(prepared), prepared(images)
    fresh.load_state_dict(dict(prepared.state_dict()))
    assert Ranges(fresh).digest() == Ranges(prepared).digest()
    with torch.no_grad():
        for value in [*prepared.parameters(), *prepared.buffers()]:
            value.fill_(1)
    assert torch.equal(copied(images), expected)
    fresh.observe(False)
    assert torch.equal(fresh(images), expected)


def test_int8_agrees_with_fake_quantization_on_a_trained_net(name: str, images: Tensor) -> None:
    made = backend(name).prepare(StubNet(), images)
    colours = torch.rand(512, 3, 1, 1)
    x, labels = colours + 0.1 * torch.rand(512, 3, 16, 16), colours.flatten(1).argmax(1)
    calibrate(made, x[:64]).train()
    made.freeze_batch_norm()
    optimizer, ranges = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9), Ranges(made)
    for step in range(64):
        rows = slice(step % 16 * 32, (step % 16 + 1) * 32)
        F.cross_entropy(made(x[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranges.update(ranges.observed(), 0.1)
    made.eval().observe(False)
    with torch.no_grad():
        fake, integer = made(x), backend(name).convert(made)(x)
    assert (fake.argmax(1) == integer.argmax(1)).float().mean() >= 0.97
    assert relative(integer, fake) < 0.05
    assert (fake.argmax(1) == labels).float().mean() > 0.6, "the net learned to tell classes apart"


def test_the_program_answers_as_the_model_for_any_batch_and_its_state_is_int8_without_code(
    name: str, prepared: PreparedModules, images: Tensor
) -> None:
    converted = backend(name).convert(calibrate(prepared, images))
    program = backend(name).serialize(converted, images[:1])
    assert program.kind == "torchscript"
    loaded = open_program(program)
    for rows in (1, 5, 8):
        assert torch.equal(loaded(images[:rows]), converted(images[:rows]))
    state = torch.load(io.BytesIO(program.extra["state_dict.pt"]), weights_only=True)
    weights = [part for value in state.values() for part in (value if isinstance(value, tuple) else (value,))]
    integers = [w.numel() for w in weights if isinstance(w, Tensor) and w.dtype in (torch.qint8, torch.int8)]
    assert sorted(integers) == sorted([8 * 3 * 9, 8 * 8 * 9, 5 * 8])


@pytest.mark.slow
def test_programs_are_equal_in_another_process_whatever_was_traced_before() -> None:
    code = (
        "import json; from tests.support.one_net_all_backends import digests; "
        "print(json.dumps([digests('fx'), digests('eager')]))"
    )
    answer = fresh_process(code)
    eager, fx = digests("eager"), digests("fx")
    assert json.loads(answer.splitlines()[-1]) == [fx, eager]
    assert fx != eager


def fresh_process(code: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    ("engine", "range_max", "scales"), [("x86", 127, 8), ("fbgemm", 127, 8), ("onednn", 255, 8), ("qnnpack", 255, 1)]
)
def test_ranges_and_weights_are_those_of_the_engine(
    engine: str, range_max: int, scales: int, name: str, net: nn.Module, images: Tensor
) -> None:
    made = calibrate(backend(name, engine).prepare(net, images), images)
    first = made.fake_quantizers[0]
    torch.testing.assert_close(first.scale, images.max() / range_max)
    # Beyond the range the kernels go on up to 255, and so does the simulation.
    assert float(first(torch.tensor(1e6))) == pytest.approx(float(255 * first.scale))
    fake = made.get_submodule("model.conv1.weight_fake_quant")
    assert fake.scale(net.get_parameter("conv1.weight")).numel() == scales  # type: ignore[operator]
    integer = backend(name, engine).convert(made)
    assert relative(integer(images), made(images)) < 0.06


def test_convert_without_ranges_names_what_lacks_them(name: str, prepared: PreparedModules) -> None:
    with pytest.raises(QuantizationError, match="activations have no range"):
        backend(name).convert(prepared)


@pytest.mark.slow
def test_two_ranks_merge_their_ranges_to_the_same_bits() -> None:
    first, second = call(2, "tests.support.one_net_all_backends:ranges_of_rank", BACKENDS)
    assert first == second
    for found in first:
        assert found["unknown"] == []
        assert found["first"] == 2.0, "rank 1's input counts"


def test_a_rule_leaves_a_layer_in_floating_point_under_fx_and_is_refused_by_eager(
    net: nn.Module, images: Tensor
) -> None:
    rules = [RuleConfig(match="conv2", skip=True)]
    made = backend("fx").prepare(net, images, rules)
    converted = backend("fx").convert(calibrate(made, images))
    floats = [value.shape for value in converted.state_dict().values() if getattr(value, "dtype", None) == torch.float]
    assert net.get_parameter("conv2.weight").shape in floats
    assert relative(converted(images), made(images)) < 0.05
    with pytest.raises(QuantizationError, match="eager backend takes no rules") as error:
        backend("eager").check(net, rules)
    assert "--qat.backend pt2e" in error.value.hint


def test_under_fx_a_rule_gives_a_layer_one_scale_and_other_rules_are_refused(net: nn.Module, images: Tensor) -> None:
    def rule(**settings: object) -> RuleConfig:
        return RuleConfig.model_validate({"match": "conv*", **settings})

    made = backend("fx").prepare(net, images, [rule(weight={"granularity": "tensor"})])
    converted = backend("fx").convert(calibrate(made, images))
    assert relative(converted(images), made(images)) < 0.05
    kernels = dict(converted.named_modules())
    assert kernels["model.conv2"].weight().qscheme() == torch.per_tensor_affine
    assert len(kernels["model.fc"].scale) == 5
    for settings in ({"weight": {"bits": 4}}, {"weight": {"scheme": "affine"}}, {"activation": {}}):
        with pytest.raises(QuantizationError, match="fx backend's integer kernels") as error:
            backend("fx").check(net, [rule(**settings)])
        assert error.value.hint == "--qat.backend pt2e"


class Twice(nn.Module):
    """Has layers that are called twice, functional dropout, a batch norm without weight, and a dead channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.last, self.bn, self.bare = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.01), nn.BatchNorm2d(4, affine=False)
        nn.init.zeros_(self.bn.weight[:1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(self.relu(self.conv(x))))
        return F.dropout(self.bare(self.bn(self.last(x))), 0.5, self.training).mean((2, 3))


def test_fx_takes_layers_called_twice_functional_dropout_and_odd_batch_norms(images: Tensor) -> None:
    model = Twice().eval()
    made = backend("fx").prepare(model, images)
    made.fake_quantize(False)
    assert relative(made(images), model(images)) < BOUND
    made.fake_quantize(True)
    calibrate(made, images).observe(False)
    assert relative(backend("fx").convert(made)(images), made(images)) < 0.06
    twin = copy.deepcopy(made.train())
    assert torch.equal(made(images), twin(images)), "dropout is off in training"
    made(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "kind", ["quantized_resnet18", pytest.param("quantized_mobilenet_v3_large", marks=pytest.mark.slow)]
)
def test_torchvision_s_quantizable_models_the_whole_way(kind: str) -> None:
    model = draw_statistics(build(kind, num_classes=10, in_channels=1)).eval()
    names = set(model.state_dict())
    x = torch.rand(2, 1, 32, 32)
    made = backend("eager", "fbgemm").prepare(model, x)
    made.fake_quantize(False)
    assert relative(made(x), model(x)) < BOUND
    made.fake_quantize(True)
    calibrate(made, x).observe(False)
    fresh = backend("eager", "fbgemm").prepare(model, x)
    fresh.load_state_dict(dict(made.state_dict()))
    converted = backend("eager", "fbgemm").convert(made)
    assert relative(converted(x), made(x)) < 0.1
    assert set(model.state_dict()) == names, "the float stage keeps its names"
    size = sum(value.nbytes for value in model.state_dict().values())
    assert len(backend("eager", "fbgemm").serialize(converted, x).data) < 0.3 * size


def test_every_quantizable_model_of_torchvision_has_its_name() -> None:
    names = torchvision.models.list_models(module=torchvision.models.quantization)
    assert sorted(names) == sorted(torchvision_names.QUANTIZABLE)


@pytest.mark.parametrize("kind", ["quantized_googlenet", "quantized_shufflenet_v2_x0_5"])
def test_quantizable_models_return_one_tensor_in_training_for_any_number_of_channels(kind: str) -> None:
    out = build(kind, num_classes=7, in_channels=2).train()(torch.rand(2, 2, 64, 64))
    assert out.shape == (2, 7)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def stubs(*parts: nn.Module) -> nn.Module:
    model = nn.Sequential(QuantStub(), *parts, DeQuantStub())
    model.fuse_model = lambda is_qat: None  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("kind", "model", "message", "hint"),
    [
        ("eager", nn.Conv2d(3, 4, 3), "Conv2d has no QuantStub, no DeQuantStub, no method fuse_model", "pt2e"),
        (
            "eager",
            nn.Sequential(QuantStub(), DeQuantStub()),
            "Sequential has no method fuse_model",
            "quantized_resnet18",
        ),
        ("eager", stubs(nn.BatchNorm2d(3, track_running_stats=False)), "1: .*running statistics", "track_running"),
        ("fx", nn.Sequential(nn.BatchNorm2d(3, momentum=None)), "0: .*momentum=None", "0.1"),
        ("fx", Branching(), "torch.fx cannot trace Branching", "--qat.backend pt2e"),
        ("fx", nn.Sequential(nn.Flatten(), nn.Softmax(1)), "nothing that can be quantized", "stages"),
    ],
)
def test_what_cannot_be_prepared_says_what_to_change(
    kind: str, model: nn.Module, message: str, hint: str, images: Tensor
) -> None:
    with pytest.raises(QuantizationError, match=message) as error:
        backend(kind).prepare(model, images)
    assert hint in error.value.hint


def test_kernels_that_this_torch_lacks_are_refused_with_those_it_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", ["none", "onednn"])
    with pytest.raises(QuantizationError, match="no integer kernels 'qnnpack'") as error:
        backend(name, "qnnpack")
    assert error.value.hint == "--qat.engine onednn"


@pytest.mark.heavy
@NEEDS_PT2E
def test_where_torch_dropped_torch_ao_the_error_names_pt2e() -> None:
    printed = fresh_process("""
import sys, torch
sys.modules["torch.ao.quantization.quantize_fx"] = None
from dist_train import registry
from dist_train.errors import QuantizationError
for name in ("fx", "eager"):
    try:
        registry.quantization_backends.get(name)
    except QuantizationError as error:
        print(name, str(error).splitlines()[0], "|", error.hint)
registry.quantization_backends.get("pt2e")
""")
    assert [line.split()[0] for line in printed.splitlines()] == BACKENDS
    assert printed.count("no longer has | --qat.backend pt2e") == 2


def test_a_damaged_script_is_refused(name: str, prepared: PreparedModules, images: Tensor) -> None:
    data = backend(name).serialize(backend(name).convert(calibrate(prepared, images)), images).data
    for damaged in (b"", data[: len(data) // 2], data.replace(b"x86", b"abc")):
        with pytest.raises(ArtifactError):
            open_program(Program("torchscript", damaged))
