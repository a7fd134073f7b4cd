"""The torch and torchao versions this package was tested with, and the private parts of them that it touches.

PT2E is a prototype API: it may change in any release, and a silent change would cost accuracy rather than raise. So an untested
version is refused. To move to a new one, look at what is listed here, run tests/quantization, and extend `TESTED`.

    torchao.quantization.pt2e.quantize_pt2e     prepare_qat_pt2e, convert_pt2e: the literals that they rewrite (see graph_rewrite.py)
    torchao.quantization.pt2e.quantizer.x86_inductor_quantizer    X86InductorQuantizer.annotate, overridden in quantizer.py, and its _annotate_with_config
    torchao.quantization.pt2e.qat_utils._get_aten_graph_module_for_pattern   replaced while preparing, see patterns.py
    node.meta["source_fn_stack"]                of a convolution's pad, see padding.py
    node.meta["quantization_annotation"]        removed where it is empty; its specifications replaced where a rule says so
    torchao.quantization.pt2e.FakeQuantizeBase  the base by which convert finds fake-quantize modules, and `calculate_qparams`
    GraphModule.meta["_observed_graph_module_attrs"]   what prepare leaves for convert; kept in `prepared.Blueprint.meta`
    GraphModule.train / .eval                   replaced on the instance by prepare and convert with functions that raise
    type(GraphModule).forward                   the generated function of a graph, taken unbound by prepared.py
    node.meta["nn_module_stack"]                the module path of a node, for names and messages
    nn.Module._load_from_state_dict             overridden by ActivationFakeQuantize to follow its `initialized` buffer
    torch._dynamo.exc                           the errors of a strict export
    torch.ao.quantization                       deprecated; torch_ao.py imports all that fx and eager use, and says so where it is gone
    torch.ao.quantization.observer._with_args   how its qconfigs are compared; `activation_post_process` of a fake-quantize module
    torch.ao.nn.intrinsic.qat                   that fusing keeps the tensors of batch norms (`statistics_names`)
    ___torch_mangle_<n>, .debug_pkl             what torchscript.py takes out of an archive
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
