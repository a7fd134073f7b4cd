"""The PT2E backend: torchao's placement and conversion, with our own fake quantization."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from dist_train import trees
from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.programs.modes import AUTOCAST, inline_modes
from dist_train.programs.program import Program
from dist_train.programs.pt2 import export_program, program_bytes
from dist_train.programs.signature import Dynamic, dynamic_shapes, plain_outputs, rows_to_trace
from dist_train.quantization.attention import open_attention
from dist_train.quantization.batch_norm_calls import settled_batch_norms
from dist_train.quantization.dry_run import GRADIENT_BOUND, dry_run
from dist_train.quantization.error_location import cannot_trace
from dist_train.quantization.fake_quantize import WeightFakeQuantize
from dist_train.quantization.float_checks import (
    keep_invertible,
    quietly,
    refuse_cumulative_average,
    refuse_names,
    refuse_untracked_statistics,
)
from dist_train.quantization.fx_nodes import layer_of, name_fake_quantizers
from dist_train.quantization.gradient_causes import hidden_from_quantization
from dist_train.quantization.padding import number_graph_paddings, part_from_convolutions
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e import graph_rewrite
from dist_train.quantization.pt2e.float_graph import (
    drop_assertions,
    drop_neutral_arithmetic,
    hides_weights,
    refuse_other_blocks,
)
from dist_train.quantization.pt2e.graph_rewrite import attribute, constant
from dist_train.quantization.pt2e.partition_search import searched_along_edges
from dist_train.quantization.pt2e.pattern_cache import few_patterns
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from dist_train.quantization.pt2e.quantizer import RuleQuantizer
from dist_train.quantization.pt2e.torchao_parts import convert_pt2e, prepare_qat_pt2e
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules
from dist_train.trees import Tree


class PT2EBackend:
    """Implements `dist_train.quantization.backend.QuantizationBackend`."""

    def __init__(
        self, gradient_bound: float = GRADIENT_BOUND, engine: str = "auto", dynamic: Dynamic | None = None
    ) -> None:
        """
        Args:
            gradient_bound: as `qat.gradient_bound`, for `check`.
            engine: as `qat.engine`: x86 or fbgemm keep activations to 127 steps, any other gives them 255.
                A run resolves auto before (pipeline/auto.py).
            dynamic: dimensions of the inputs that vary besides the batch.
        """
        self.gradient_bound = gradient_bound
        self._dynamic = dynamic
        self._narrow = engine in ("x86", "fbgemm")

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: Tree | None = None) -> None:
        """See QuantizationBackend.check."""
        _checked_rules(model, rules)
        if example is not None:
            dry_run(self, model, example, rules, instead="fx", serialize=False, gradient_bound=self.gradient_bound)

    def prepare(self, model: nn.Module, example: Tree, rules: Sequence[RuleConfig] = ()) -> PreparedGraph:
        """See QuantizationBackend.prepare. The result is on the model's device and in its mode."""
        quantizer = RuleQuantizer(_checked_rules(model, rules), self._narrow)
        with quietly(), few_patterns(), searched_along_edges():
            float_copy = copy.deepcopy(model).eval()
            open_attention(float_copy)
            graph = _exported(float_copy, example, self._dynamic)
            number_graph_paddings(graph.graph)
            part_from_convolutions(graph.graph)
            drop_assertions(graph)
            drop_neutral_arithmetic(graph.graph)
            _keep_batch_norms_invertible(graph)
            literals = graph_rewrite.batch_norm_literals(graph.graph)
            quantized = prepare_qat_pt2e(graph, quantizer)
        graph_rewrite.restore_batch_norms(quantized.graph, literals)
        graph_rewrite.undo_needless_folding(quantized.graph)
        graph_rewrite.divide_weights(quantized.graph)
        name_fake_quantizers(quantized)
        _keep_unused_buffers(quantized, float_copy)
        prepared = PreparedGraph(quantized, settled_batch_norms(copy.deepcopy(model), example))
        if not prepared.fake_quantizers:
            raise QuantizationError(
                f"{type(model).__name__} has nothing that can be quantized: no Conv2d or Linear that is not skipped",
                "remove rules that skip too much, or leave `qat` and `convert` out of `stages`",
            )
        return prepared.train(model.training)

    def convert(self, prepared: PreparedModel) -> GraphModule:
        """See QuantizationBackend.convert. The state holds only tensors that the graph reads."""
        assert isinstance(prepared, PreparedGraph)
        Ranges(prepared).require_known()
        module = copy.deepcopy(prepared).cpu().requires_grad_(False).graph_module()
        graph_rewrite.fold_batch_norms(module)
        graph_rewrite.fold_weight_norms(module)
        for node in module.graph.find_nodes(op="call_module"):
            quantizer = module.get_submodule(node.target)
            if isinstance(quantizer, WeightFakeQuantize):
                quantizer.settle(constant(module, node.args[0]))
        for node in list(graph_rewrite.batch_norms(module.graph)):
            node.target = _batch_norm
        with quietly():
            converted = convert_pt2e(module)
        for node in converted.graph.find_nodes(op="call_function", target=_batch_norm):
            node.target = graph_rewrite.BATCH_NORM
        for method in ("train", "eval"):  # torchao replaces them by functions that raise; the graph has no modes
            converted.__dict__.pop(method, None)
        if converted.graph.find_nodes(op="call_module"):
            raise QuantizationError(
                f"convert left {converted.graph.find_nodes(op='call_module')[0].target} unconverted",
                "report this as a bug",
            )
        _strip(converted)
        signature = prepared.blueprint.signature
        if signature is not None:
            converted.graph.set_codegen(signature.codegen)
            converted.recompile()
        return converted.requires_grad_(False).eval()

    def serialize(self, converted: nn.Module, example: Tree) -> Program:
        """See QuantizationBackend.serialize."""
        assert isinstance(converted, GraphModule)
        return Program("pt2", program_bytes(export_converted(converted, example, self._dynamic)))


