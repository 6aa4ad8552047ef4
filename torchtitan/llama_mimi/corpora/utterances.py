"""Consecutive utterances of a tokenised corpus, for the task "interleaved"."""

from dataclasses import dataclass

from llama_mimi.common.errors import UserError
from llama_mimi.corpora.clips import CodedClip, SkippedClip
from llama_mimi.corpora.code_shards import CodeCorpus
from llama_mimi.corpora.source import Row

CLIPS_PER_BLOCK = 16  # maximum number of consecutive utterances
FILTERED = "interleaved without some clips: they lack a transcript, or are cut"


@dataclass(frozen=True)
class Utterances:
    """Runs of consecutive utterances. The utterances of a run belong to one speaker."""

    name: str
    runs: list[list[CodedClip]]
    is_cut: bool = False
    audio_warnings: tuple[str, ...] = ()


class UtteranceCorpus(CodeCorpus):
    """Reader of a tokenised corpus. A row of this reader is a block of 16 consecutive clips of a row group.

    The clips of a block have the order of the corpus before tokenisation. A run ends if the speaker changes. Clips that
    lack a transcript or are cut are filtered, and also end a run.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if "speaker" not in self.manifest["columns"]:
            remedy = "tokenise the corpus again with --speaker_column, or remove the task 'interleaved'"
            raise UserError(f"the tokenised corpus '{self.name}' does not contain speakers; {remedy}")
        self._columns.append("speaker")
        self.rows_per_unit = -(-self.rows_per_unit // CLIPS_PER_BLOCK)

    def read(self, unit: int) -> list[Row]:
        rows = super().read(unit)
        starts = range(0, len(rows), CLIPS_PER_BLOCK)
        return [{"id": rows[start]["id"], "rows": rows[start : start + CLIPS_PER_BLOCK]} for start in starts]

    def clips(self, row: Row) -> list[Utterances | SkippedClip]:  # type: ignore[override]
        """Convert a block, as returned by `read`, to a list of one `Utterances`."""
        runs: list[list[CodedClip]] = []
        previous = None  # speaker of the previous clip, if a run can continue
        for part in row["rows"]:
            (clip,) = super().clips(part)
            if isinstance(clip, SkippedClip) or clip.is_cut:
                previous = None
                continue
            if previous is None or part["speaker"] != previous:
                runs.append([])
            runs[-1].append(clip)
            previous = part["speaker"]
        if not runs:
            problem = f"'{row['id']}' and the next clips lack a transcript, or are cut"
            return [SkippedClip("no text", problem, is_filtered=True)]
        is_whole = sum(map(len, runs)) == len(row["rows"])
        return [Utterances(row["id"], runs, audio_warnings=() if is_whole else (FILTERED,))]
