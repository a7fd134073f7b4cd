"""Versions of torch and torchao that were tested, and the private parts of them that this package uses.

PT2E is a prototype API: it may change in any release, and a silent change would cost accuracy rather than raise. So an
untested version is refused. To move to a new one, check the parts listed here, run tests/quantization, and extend
`TESTED`.

torchao.quantization.pt2e:

- quantize_pt2e: prepare_qat_pt2e and convert_pt2e, for the literals that they rewrite (pt2e/graph_rewrite.py).
- quantizer.x86_inductor_quantizer: X86InductorQuantizer.annotate, overridden in pt2e/quantizer.py, and its
  _annotate_with_config.
- qat_utils._get_aten_graph_module_for_pattern: replaced while preparing (pt2e/pattern_cache.py).
- FakeQuantizeBase: the base by which convert finds fake-quantize modules, and `calculate_qparams`.

torch.fx and torch.export:

- node.meta["source_fn_stack"]: of a convolution's pad (padding.py).
- node.meta["quantization_annotation"]: removed where it is empty; its specifications are replaced by rules.
- node.meta["nn_module_stack"]: the module path of a node, for names and messages.
- GraphModule.meta["_observed_graph_module_attrs"]: passed from prepare to convert; kept in `Blueprint.meta`.
- GraphModule.train and .eval: replaced on the instance by prepare and convert with functions that raise.
- type(GraphModule).forward: the generated function of a graph, taken unbound (pt2e/prepared_graph.py).
- nn.Module._load_from_state_dict: overridden by ActivationFakeQuantize to follow its `initialized` buffer.
- torch._dynamo.exc: the errors of a strict export.

torch.ao.quantization, which is deprecated (torch_ao/common.py imports it, and raises where it is gone):

- observer._with_args: by which qconfigs are compared; `activation_post_process` of a fake-quantize module.
- torch.ao.nn.intrinsic.qat: fusing keeps the tensors of batch norms (`statistics_names`).
- ___torch_mangle_<n>, .debug_pkl: removed from TorchScript archives (programs/torchscript.py).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from dist_train.errors import QuantizationError

TESTED: dict[str, tuple[str, ...]] = {"torch": ("2.14", "2.15"), "torchao": ("0.18",)}


def check_versions() -> None:
    """Refuses to quantize with versions of torch or torchao that were not tested.

    Raises:
        QuantizationError: a library is missing or another version is installed; the hint is the pip command.
    """
    command = "pip install " + " ".join(f"'{name}=={tested[-1]}.*'" for name, tested in TESTED.items())
    for name, tested in TESTED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise QuantizationError(f"the pt2e backend needs {name}, which is not installed", command) from None
        if ".".join(installed.split(".")[:2]) not in tested:
            raise QuantizationError(
                f"the pt2e backend was tested with {name} {' and '.join(tested)}, but {installed} is installed", command
            )
