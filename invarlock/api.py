"""Everything that plugins import, the built-in ones as well as others. A name is imported when it is asked for.

So that a plugin can be listed without torch, its module may import any of them at the top.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invarlock import hookimpl as hookimpl
    from invarlock.checkpoints.packing.unpacked import LAYOUTS as LAYOUTS
    from invarlock.checkpoints.packing.unpacked import UnpackedCheckpoint as UnpackedCheckpoint
    from invarlock.checkpoints.packing.unpacked import configuration_of as configuration_of
    from invarlock.checkpoints.packing.unpacked import layout_of as layout_of
    from invarlock.checkpoints.packing.unpacked import method_of as method_of
    from invarlock.checkpoints.packing.unpacked import open_checkpoint as open_checkpoint
    from invarlock.checkpoints.reader import Checkpoint as Checkpoint
    from invarlock.checkpoints.soundness import READ as READ
    from invarlock.checkpoints.soundness import check_file as check_file
    from invarlock.checkpoints.soundness import check_folder as check_folder
    from invarlock.checkpoints.soundness import read_json as read_json
    from invarlock.checkpoints.streaming import Part as Part
    from invarlock.checkpoints.streaming import attach as attach
    from invarlock.core.errors import InputError as InputError
    from invarlock.core.errors import NotStreamedError as NotStreamedError
    from invarlock.core.errors import UsageError as UsageError
    from invarlock.core.errors import named_by as named_by
    from invarlock.core.errors import nearest as nearest
    from invarlock.core.errors import one_line as one_line
    from invarlock.core.inputs import complaints_of as complaints_of
    from invarlock.core.inputs import panics_unprinted as panics_unprinted
    from invarlock.core.lazy import LazyTensor as LazyTensor
    from invarlock.core.memory import free_memory as free_memory
    from invarlock.core.paths import absolute as absolute
    from invarlock.core.paths import is_hub_id as is_hub_id
    from invarlock.core.paths import regular_file as regular_file
    from invarlock.core.progress import counted as counted
    from invarlock.core.records import COLUMNS as COLUMNS
    from invarlock.core.records import Record as Record
    from invarlock.core.records import column as column
    from invarlock.core.records import columns_of as columns_of
    from invarlock.core.results import Action as Action
    from invarlock.datasets.drawing import drawn as drawn
    from invarlock.datasets.layout import UNSCORED as UNSCORED
    from invarlock.datasets.layout import WindowLayout as WindowLayout
    from invarlock.datasets.layout import Windows as Windows
    from invarlock.datasets.noise import Noise as Noise
    from invarlock.datasets.pairs import make_pairs as make_pairs
    from invarlock.datasets.samples import encoded as encoded
    from invarlock.datasets.samples import padding_of as padding_of
    from invarlock.datasets.samples import read_text as read_text
    from invarlock.datasets.samples import seen as seen
    from invarlock.distributed.launchers import local_rank as local_rank
    from invarlock.distributed.parallel_map import each as each
    from invarlock.distributed.process_group import Ranks as Ranks
    from invarlock.evaluation.labels import changed_labels as changed_labels
    from invarlock.evaluation.labels import label_divergence as label_divergence
    from invarlock.evaluation.results import FigureResult as FigureResult
    from invarlock.evaluation.taps import Tap as Tap
    from invarlock.evaluation.taps import attached as attached
    from invarlock.evaluation.task import LanguageTask as LanguageTask
    from invarlock.evaluation.task import Metric as Metric
    from invarlock.evaluation.task import Task as Task
    from invarlock.evaluation.task import VectorTask as VectorTask
    from invarlock.evaluation.vectors import changed_matches as changed_matches
    from invarlock.evaluation.vectors import changed_neighbours as changed_neighbours
    from invarlock.evaluation.vectors import changed_order as changed_order
    from invarlock.evaluation.vectors import unit as unit
    from invarlock.exporters.exporter import Exporter as Exporter
    from invarlock.models.autograd import recording as recording
    from invarlock.models.configuration import POSITION_FIELDS as POSITION_FIELDS
    from invarlock.models.configuration import fields_of as fields_of
    from invarlock.models.facts import ModelClass as ModelClass
    from invarlock.models.facts import context_of as context_of
    from invarlock.models.facts import device_of as device_of
    from invarlock.models.facts import evaluating as evaluating
    from invarlock.models.facts import is_streamed as is_streamed
    from invarlock.models.facts import task_of as task_of
    from invarlock.models.facts import unread_tensors_of as unread_tensors_of
    from invarlock.models.facts import vocabulary_of as vocabulary_of
    from invarlock.models.norms import is_norm as is_norm
    from invarlock.models.structure import block_of as block_of
    from invarlock.models.structure import find_blocks as find_blocks
    from invarlock.models.structure import has_weights as has_weights
    from invarlock.models.structure import input_embeddings as input_embeddings
    from invarlock.models.structure import output_head as output_head
    from invarlock.models.structure import predicts_tokens as predicts_tokens
    from invarlock.models.structure import reads_images_alone as reads_images_alone
    from invarlock.models.tokens import ChangedVocabulary as ChangedVocabulary
    from invarlock.models.tokens import stop_tokens as stop_tokens
    from invarlock.plugins.classes import Guard as Guard
    from invarlock.plugins.classes import ModelAdapter as ModelAdapter
    from invarlock.plugins.classes import OptionNotTakenError as OptionNotTakenError
    from invarlock.quantization.selection import find_weights as find_weights

_HOMES = {
    "invarlock": ("hookimpl",),
    "invarlock.checkpoints.packing.unpacked": (
        "LAYOUTS",
        "UnpackedCheckpoint",
        "configuration_of",
        "layout_of",
        "method_of",
        "open_checkpoint",
    ),
    "invarlock.checkpoints.reader": ("Checkpoint",),
    "invarlock.checkpoints.soundness": ("READ", "check_file", "check_folder", "read_json"),
    "invarlock.checkpoints.streaming": ("Part", "attach"),
    "invarlock.core.errors": ("InputError", "NotStreamedError", "UsageError", "named_by", "nearest", "one_line"),
    "invarlock.core.inputs": ("complaints_of", "panics_unprinted"),
    "invarlock.core.lazy": ("LazyTensor",),
    "invarlock.core.memory": ("free_memory",),
    "invarlock.core.paths": ("absolute", "is_hub_id", "regular_file"),
    "invarlock.core.progress": ("counted",),
    "invarlock.core.records": ("COLUMNS", "Record", "column", "columns_of"),
    "invarlock.core.results": ("Action",),
    "invarlock.datasets.drawing": ("drawn",),
    "invarlock.datasets.layout": ("UNSCORED", "WindowLayout", "Windows"),
    "invarlock.datasets.noise": ("Noise",),
    "invarlock.datasets.pairs": ("make_pairs",),
    "invarlock.datasets.samples": ("encoded", "padding_of", "read_text", "seen"),
    "invarlock.distributed.launchers": ("local_rank",),
    "invarlock.distributed.parallel_map": ("each",),
    "invarlock.distributed.process_group": ("Ranks",),
    "invarlock.evaluation.labels": ("changed_labels", "label_divergence"),
    "invarlock.evaluation.results": ("FigureResult",),
    "invarlock.evaluation.taps": ("Tap", "attached"),
    "invarlock.evaluation.task": ("LanguageTask", "Metric", "Task", "VectorTask"),
    "invarlock.evaluation.vectors": ("changed_matches", "changed_neighbours", "changed_order", "unit"),
    "invarlock.exporters.exporter": ("Exporter",),
    "invarlock.models.autograd": ("recording",),
    "invarlock.models.configuration": ("POSITION_FIELDS", "fields_of"),
    "invarlock.models.facts": (
        "ModelClass",
        "context_of",
        "device_of",
        "evaluating",
        "is_streamed",
        "task_of",
        "unread_tensors_of",
        "vocabulary_of",
    ),
    "invarlock.models.norms": ("is_norm",),
    "invarlock.models.structure": (
        "block_of",
        "find_blocks",
        "has_weights",
        "input_embeddings",
        "output_head",
        "predicts_tokens",
        "reads_images_alone",
    ),
    "invarlock.models.tokens": ("ChangedVocabulary", "stop_tokens"),
    "invarlock.plugins.classes": ("Guard", "ModelAdapter", "OptionNotTakenError"),
    "invarlock.quantization.selection": ("find_weights",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
