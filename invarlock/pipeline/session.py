"""A session: loads the models of one configuration, makes windows, and runs models over them; it asks no guard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from invarlock.checkpoints.checksums import check_weights
from invarlock.checkpoints.inputs import InputFiles
from invarlock.checkpoints.locating import config_file
from invarlock.checkpoints.packing.activations import simulation_of
from invarlock.checkpoints.soundness import read_json
from invarlock.config.schema import CountedDataset, RunConfig
from invarlock.core.errors import PluginError, UsageError, named_by
from invarlock.core.invocation import Invocation
from invarlock.core.progress import Progress
from invarlock.core.records import Samples
from invarlock.core.results import Action, Finding
from invarlock.datasets.conversations import ChatTemplate
from invarlock.datasets.layout import Windows
from invarlock.datasets.windows import TooLittleText
from invarlock.distributed.dtensor import Sharding, sharding_of
from invarlock.distributed.gathered_view import WholeView
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenRecord
from invarlock.evaluation.task import LanguageTask
from invarlock.models.autograd import start_contexts
from invarlock.models.batches import batch_size
from invarlock.models.facts import ModelClass, own_code_of
from invarlock.models.simulation import NONE, Simulation
from invarlock.models.state import ModelState, put_on_hooks_of_its_own
from invarlock.pipeline.clock import Clock
from invarlock.pipeline.coverage import Declared
from invarlock.pipeline.keeping import Watched, some
from invarlock.pipeline.reference.kept import Reference
from invarlock.pipeline.tasks import find_task, suited
from invarlock.pipeline.tokenizer import LoadedTokenizer
from invarlock.plugins.adapter import Adapter
from invarlock.plugins.manager import PluginManager
from invarlock.plugins.plugin import Kind

BASELINE, SUBJECT = "model.id", "subject"
"""The key and the argument that name a checkpoint, for messages."""
WindowPair = tuple[Windows, Windows]
"""Preview windows, which are the guards', and final ones, which are the metric's."""
FIRST_WRITTEN = 4
"""Final windows that a model writes before it is known whether more are needed: as many as the first look takes."""
FEWEST = 2
"""Final windows without which there is no interval."""
SEEDS_APART = 1_000_003
"""Between the seeds of two lots of windows: further than users' seeds are from each other."""


