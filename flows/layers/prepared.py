"""Which modules may be bypassed: weights may be read and prepared only where nothing else acts on them.

A layer may have hooks, adapters, parametrizations or quantized weights; it may be moved between devices or dtypes at each
call, or be replaced by another class. Only calling it gives the right result then. So the shortcuts of decoding are taken
for plain layers, and for LoRA adapters, whose effect is known: W + scaling·B·A.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tarflow.flows.layers.actnorm import ActNorm
from tarflow.flows.layers.hooks import globally_hooked, is_hooked
from tarflow.flows.layers.mixing import ChannelMixing
from tarflow.flows.layers.transformer import MLP, Attention, LayerNorm, OutputLinear, RMSNorm, TransformerLayer

if TYPE_CHECKING:
    from tarflow.flows.layers.network import TokenNetwork  # which itself imports this

#: Classes whose arithmetic the shortcuts repeat, and their own `forward`, so that a replaced one is noticed.
KNOWN: dict[type, Any] = {
    kind: kind.forward
    for kind in (nn.Linear, OutputLinear, LayerNorm, RMSNorm, Attention, MLP, TransformerLayer, ActNorm, ChannelMixing)
}


def is_lora(module: nn.Module) -> bool:
    """Whether the module is PEFT's LoRA of a linear layer, that class itself."""
    peft = sys.modules.get("peft.tuners.lora")  # nobody who has not imported it has its layers
    return peft is not None and type(module) is peft.Linear


def active_adapters(layer: Any) -> list[str]:
    """Adapters of a LoRA layer that add to its output now; those merged into its weight are in there already."""
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def is_plain_lora(layer: Any) -> bool:
    """Whether a LoRA layer computes W·x + Σ scaling·B·A·x of its active adapters and nothing else, in full precision."""
    adapters = active_adapters(layer)
    if layer.disable_adapters and layer.merged:
        return False  # calling it takes the adapters out of the weight, which changes the layer
    if is_hooked(layer) or not is_plain(layer.base_layer) or layer.get_base_layer() is not layer.base_layer:
        return False
    parts = [part[name] for part in (layer.lora_A, layer.lora_B) for name in adapters]
    if any(name in layer.lora_variant or layer.lora_bias.get(name) for name in adapters):
        return False
    if any(type(part) is not nn.Linear or not is_plain(part) for part in parts):
        return False
    if any(layer.lora_dropout[name].training and getattr(layer.lora_dropout[name], "p", 0) for name in adapters):
        return False
    # In 16 bits a small change is lost when it is added to the weight: there the adapter's own pass is more exact.
    dtype = layer.base_layer.weight.dtype
    return not adapters or (dtype.itemsize >= 4 and all(part.weight.dtype == dtype for part in parts))


def is_plain(module: nn.Module) -> bool:
    """Whether a module and all within are known classes without anything that acts on them, of one dtype and device."""
    tensors: list[Tensor] = []
    pending: list[Any] = [module]
    while pending:
        part = pending.pop()
        if is_lora(part):
            if not is_plain_lora(part):
                return False
            tensors += [part.base_layer.weight]
            continue
        if isinstance(part, torch._dynamo.OptimizedModule):  # compiled: the same numbers
            part = part._orig_mod
        if type(part) is not nn.ModuleList and KNOWN.get(type(part)) is not type(part).forward:
            return False
        if is_hooked(part):
            return False
        tensors += part.parameters(recurse=False)
        pending += part.children()
    kinds = {(type(tensor), tensor.dtype, tensor.device, tensor.layout) for tensor in tensors}
    return len(kinds) <= 1 and all(
        kind is nn.Parameter and dtype.is_floating_point and dtype.itemsize > 1 and device.type != "meta"
        for kind, dtype, device, _ in kinds
    )


def may_prepare(block: TokenNetwork) -> bool:
    """Whether a block's decode steps may be made from its weights; else they must go through its modules."""
    parts = [block.proj_in, block.proj_out, block.layers, *([] if block.final_norm is None else [block.final_norm])]
    return not globally_hooked() and is_plain(nn.ModuleList(parts))


