"""Make ZeRO-3 fetch each weight ahead of use, once in a forward and once in a backward pass.

DeepSpeed's coordinator records in which order a pass, forward and backward, uses the modules, and fetches their weights
in that order from the next pass on. streamed() corrects the cases where that fails, keeps a frozen embedding on the
host, and bounds how far the host runs ahead of the device. By the sources of DeepSpeed 0.19.8, runtime/zero/:
partitioned_param_coordinator.py (PC), parameter_offload.py, partition_parameters.py. tests/training/test_fetches.py
counts.
"""

import sys

import deepspeed
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinators
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from models.architecture import bare
from models.llada import LLaDAModelLM

IS_KNOWN = hasattr(coordinators, "update_recompute_parameters") and hasattr(
    coordinators.PartitionedParameterCoordinator, "_invalidate_trace"
)


def streamed(engine):
    """Prepare the model of a ZeRO-3 engine. Call it once, when the engine is built."""
    blocks = [module for module in engine.module.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not IS_KNOWN:
        if torch.distributed.get_rank() == 0:
            print(
                f"warning: DeepSpeed {deepspeed.__version__} fetches weights in another way than 0.19.8, so that some "
                "may cross the bus twice",
                file=sys.stderr,
                flush=True,
            )
        return
    for block in blocks:
        for parameter in block.parameters():
            parameter.recomputed_by = block
    engine.module.register_forward_pre_hook(Trace(engine).begin, prepend=True)  # before DeepSpeed's own
    keep_embedding_on_host(engine.module, engine.device)
    if engine.device.type == "cuda":
        bound_run_ahead(blocks)


# --- frozen weights of a block that is computed again ------------------------------------------------------


def credit_to_block(module, parameter):
    """Keep a frozen weight that a block's second forward pass gathered until the block's backward pass ends.

    DeepSpeed credits it to the module whose backward pass has just begun, which is the block's last (PC,
    _fetch_sub_module_impl), and frees it with that one (PC, release_sub_module). The block's other layers would then
    fetch theirs again, on demand.
    """
    credit(getattr(parameter, "recomputed_by", module), parameter)


if IS_KNOWN:
    credit = coordinators.update_recompute_parameters
    coordinators.update_recompute_parameters = credit_to_block


# --- the order that DeepSpeed records ----------------------------------------------------------------------


class Trace:
    """Keeps DeepSpeed's record of a pass (its trace) usable for passes with and without a graph.

    The record of a whole pass serves both: a pass without a graph is its first half. The record of a pass without a
    graph has no backward pass: DeepSpeed discards it there and records the next pass, whichever that is, so alternating
    passes would never have a record. So a model that trains gets its first record in its first pass with a graph.
    It must have none before: from its first record on, DeepSpeed caches what to free after each module (PC,
    __params_to_release).
    """

    def __init__(self, engine):
        self.parameters = list(engine.module.parameters())
        self.trains = any(parameter.requires_grad for parameter in self.parameters)
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # without an optimizer: itself
        self.coordinator = offload.get_param_coordinator()
        self.is_whole = False  # whether the record has a backward pass

    def begin(self, *_):
        """Before a forward pass."""
        if self.trains and not self.is_whole and not self.coordinator.is_invalid_trace():
            self.coordinator._invalidate_trace()
        if self.coordinator.is_invalid_trace():
            self.is_whole = torch.is_grad_enabled()  # this pass is recorded
        for parameter in self.parameters:  # what a pass without a graph kept for a backward pass
            is_left = parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist
            if is_left and not parameter.ds_active_sub_modules:
                parameter.partition()


# --- the embedding -----------------------------------------------------------------------------------------


def keep_embedding_on_host(model, device):
    """Let a frozen embedding look rows up in the table on the host, instead of fetching the whole table for a few rows.

    With several ranks each holds only a share of the table, so there ZeRO-3 gathers it as usual.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return
    table, share = embedding.weight, embedding.weight.ds_tensor
    is_on_host = share.device.type == "cpu" and share.final_location != OffloadDeviceEnum.nvme
    if is_on_host and share.numel() == table.ds_numel and not table.requires_grad:
        embedding.__class__ = HostEmbedding
        embedding.device, embedding.buffer, embedding.sent = device, torch.empty(0, embedding.embedding_dim), None


class HostEmbedding(nn.Embedding):
    """A frozen embedding whose table stays on the host: ids (...) -> rows (..., D) on the model's device.

    If the ids are on the device, the host waits for them.
    """

    def __call__(self, ids):
        """Without nn.Module's hooks, by which ZeRO-3 gathers the table."""
        (parameter,) = self.parameters(recurse=False)  # self.weight would gather it, too
        table, ids = parameter.ds_tensor.view(parameter.ds_shape), ids.cpu()
        if self.device.type == "cpu":
            return F.embedding(ids, table)
        if self.sent is not None:
            self.sent.synchronize()  # until the rows of the pass before have left the buffer
        if ids.numel() > len(self.buffer):
            self.buffer = torch.empty(ids.numel(), self.embedding_dim, dtype=table.dtype, pin_memory=True)
        rows = torch.index_select(table, 0, ids.flatten(), out=self.buffer[: ids.numel()])  # (N, D)
        x = rows.to(self.device, non_blocking=True).view(*ids.shape, -1)
        self.sent = torch.cuda.current_stream().record_event()
        return x


def ids_device(model, device):
    """Where input ids should be: on the host if a model's embedding is there, so that it waits for nothing.

    Other families than LLaDA make tensors of their own where their ids are.
    """
    model = bare(model)
    is_on_host = isinstance(model, LLaDAModelLM) and isinstance(model.get_input_embeddings(), HostEmbedding)
    return torch.device("cpu") if is_on_host else device


# --- how far the host is ahead -----------------------------------------------------------------------------


def bound_run_ahead(blocks, new_event=torch.cuda.Event):
    """Keep the host at most a block ahead of the device, in forward and backward passes.

    DeepSpeed's copies do not wait for the device to compute. Weights that the host has freed stay in memory until the
    device has used them, so the further the host is ahead, the more memory they take.
    """
    begun = []  # the event that the device reaches when it begins the block before

    def wait(*_):
        event = new_event()
        event.record()
        begun.append(event)
        if len(begun) > 1:
            begun.pop(0).synchronize()

    def wait_in_backward(_, __, output):
        output = output[0] if isinstance(output, tuple) else output  # DeBERTa's blocks return their attention, too
        if output.requires_grad:
            output.register_hook(wait)

    for block in blocks:
        block.register_forward_pre_hook(wait)
        block.register_forward_hook(wait_in_backward)
