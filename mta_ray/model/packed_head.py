"""The output layer on a CPU: its weight once more, laid out as oneDNN's kernels read it.

A decoding step multiplies few rows by the widest matrix of the model. In the plain layout every call packs that matrix
anew; packed once, 2 to 64 rows take a half to a third of the time. It costs a second copy of the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = 16
"""The kernel that the layout is made for; others run on it too."""


class PackedHead(nn.Linear):
    """A linear layer that is packed when it is used without gradients, and again when its weight has changed.

    Semantics: those of nn.Linear, up to the order of a sum. Parameters and their names are those of the layer that it
    stands for, and are shared with it.
    """

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight, self.bias = like.weight, like.bias
        self._packed: Tensor | None = None
        self._packed_from: tuple[int, int] = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._packed = None  # whoever trains it may write where nobody sees: optimisers on flat buffers
        if torch.is_grad_enabled() or not _can_pack(self.weight) or x.dtype != self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        now = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self._packed is None or now != self._packed_from:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS)
            self._packed_from = now
        rows = x.reshape(-1, self.in_features)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return out.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # it can neither be copied nor pickled


def pack_head(model: PreTrainedModel) -> None:
    """Let the model's output layer be packed, where its device and this build of torch can."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and _can_pack(head.weight):
        model.set_output_embeddings(PackedHead(head))


def _can_pack(weight: Tensor) -> bool:
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())
