"""The same checkpoint split over ranks in several ways: ours and its peers'.

Each loads as well as its library can: from the checkpoint's folder, over `mesh.tensor`, in fp32, on
the CPU. The peers need its process group even where it is of one rank.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import Flux2Transformer2DModel, TensorParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Qwen3Model, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Block

from flux_ray.engine.api import Placement
from flux_ray.engine.flux2.klein import qwen3
from flux_ray.engine.loading import load_text_model, t5
from flux_ray.parallel.checkpoint import Checkpoint
from flux_ray.parallel.load import LoadSpec, load_sharded
from flux_ray.parallel.mesh import Mesh


def load_ours(folder: Path, mesh: Mesh) -> nn.Module:
    """flux-ray: plain local shards, each rank reading its own slices."""
    config = Flux2Transformer2DModel.load_config(folder)
    return load_sharded(
        lambda: Flux2Transformer2DModel.from_config(config),
        Flux2Transformer2DModel._tp_plan,
        LoadSpec(Checkpoint(folder), mesh.tensor, torch.float32),
    )


def load_dtensor(folder: Path, mesh: Mesh) -> nn.Module:
    """diffusers 0.42.1: DTensors, streamed by `from_pretrained(parallel_config=...)`.

    diffusers knows accelerators only: on the CPU it divides by their number, and refuses.
    """
    axis = mesh.tensor
    devices = DeviceMesh.from_group(axis.group, "cpu", mesh_dim_names=("tp",))

    def resolve(model: nn.Module, config: TensorParallelConfig) -> ParallelConfig:
        resolved = ParallelConfig(tensor_parallel_config=config)
        resolved.setup(axis.rank, axis.size, torch.device("cpu"), mesh=devices)
        model._parallel_config = resolved
        return resolved

    with (
        mock.patch.object(Flux2Transformer2DModel, "_resolve_parallel_config", resolve),
        mock.patch("diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES", ("cpu",)),
    ):
        model = Flux2Transformer2DModel.from_pretrained(
            folder, parallel_config=TensorParallelConfig(mesh=devices)
        )
    return model.eval()


def import_deepspeed() -> Any:
    """DeepSpeed for processes on the CPU, over the process group that is there already.

    Its own shared-memory all-reduce is not built: it ignores the group, and crashes or hangs where
    an earlier run left its segments (facts/parallel.md, 5.3).
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.comm

    # `import deepspeed.comm.torch` gives torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def load_deepspeed(folder: Path, mesh: Mesh) -> nn.Module:
    """DeepSpeed 0.19.8: AutoTP with a `partition_config`, on a model that diffusers loaded."""
    import_deepspeed()
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    model, axis = Flux2Transformer2DModel.from_pretrained(folder), mesh.tensor
    single = model.single_transformer_blocks[0].attn
    config = AutoTPConfig.from_dict(partition_config(single.inner_dim, single.mlp_hidden_dim))
    config.tp_size = axis.size
    splitter = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=config,
        training_mode=False,
    )
    splitter.set_tensor_parallel_config(axis.size, axis.group)
    splitter.update_linear_policies()
    inner_dim = single.inner_dim
    splitter._replace_module(model)
    # It divides every attribute of that name; diffusers' processor needs the whole width.
    for block in model.single_transformer_blocks:
        block.attn.inner_dim = inner_dim
    return model.eval()


def partition_config(inner_dim: int, mlp_dim: int) -> dict[str, Any]:
    """What diffusers' `_tp_plan` says of FLUX.2, in DeepSpeed's words."""
    double, single = r".*transformer_blocks\.\d+\.", r".*single_transformer_blocks\.\d+\.attn\."
    fused_in = [inner_dim] * 3 + [mlp_dim] * 2

    def layers(kind: str, *patterns: str, **shape: Any) -> dict[str, Any]:
        weights = [rf"{pattern}\.weight$" for pattern in patterns]
        return {"patterns": weights, "partition_type": kind, **shape}

    gate_and_up = {"shape": [2, -1], "partition_dim": 0}
    return {
        "use_default_specs": False,
        "strict_mode": False,
        "layer_specs": [
            layers("column", double + r"attn\.(to_[qkv]|add_[qkv]_proj)"),
            layers("column", single + "to_qkv_mlp_proj", shape=[fused_in, -1], partition_dim=0),
            layers("row", single + "to_out", shape=[-1, [inner_dim, mlp_dim]], partition_dim=1),
            layers(
                "row",
                double + r"attn\.(to_out\.0|to_add_out)",
                double + r"ff(_context)?\.linear_out",
            ),
            layers("column", double + r"ff(_context)?\.linear_in", **gate_and_up),
        ],
    }


WAYS: dict[str, Callable[[Path, Mesh], nn.Module]] = {
    "ours": load_ours,
    "dtensor": load_dtensor,
    "deepspeed": load_deepspeed,
}


def load_text_ours(folder: Path, mesh: Mesh, num_layers: int) -> nn.Module:
    """flux-ray: what the engine does for klein's encoder, Qwen3."""
    return load_text_model(qwen3(folder, num_layers), folder, Placement("float32", "cpu", mesh))


def load_text_deepspeed(folder: Path, mesh: Mesh, num_layers: int) -> nn.Module:
    """DeepSpeed: AutoTP by its own reading of the model, which transformers loaded."""
    model = Qwen3Model.from_pretrained(folder, num_hidden_layers=num_layers)
    model.norm = nn.Identity()
    return auto_tp(model, mesh)


def auto_tp(model: nn.Module, mesh: Mesh, **options: Any) -> nn.Module:
    """Split a model of transformers by DeepSpeed's AutoTP.

    In a world larger than its group it needs `mpu` and `tp_group`: with `tp_size` alone it takes
    the first ranks and hangs, with `mpu` alone it splits nothing (0.19.8, both tried).
    """
    deepspeed, axis = import_deepspeed(), mesh.tensor
    place = SimpleNamespace(get_model_parallel_group=lambda: axis.group)
    split = {"tp_size": axis.size, "tp_grain_size": 1, "mpu": place, "tp_group": axis.group}
    engine = deepspeed.init_inference(model, tensor_parallel=split, dtype=torch.float32, **options)
    return engine.module


TEXT_WAYS: dict[str, Callable[[Path, Mesh, int], nn.Module]] = {
    "ours": load_text_ours,
    "deepspeed": load_text_deepspeed,
}


def load_t5_ours(folder: Path, mesh: Mesh) -> nn.Module:
    """flux-ray: what the engine does for FLUX.1's T5, for which transformers has no plan."""
    return load_text_model(t5(folder), folder, Placement("float32", "cpu", mesh))


def load_t5_deepspeed(folder: Path, mesh: Mesh) -> nn.Module:
    """DeepSpeed: AutoTP with the policy for T5 of its own tutorial."""
    model = T5EncoderModel.from_pretrained(folder).eval()
    return auto_tp(
        model, mesh, injection_policy={T5Block: ("SelfAttention.o", "DenseReluDense.wo")}
    )


T5_WAYS: dict[str, Callable[[Path, Mesh], nn.Module]] = {
    "ours": load_t5_ours,
    "deepspeed": load_t5_deepspeed,
}
