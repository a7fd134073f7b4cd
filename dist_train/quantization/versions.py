"""Versions of torch and torchao that the pt2e backend was tested with, and the private parts of both that are used.

PT2E is a prototype API: it may change in any release, and a silent change would cost accuracy rather than raise.
So pt2e refuses an untested version when it is set up. Nothing else looks at versions. To move to a new one, read the
parts listed here, run tests/quantization, extend `TESTED`, and extend the extra `pt2e` in setup.cfg.

pt2e alone:

    torchao.quantization.pt2e.quantize_pt2e     prepare_qat_pt2e, convert_pt2e: the literals that they rewrite
                                                (see graph_rewrite.py)
    torchao.quantization.pt2e.quantizer.x86_inductor_quantizer
                                                X86InductorQuantizer.annotate and _annotate_with_config (quantizer.py)
    torchao.quantization.pt2e.qat_utils._get_aten_graph_module_for_pattern, _fuse_conv_bn_qat_helper
                                                replaced while preparing (pattern_cache.py)
    torchao.quantization.pt2e.FakeQuantizeBase  the base by which convert finds fake-quantize modules; their
                                                `with_args` and `calculate_qparams`
    node.meta["source_fn_stack"]                of a convolution's pad (padding.py)
    node.meta["quantization_annotation"]        removed where it is empty; its specifications replaced by rules
    GraphModule.meta["_observed_graph_module_attrs"]
                                                left by prepare for convert; kept in `prepared_graph.Blueprint.meta`
    GraphModule.train, .eval                    prepare and convert replace them by functions that raise
    type(GraphModule).forward                   the generated function of a graph, taken unbound by prepared_graph.py
    torch._export.verifier.SpecViolationError   an error of a strict export

fx and eager, whose unit tests ran with torch 2.11, 2.14 and 2.15 (.ci/versions):

    torch.ao.quantization                       deprecated; torch_ao/common.py says so where it is gone
    torch.ao.quantization.observer._with_args   makes the factories that its qconfigs compare
    activation_post_process                     of a fake-quantize module: the bounds that torch.ao reads
    torch.ao.nn.intrinsic.qat                   that fusing keeps the tensors of batch norms (`statistics_names`)
    ___torch_mangle_<n>, .debug_pkl             removed from an archive by programs/torchscript.py

pt2e and fx, of attention (attention.py, torch_ao/window_attention.py), whose tests compare results with torch's own:

    nn.TransformerEncoderLayer._sa_block, _ff_block
                                                called by a forward without the fast path
    nn.modules.linear.NonDynamicallyQuantizableLinear
                                                the class of MultiheadAttention's out_proj
    torchvision.models.swin_transformer         attributes of ShiftedWindowAttention and ShiftedWindowAttentionV2

Everything:

    torch.ao.quantization.fx._decomposed        registers the operators of quantized programs (programs/pt2.py)
    torch._dynamo.exc, torch._dynamo.config     errors of torch.compile and of exports; the limit of recompilations
    torch._inductor.config                      freezing, for int8 by Inductor (lowering/inductor.py)
    torch._foreach_copy_, torch._foreach_mul_   copies and scales lists of tensors in one kernel
    torch.cpu._is_amx_tile_supported, _is_avx512_bf16_supported
                                                bfloat16 in hardware; there is no public query
    torch.utils.data._utils.signal_handling._error_if_any_worker_fails
                                                which data worker ended, and by which signal (data/workers.py)
    _BaseDataLoaderIter._shutdown, _workers     set on an iterator that could not start its workers; how they ended
    torch.utils._python_dispatch.TorchDispatchMode
                                                the operators of a model (models/fingerprint.py)
    DTensor.__create_chunk_list__               a rank's part of a tensor in shards (run_dir/shards.py)
    nn.modules.batchnorm._BatchNorm, conv._ConvNd, dropout._DropoutNd
                                                the common bases of layers
    node.meta["nn_module_stack"]                the module path of a node, for names and messages
    nn.Module._load_from_state_dict             overridden by ActivationFakeQuantize to follow its `initialized` buffer
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dist_train.errors import BackendVersionError

# torchvision is here for the command alone: each of its releases goes with one of torch.
TESTED = {"torch": ">=2.14,<2.16", "torchvision": ">=0.29,<0.30", "torchao": ">=0.18,<0.19"}
_CHECKED = ("torch", "torchao")


def check_versions() -> None:
    """Refuses versions of torch or torchao that pt2e was not tested with.

    Raises:
        BackendVersionError: the hint is the pip command, or another backend.
    """
    command = "pip install " + " ".join(f"'{name}{tested}'" for name, tested in TESTED.items())
    hint = f"{command}, or --qat.backend fx"
    for name in _CHECKED:
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise BackendVersionError(f"the pt2e backend needs {name}, which is not installed", hint) from None
        # Builds between releases (2.14.0a0+git1234) count as the release that they lead to.
        if not SpecifierSet(TESTED[name]).contains(Version(installed).base_version):
            raise BackendVersionError(
                f"the pt2e backend was tested with {name}{TESTED[name]}, and {installed} is installed", hint
            )