def _checked_rules(model: nn.Module, rules: Sequence[RuleConfig]) -> Mapping[str, RuleConfig]:
    """Checks rules and modules, and returns the resolved rules; see `resolve_rules`."""
    resolved = resolve_rules(model, rules)
    refuse_cumulative_average(model)
    taken = {*dir(GraphModule(nn.Module(), Graph())), "quantizers", "blueprint", "batch_norms"}
    refuse_names(model, taken, ", or --qat.backend fx")
    return resolved


def _batch_norm(*args: Any) -> Tensor:
    """Replaces aten.batch_norm while torchao converts: for each that it finds it traces 96 patterns (15 s), in vain."""
    raise AssertionError("only a name in a graph")


def export_converted(converted: GraphModule, example: Tree, dynamic: Dynamic | None = None) -> ExportedProgram:
    """Exports the converted model, as `export_program` does, without warnings."""
    with quietly():
        return export_program(converted, example, dynamic)


def _exported(model: nn.Module, example: Tree, dynamic: Dynamic | None) -> GraphModule:
    """Exports a copy of the float model, which is changed. Raises QuantizationError where it cannot be prepared."""
    _make_affine(model)
    graph = _export(model, example, dynamic)
    if hides_weights(graph):
        raise hidden_from_quantization(model, example)
    refuse_other_blocks(graph)
    inline_modes(graph, AUTOCAST)  # disabled ones, into which quantizers do not look
    _refuse_known_failures(graph.graph)
    return graph


def _export(model: nn.Module, example: Tree, dynamic: Dynamic | None) -> GraphModule:
    """Exports in strict mode: in the default mode X86InductorQuantizer mixes up modules that are called twice."""
    device = next((parameter.device for parameter in model.parameters()), trees.first_leaf(example).device)
    inputs = trees.map_leaves(lambda leaf: leaf.to(device), rows_to_trace(example, dynamic))
    args, kwargs = trees.arguments(inputs)
    try:
        with torch.no_grad():
            model = plain_outputs(model, trees.call(model, inputs))
        shapes = dynamic_shapes(model, example, dynamic)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=True)
    except (
        torch._dynamo.exc.TorchDynamoException,
        torch._export.verifier.SpecViolationError,
        RuntimeError,
        ValueError,
    ) as error:
        by_values = "data-dependent" in str(error).lower()
        others = "fx cannot trace those either" if by_values else "--qat.backend fx may trace it"
        raise cannot_trace("torch.export", model, error, others) from error
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def _make_affine(model: nn.Module) -> None:
    """Gives BatchNorm without affine parameters a fixed weight 1 and bias 0: QAT folds weight / sqrt(variance)."""
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.weight is None
            and module.running_var is not None
        ):
            for name, value in (
                ("weight", torch.ones_like(module.running_var)),
                ("bias", torch.zeros_like(module.running_var)),
            ):
                delattr(module, name)
                module.register_buffer(name, value)


def _refuse_known_failures(graph: Graph) -> None:
    """Raises QuantizationError for a batch norm that cannot be folded."""
    for node in graph_rewrite.batch_norms(graph):
        if node.args[3] is None:
            raise refuse_untracked_statistics(layer_of(node))
        if node.args[1] is None:
            raise QuantizationError(
                f"{layer_of(node)}: F.batch_norm without a weight cannot be folded", "use nn.BatchNorm2d"
            )


def _keep_unused_buffers(graph: GraphModule, model: nn.Module) -> None:
    """Restores the buffers that export drops (`num_batches_tracked`), because float checkpoints have them."""
    known = graph.state_dict().keys()
    for name, value in model.state_dict().items():
        owner, _, attribute = name.rpartition(".")
        if name not in known and name in dict(model.named_buffers()):
            holder = graph
            for part in owner.split(".") if owner else []:
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            holder.register_buffer(attribute, value.clone())


def _keep_batch_norms_invertible(graph: GraphModule) -> None:
    for node in graph_rewrite.batch_norms(graph.graph):
        if isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
            keep_invertible(attribute(graph, str(node.args[1].target)))


def _read(graph: GraphModule) -> Iterator[str]:
    """Yields what the nodes of a graph, and those of the blocks that it runs, read by name: tensors and blocks."""
    for name, module in graph.named_modules():
        if isinstance(module, GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                yield f"{name}.{node.target}" if name else str(node.target)


def _strip(converted: GraphModule) -> None:
    """Deletes tensors that no node reads (the float weights), then modules that are left empty and that none reads."""
    read = set(_read(converted))
    for name, _ in [
        *converted.named_parameters(remove_duplicate=False),
        *converted.named_buffers(remove_duplicate=False),
    ]:
        if name not in read:
            owner, _, attribute = name.rpartition(".")
            delattr(converted.get_submodule(owner), attribute)
    for name, module in reversed(list(converted.named_modules())):
        if name and name not in read and not [*module.children(), *module.parameters(), *module.buffers()]:
            owner, _, attribute = name.rpartition(".")
            delattr(converted.get_submodule(owner), attribute)
    converted.recompile()
