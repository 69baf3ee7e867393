"""View of a model that is spread over processes as one whole model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.lazy import LazyTensor, LazyWeights, tied
from invarlock.distributed.dtensor import is_spread, whole


class WholeView:
    """A spread model as guards see it: of the same structure, its weights gathered when an operation needs them."""

    def __init__(self, model: Any) -> None:
        from accelerate import init_empty_weights

        config = copy.deepcopy(model.config)
        # To be saved as what it is: a model that is whole.
        config.distributed_config = None
        with init_empty_weights(include_buffers=False):
            self.model: Any = type(model)(config)
        self.model.eval().generation_config = getattr(model, "generation_config", None)
        parameters: dict[str, LazyTensor] = {}
        for names, parameter in tied(model):
            parameters |= dict.fromkeys(names, _lazy(model, names[0], parameter))
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._weights = LazyWeights(parameters, buffers)
        self.undo()

    def undo(self) -> list[str]:
        """Restore parameters and buffers that a guard has replaced; returns their names."""
        return self._weights.put_back(self.model)

    def gather(self, *, keep: bool) -> nn.Module:
        """The model with all of its weights in the memory of the processes that keep them; all have to call it."""
        made: dict[int, nn.Parameter] = {}
        for name, lazy in self._weights.parameters.items():
            if id(lazy) not in made:
                weight = lazy.whole().cpu()
                made[id(lazy)] = nn.Parameter(weight if keep else torch.empty(0), requires_grad=False)
            path, _, key = name.rpartition(".")
            self.model.get_submodule(path)._parameters[key] = made[id(lazy)]
        model: nn.Module = self.model
        return model


def _lazy(model: nn.Module, name: str, parameter: Tensor) -> LazyTensor:
    def read() -> Tensor:
        weight = model.get_parameter(name).detach()
        return whole(weight) if is_spread(weight) else weight.clone()

    return LazyTensor(tuple(parameter.shape), parameter.dtype, parameter.device, read)
