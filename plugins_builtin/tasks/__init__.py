"""Tasks: one module for each kind of models. A class is shown to them in the order of the list: the last takes most."""

from __future__ import annotations

from invarlock.api import Task, hookimpl
from plugins_builtin.tasks.classification import ImageClassification, SequenceClassification, TokenClassification
from plugins_builtin.tasks.embedding import Embedding
from plugins_builtin.tasks.image_text import ImageText
from plugins_builtin.tasks.language import Causal, Masked, Seq2Seq
from plugins_builtin.tasks.speech import Speech
from plugins_builtin.tasks.vision_language import VisionLanguage


@hookimpl
def invarlock_tasks() -> list[Task]:
    return [
        Masked(),
        Seq2Seq(),
        SequenceClassification(),
        TokenClassification(),
        ImageClassification(),
        ImageText(),
        Speech(),
        VisionLanguage(),
        Embedding(),
        Causal(),
    ]