def plain_linear(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a layer that `is_plain`, its active adapters added."""
    adapters = active_adapters(linear) if is_lora(linear) else []
    weight, bias = linear.weight.detach(), linear.bias
    if adapters:
        weight = weight + sum(linear.get_delta_weight(name).detach() for name in adapters)
    return weight, None if bias is None else bias.detach()


def state_of(block: nn.Module) -> tuple[Any, ...]:
    """What prepared weights of a plain block were made for: where its tensors lie, and which adapters act how."""
    tensors = tuple(parameter.data_ptr() for parameter in block.parameters())
    parts: Iterable[Any] = block.modules()
    adapters = tuple(
        (name, part.scaling.get(name))
        for part in parts
        if is_lora(part)
        for name in [str(part.merged), *active_adapters(part)]
    )
    return tensors, adapters


def unwrapped(linear: Any) -> Any:
    """The layer below adapters."""
    while hasattr(linear, "base_layer"):
        linear = linear.base_layer
    return linear


def compute_dtype(linear: Any) -> torch.dtype:
    """The dtype that a layer computes in, also where its weight is stored in another one."""
    linear = unwrapped(linear)
    registry = getattr(linear, "_diffusers_hook", None)
    casting = None if registry is None else registry.get_hook("layerwise_casting")
    if casting is not None:
        return casting.compute_dtype
    weight, bias = linear.weight, linear.bias
    if weight.is_floating_point() and weight.dtype.itemsize > 1:
        return weight.dtype
    own = getattr(linear, "compute_dtype", None)  # of bitsandbytes' and GGUF's layers
    if own is None and bias is not None and bias.is_floating_point() and bias.dtype.itemsize > 1:
        own = bias.dtype
    return own or torch.float32


def compute_device(*modules: Any) -> torch.device:
    """The device that a layer computes on, also while its weight waits on another one.

    Args:
        modules: a linear layer, and modules around it whose hooks may bring its weight.
    """
    for module in map(unwrapped, modules):
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            if getattr(part, "execution_device", None) is not None:
                device = part.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        group = offload_group(module)
        if group is not None:
            return group.onload_device
    return unwrapped(modules[0]).weight.device


def offload_group(module: Any) -> Any:
    """Diffusers' group of weights that a module's hook brings; None if there is none."""
    registry = getattr(module, "_diffusers_hook", None)
    offloading = None if registry is None else registry.get_hook("group_offloading")
    return None if offloading is None else offloading.group


def leaves_after_use(module: Any) -> bool:
    """Whether a module's own hook takes its weights to another place after each use: Accelerate's offloading, also of a
    whole model, or Diffusers' groups."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    leaves = any(getattr(one, "offload", False) or hasattr(one, "prev_module_hook") for one in hooks)  # of CpuOffload
    return leaves or offload_group(module) is not None


def is_on_files(module: nn.Module) -> bool:
    """Whether Diffusers' group offloading keeps weights of a module in files."""
    groups = (offload_group(part) for part in module.modules())
    return any(group is not None and group.offload_to_disk_path is not None for group in groups)


def is_elsewhere(module: nn.Module) -> bool:
    """Whether weights of a module are brought to it only while it computes (sequential offloading, ``device_map``)."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def check_saved_whole(module: nn.Module) -> None:
    """Refuse to save a module whose weights are in places where only a forward pass finds them.

    Raises:
        ValueError: if they are on a disk, or kept by Accelerate's hooks.
    """
    if is_on_files(module) or is_elsewhere(module):
        raise ValueError(
            f"the weights of this {type(module).__name__} are offloaded, to a disk or by Accelerate's hooks: load it anew "
            "without offloading to save it"
        )


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Bring an offloaded module's weights to the device that it computes on, for uses that do not call its `forward`. The
    weights are sent away again at the end, so this is not for use inside `forward`.

    Accelerate's and Diffusers' offloading hooks know where the weights are. In a forward pass, a group of blocks is
    brought by its first block; here by any of them, as decoding goes through the blocks in reverse.
    """
    hook, group = getattr(module, "_hf_hook", None), offload_group(module)
    if hook is not None:
        hook.pre_forward(module)
    if group is not None:
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
    try:
        yield
    finally:
        if group is not None:
            group.offload_()
        if hook is not None:
            hook.post_forward(module, None)


def called_with_group(module: Any, *inputs: Any) -> Any:
    """``module(*inputs)``. Its weights are brought to the device even if another module of their offloading group, which
    is not called, would have to do it."""
    group = offload_group(module)
    if group is None or len(group.modules) < 2:
        return module(*inputs)
    with at_hand(module):
        return module(*inputs)


def weights_move(module: Any) -> bool:
    """Whether Diffusers' hooks move or cast the weights of a `FlowBlock` or `TransformerLayer` during a pass. The backward
    pass would then find them changed."""
    layer = module.layers[0] if hasattr(module, "layers") else module
    for part in (module, unwrapped(layer.attention.qkv)):
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and any(map(registry.get_hook, ("group_offloading", "layerwise_casting"))):
            return True
    return False


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of everything in a module's ``state_dict``, also of tensors that hooks hold elsewhere: in
    Accelerate's maps, or in the files of Diffusers' group offloading."""
    files: dict[str, dict[str, Tensor]] = {}
    groups = [group for part in module.modules() if (group := offload_group(part)) is not None]
    places = {
        id(tensor): (group.safetensors_file_path, key)
        for group in groups
        if group.offload_to_disk_path is not None
        for tensor, key in group.tensor_to_key.items()
    }
    for prefix, part in module.named_modules():
        hook = getattr(part, "_hf_hook", None)
        hooks = getattr(hook, "hooks", [hook])
        maps = [one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None]
        buffers = (
            pair for pair in part.named_buffers(recurse=False) if pair[0] not in part._non_persistent_buffers_set
        )
        for name, tensor in [*part.named_parameters(recurse=False), *buffers]:
            value = tensor
            if tensor.device.type == "meta" and maps:
                value = maps[0][name]
            elif id(tensor) in places:
                file, key = places[id(tensor)]
                if file not in files:
                    files[file] = load_file(file)
                value = files[file][key]
            yield f"{prefix}.{name}" if prefix else name, value.detach()
