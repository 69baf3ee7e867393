"""The checkpoints of a run: sound before they are loaded, and unchanged afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from invarlock.checkpoints.checksums import check_weights
from invarlock.checkpoints.inputs import InputFiles
from invarlock.core.results import Action, Finding
from invarlock.distributed.process_group import Ranks
from invarlock.pipeline.clock import Clock
from invarlock.pipeline.keeping import some


@dataclass
class Inputs:
    """The checkpoints that were loaded, as they were before."""

    ranks: Ranks
    clock: Clock
    _before: dict[Path, InputFiles] = field(default_factory=dict)

    def take_note_of(self, checkpoint: Path) -> None:
        """Hold the files of a checkpoint against digests that lie beside them; processes share the files.

        :raises UsageError: a file is not what its digest says.
        """
        if not checkpoint.exists() or checkpoint in self._before:
            return
        self._before[checkpoint] = InputFiles.of(checkpoint)
        with self.clock.stage("check digests"), self.ranks.progress_summed():
            check_weights(checkpoint, self.ranks.rank, self.ranks.size)
            self.ranks.gather(None)

    def changes(self) -> list[Finding]:
        """A warning for each checkpoint whose files are not what they were before it was loaded."""
        changed = ((checkpoint, files.changes()) for checkpoint, files in self._before.items())
        return [
            Finding("input checkpoint", Action.WARN, f"{checkpoint} was changed during the run: {some(changes)}")
            for checkpoint, changes in changed
            if changes
        ]