class Session:
    """Configuration, plugins, processes and clock that the models of one run have in common."""

    def __init__(
        self,
        config: RunConfig,
        plugins: PluginManager,
        on_progress: Progress = lambda stage, done, total: None,
        ranks: Ranks = ALONE,
        invocation: Invocation | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.config, self.plugins, self.ranks = config, plugins, ranks
        self.reference = reference
        """Holds the windows and the baseline's pass, where there is one."""
        self.invocation = invocation or Invocation()
        self.clock = Clock(self.invocation.began, on_progress)
        self._documents: Samples | None = None
        self._checkpoints: dict[Path, InputFiles] = {}
        """Each that was loaded, as it was before."""
        self._simulations: WeakKeyDictionary[torch.nn.Module, Simulation] = WeakKeyDictionary()

    @property
    def trust(self) -> dict[str, Any]:
        """Options that every load of a model or a tokenizer is given."""
        section = self.config.model
        return {"trust_remote_code": section.trust_remote_code, "revision": section.revision}

    @property
    def known_digests(self) -> Mapping[str, str]:
        """Digests of the baseline's tensors by their mark, as of ``Prints``, as far as a reference holds them."""
        return self.reference.by_mark if self.reference else {}

    def documents(self) -> Samples | None:
        """The text of the dataset, None where the baseline writes it; read before a model is loaded, to fail early.

        :raises UsageError: no provider has this name, or it cannot read the text.
        :raises PluginError: the provider failed.
        """
        dataset = self.config.dataset
        if self._documents is None and not dataset.is_generated:
            with self.clock.stage("load"):
                self._documents = self.plugins.documents(dataset)
        return self._documents

    def take_documents(self) -> Samples | None:
        """The text of the dataset, let go of: a corpus need not stay in memory once windows are made of it."""
        documents, self._documents = self.documents(), None
        return documents

    def load(
        self, model_id: str, *, stream: bool = False, spread: bool = False, key: str = BASELINE
    ) -> tuple[torch.nn.Module, Adapter]:
        """Load a checkpoint as ``model`` of the configuration says.

        :param key: the key or argument that names the checkpoint, for messages.
        :param stream: leave its weights on disk, to be read at each use.
        :param spread: spread its weights over the processes, if there are several and ``model.parallel`` says so.
        :raises UsageError: also when weights are offloaded: they could be neither edited nor judged in memory.
        """
        section = self.config.model
        with named_by(key):
            self._check_owned(model_id)
            self._take_note_of(Path(model_id))
        torch.manual_seed(self.config.dataset.seed)
        options = {"dtype": section.dtype, **self.trust, **({"stream": True} if stream else {})}
        if spread and self.ranks.size > 1 and section.parallel != "windows":
            options["parallel"] = section.parallel
        with self.clock.stage("load"), named_by(key):
            model, adapter = self.plugins.load_model(section.adapter, model_id, section.device, options)
        if not isinstance(model, torch.nn.Module):
            found = type(model).__name__
            raise PluginError(f"adapter {adapter.name}: load_model returned {found}, not a torch.nn.Module")
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta":
                raise UsageError(
                    f"model.device: {name} is offloaded (on the meta device) and cannot be quantized in place; "
                    "load the whole model onto devices"
                )
        start_contexts(model)
        put_on_hooks_of_its_own(model)
        return model, adapter

    def simulate(self, model: torch.nn.Module, model_id: str, key: str = BASELINE) -> None:
        """Let passes over a model round what its checkpoint declares to be rounded while it runs.

        :raises UsageError: the scales for that are broken.
        """
        with named_by(key):
            self._simulations[model] = simulation_of(model, Path(model_id))

    def simulation(self, model: torch.nn.Module) -> Simulation:
        return self._simulations.get(model, NONE)

    def _check_owned(self, model_id: str) -> None:
        """Refuse a class that no task owns, and samples that its task cannot read, before the weights are loaded.

        An adapter that is named may make another class of it, unless it says that it does not.

        :raises UsageError: with the tasks that there are, or the columns that it reads.
        """
        section = self.config.model
        if section.adapter != "auto":
            adapter = self.plugins.catalog.get(section.adapter, Kind.ADAPTER, "model.adapter").instance
            if not getattr(adapter, "keeps_class", False):
                return
        config = config_file(model_id, section.revision)
        model_class = ModelClass.declared(read_json(config)) if config else None
        if model_class and model_class.names:
            suited(find_task(self.plugins, model_class), self._documents)

    def _take_note_of(self, checkpoint: Path) -> None:
        """Hold the files of a checkpoint against digests that lie beside them; processes share the files.

        :raises UsageError: a file is not what its digest says.
        """
        if not checkpoint.exists() or checkpoint in self._checkpoints:
            return
        self._checkpoints[checkpoint] = InputFiles.of(checkpoint)
        with self.clock.stage("check digests"), self.ranks.progress_summed():
            check_weights(checkpoint, self.ranks.rank, self.ranks.size)
            self.ranks.gather(None)

    def changed_checkpoints(self) -> list[Finding]:
        """A warning for each checkpoint whose files are not what they were before it was loaded."""
        changed = ((checkpoint, files.changes()) for checkpoint, files in self._checkpoints.items())
        return [
            Finding("input checkpoint", Action.WARN, f"{checkpoint} was changed during the run: {some(changes)}")
            for checkpoint, changes in changed
            if changes
        ]


class Baseline:
    """Facts of a loaded baseline that stay when its weights go, and ways to run it and the edited model.

    :param wants_tokenizer: load the tokenizer if there is one, even if no text has to be read with it.
    :param reads_text: whether windows are made with the tokenizer; None leaves it to the dataset and the task.
    :raises UsageError: the tokenizer is needed, and cannot be loaded.
    """

    @named_by(BASELINE)
    def __init__(
        self,
        session: Session,
        model: torch.nn.Module,
        adapter: Adapter,
        *,
        wants_tokenizer: bool = False,
        reads_text: bool | None = None,
    ) -> None:
        config = session.config
        self.session, self.adapter = session, adapter
        dataset = config.dataset
        self.dataset = dataset.counted(dataset.max_n if dataset.final_n == "auto" else dataset.final_n)
        """With the number of final windows that there are, or that the model writes at most."""
        self.task, self.sharding = find_task(session.plugins, ModelClass.of(model)), sharding_of(model)
        self.task.metric.check(config.eval.metric.kind, self.task.name)
        self.view = WholeView(model) if self.sharding else None
        """Of a model that is spread over the processes."""
        self._view_state = ModelState.of(self.view.model) if self.view else None
        self.declared = Declared.of(model, config.model.id, session.simulation(model))
        self.own_code = own_code_of(model)
        self.description: Mapping[str, Any] = adapter.describe(self.shown(model))
        if reads_text is None:
            reads_text = self.task.needs_tokenizer(self.dataset)
        self._reads_text = reads_text
        with session.clock.stage("load"):
            self._tokenizer = LoadedTokenizer(
                adapter, config.model.id, session.trust, required=reads_text, wanted=reads_text or wants_tokenizer
            )

    @property
    def has_strangers(self) -> bool:
        """True if others may have a hand on the model and its tokenizer, which take as long to read as a batch."""
        return self.session.plugins.catalog.has_strangers or bool(self.own_code)

    @property
    def tokenizer(self) -> Any:
        """The baseline's, or None where there is none or nobody needs it."""
        return self._tokenizer.live

    @property
    def reader(self) -> Any:
        """The tokenizer that windows are made with; None where no text is read."""
        return self.tokenizer if self._reads_text else None

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template of a causal model's tokenizer, or None."""
        return ChatTemplate.of(self.tokenizer) if self.task.name == "causal" else None

    @property
    def chat(self) -> ChatTemplate | None:
        """The template, if it renders some of the windows."""
        template = self.template if self.session.config.dataset.has_conversations else None
        return template if template and template.roles else None

    def shown(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as guards see it."""
        return self.view.model if self.view else model

    def undo(self, watched: Watched, *, at_the_end: bool = False) -> list[str]:
        """Undo changes of all that guards can reach, the model as they see it and the tokenizer, and name them.

        :param at_the_end: nobody looks again, so that all is read even where all code is our own.
        """
        quick = not (at_the_end or self.has_strangers)
        of_tokenizer = [] if quick else self._tokenizer.undo()
        if self.view and self._view_state:
            return [*self._view_state.undo(), *self.view.undo(), *of_tokenizer]
        return [*watched.undo(quick=quick), *of_tokenizer]

    @named_by(BASELINE)
    def make_windows(self, model: torch.nn.Module) -> WindowPair:
        """Windows of text, or of what the model writes.

        If windows are measured step by step, all that the text is enough for, or the first that the model writes.

        :raises UsageError: there is too little text, or it does not fit the model.
        """
        if reference := self.session.reference:
            self.dataset = self.dataset.counted(reference.measured.most)
            return reference.windows
        documents, wanted = self.session.take_documents(), self.session.config.dataset
        with self.session.clock.stage("windows"):
            tokenizer = self.reader
            if wanted.is_stepped and documents is None:
                first = wanted.counted(min(FIRST_WRITTEN, wanted.max_n))
                return self._windows_of(first, model, tokenizer, None)
            try:
                return self.windows_of(model, tokenizer, documents)
            except TooLittleText as error:
                if not wanted.is_stepped:
                    raise
                self.dataset = wanted.counted(max(FEWEST, error.windows - wanted.preview_n))
                return self.windows_of(model, tokenizer, documents)

    @named_by(BASELINE)
    def write_windows(self, model: torch.nn.Module, count: int, *, lot: int) -> Windows:
        """So many more final windows that the model writes; lot 0 came with the preview windows."""
        more = replace(self.dataset, preview_n=0, final_n=count, seed=self.dataset.seed + lot * SEEDS_APART)
        with self.session.clock.stage("windows"):
            return self._windows_of(more, model, self.reader, None)[1]

    def windows_of(self, model: torch.nn.Module, tokenizer: Any, documents: Samples | None) -> WindowPair:
        """Windows that the task makes, some of them conversations where the baseline's template renders any."""
        return self._windows_of(self.dataset, model, tokenizer, documents)

    def _windows_of(
        self, dataset: CountedDataset, model: torch.nn.Module, tokenizer: Any, documents: Samples | None
    ) -> WindowPair:
        task, given = self.task, (model, dataset, tokenizer, suited(self.task, documents))
        if isinstance(task, LanguageTask) and self.chat:
            return task.make_windows(*given, chat=self.chat)
        return task.make_windows(*given)

    @property
    def sees_preview(self) -> bool:
        """True in a process that runs the preview windows: the first one, or all where the model is spread."""
        return self.session.ranks.is_first or self.sharding is not None

    @named_by(BASELINE)
    def run_pass(
        self,
        model: torch.nn.Module,
        windows: WindowPair,
        stage: str,
        *,
        taps: Sequence[Mapping[str, Any]] = (),
        reference: TokenRecord | None = None,
        vocabulary: int | None = None,
        taps_off: Callable[[], None] = lambda: None,
    ) -> tuple[PassResult, TokenRecord | None]:
        """Run a model over all windows once; processes share the final ones.

        :param taps: on the preview windows, by module name.
        :param reference: the baseline's record of its predictions, to compare with.
        :param vocabulary: number of tokens to predict among, as :func:`~invarlock.evaluation.passes.measure` has it.
        :param taps_off: called once no tap is on the model any more.
        :returns: what all processes measured, and this one's record of its predictions.
        """
        preview, final = windows
        ranks = self.session.ranks
        # Under tensor parallelism all processes measure the same.
        whole = self.sharding is Sharding.TENSOR
        share, calls = self._share_of(final, ahead=0 if self.sharding else len(preview), model=model)
        with self.session.clock.stage(stage), nullcontext() if whole else ranks.progress_summed():
            with self.session.simulation(model).running(model):
                measured = self.task.measure(
                    model,
                    preview if self.sees_preview else preview[:0],
                    final[share],
                    taps=taps,
                    reference=reference,
                    vocabulary=vocabulary,
                    calls=calls,
                    taps_off=taps_off,
                )
            parts = ranks.gather(replace(measured, record=None))
        return PassResult.joined(parts[:1] if whole else parts), measured.record

    @named_by(BASELINE)
    def run_alone(self, model: torch.nn.Module, windows: WindowPair) -> None:
        """Run one window, with nobody looking on."""
        preview, final = windows
        self.task.measure(model, preview[:0], final[:1])

    def _share_of(self, final: Windows, *, ahead: int, model: torch.nn.Module) -> tuple[slice, int]:
        """This process's part of the final windows, and how often all of them have to run the model."""
        if self.sharding is Sharding.TENSOR:
            return slice(None), 0
        ranks = self.session.ranks
        share = ranks.share(len(final), ahead=ahead)
        if self.sharding is None:
            return share, 0
        most = -(-len(final) // ranks.size)
        return share, -(-most // batch_size(model, final.length))
