"""Language models: the next token, masked tokens, or the target of a source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invarlock.api import LanguageTask, Metric
from plugins_builtin.tasks.classes import is_in, transformers_class

if TYPE_CHECKING:
    from typing import Any

    from invarlock.api import ModelClass


class Causal(LanguageTask):
    """The next token of a text: Llama, GPT-2, Mixtral, Mamba, Jamba; and every class of an adapter's own."""

    name, predicted = "causal", "causal"
    metric = Metric("perplexity", "ratio")

    def owns(self, model_class: ModelClass) -> bool:
        # What transformers lists with T5, and has no decoder of its own, writes text of sounds: Qwen2-Audio, Voxtral.
        lists = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
        return transformers_class(model_class) is None or any(is_in(model_class, each, ending="") for each in lists)


class Masked(LanguageTask):
    """Masked tokens of a text: BERT, RoBERTa."""

    name, predicted = "masked", "masked"
    metric = Metric("masked_perplexity", "ratio")

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "MASKED_LM", ending="ForMaskedLM")

    def needs_tokenizer(self, dataset: Any) -> bool:
        # For the mask, whoever writes the text.
        return True


class Seq2Seq(LanguageTask):
    """The target of a source: T5, BART."""

    name, predicted = "seq2seq", "seq2seq"
    metric = Metric("target_perplexity", "ratio")

    def owns(self, model_class: ModelClass) -> bool:
        if transformers_class(model_class) is None:
            return model_class.encoder_decoder
        reads_sounds = is_in(model_class, "MULTIMODAL_LM", ending="") and not model_class.encoder_decoder
        return is_in(model_class, "SEQ_TO_SEQ_CAUSAL_LM", ending="ForConditionalGeneration") and not reads_sounds
