"""Blocks and the output head, of models as transformers have them and of others."""

from __future__ import annotations

import pytest
from torch import nn

from invarlock.models.structure import block_of, find_blocks, output_head
from invarlock.testing import architectures


class Nested(nn.Module):
    """A list within a block, a list that holds nothing, and a head that no method names."""

    def __init__(self) -> None:
        super().__init__()
        experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": experts, "act": nn.ReLU()}), nn.Linear(2, 2)])
        self.dropouts = nn.ModuleList([nn.Dropout()])
        self.lm_head = nn.Linear(2, 5)


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (Nested, ["layers.0", "layers.1"]),
        (architectures.llama, ["model.layers.0", "model.layers.1"]),
        (architectures.gpt2, ["transformer.h.0", "transformer.h.1"]),
        (architectures.t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        (lambda: nn.LayerNorm(4), []),
    ],
)
def test_blocks_are_the_elements_of_outermost_lists(build, blocks: list[str]) -> None:
    assert list(find_blocks(build())) == blocks


@pytest.mark.parametrize(
    ("path", "block"),
    [("layers.0.experts.1", "layers.0"), ("layers.1", "layers.1"), ("layers", None), ("lm_head", None), ("", None)],
)
def test_a_module_belongs_to_the_block_that_holds_it(path: str, block: str | None) -> None:
    assert block_of(dict(Nested().named_modules()), path) == block


def test_the_output_head_is_what_the_model_says_or_else_goes_by_its_usual_name() -> None:
    model, llama, base = Nested(), architectures.llama(), architectures.llama().model
    assert output_head(model) is model.lm_head
    assert output_head(llama) is llama.get_output_embeddings() is not None
    assert output_head(base) is None
