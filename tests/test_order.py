"""Order of clips: after kills and on any ranks and workers, each frame is read once per epoch.

The codes of a clip are its number and its frame numbers, so that tests can read these numbers from a batch.
"""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import costly
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mimi.common.errors import UserError
from llama_mimi.corpora.code_shards import CodedClip
from llama_mimi.data.dataloader import SpeechDataLoader
from llama_mimi.data.order import CorpusOrder, ShuffledOrder, Stream
from llama_mimi.data.packing import BatchPacker
from llama_mimi.tokens.tokenizer import IGNORE_INDEX

WINDOW = 6


class MadeUpReader:
    """Reader of clips with 1 to 40 frames, in units of 1 to 5 clips. Codes are numbers of corpus, clip and frame."""

    def __init__(self, number: int, num_units: int) -> None:
        generator = np.random.default_rng(number)
        self.number, self.name, self.fingerprint = number, "made up", f"made up {number}"
        self.rows_per_unit = generator.integers(1, 6, num_units)
        self.starts_U = np.cumsum([0, *self.rows_per_unit]).tolist()
        self.lengths = generator.integers(1, 41, self.rows_per_unit.sum())

    def read(self, unit):
        return range(self.starts_U[unit], self.starts_U[unit + 1])

    def clips(self, row):
        frames = np.arange(self.lengths[row])
        codes_TQ = np.stack([np.full_like(frames, self.number), np.full_like(frames, row), frames, 0 * frames], 1)
        return [CodedClip(f"{self.number}-{row}", codes_TQ, 0.0, is_cut=False)]


def make_loaders(readers, tokenizer, dp_world_size, num_workers, *, is_packed=True, seed=3):
    loaders, streams = [], [Stream("audio", reader) for reader in readers]
    for rank in range(dp_world_size):
        order = ShuffledOrder(streams, [len(reader.lengths) for reader in readers], rank, dp_world_size, WINDOW, seed)
        packer = BatchPacker(tokenizer, 2, 170, is_packed=is_packed, has_positions=True)
        loaders.append(SpeechDataLoader(streams, order, packer, workers={"num_workers": num_workers}))
    return loaders


def world_state(loaders):
    """Return the `state_dict` of a run in which each loader is a rank."""
    states = [json.loads(loader.state_dict()["position"]) for loader in loaders]
    counts = sum((Counter(state["counts"]) for state in states), Counter())
    sums = {"ranks": [state["ranks"][0] for state in states], "counts": counts, "frames": 0}
    return {"position": json.dumps(states[0] | sums)}


def frames_in(batch, tokenizer):
    """Return (corpus, clip, frame) of each target of a batch."""
    labels_L = batch[1].flatten()
    audio_L = labels_L[(labels_L != IGNORE_INDEX) & tokenizer.vocabulary.is_audio(labels_L)]
    codes_TQ = tokenizer.vocabulary.entries(audio_L).view(-1, tokenizer.vocabulary.num_quantizers)
    assert (codes_TQ[:, 3] == 0).all()
    return [tuple(frame) for frame in codes_TQ[:, :3].tolist()]


def frames_of_windows(readers, state, seed=3):
    """Return the frames that a run must have read at a state: the used parts of all windows."""
    positions = json.loads(state["position"])["ranks"]
    expected = Counter()
    for number, reader in enumerate(readers):
        order = CorpusOrder(reader.rows_per_unit, WINDOW, seed + number)
        cursors = [position["cursors"][number] for position in positions]
        end = max(cursor["next_window"] for cursor in cursors)
        left = {window: (0, 0) for c in cursors for window in range(c["next_window"], end, len(positions))}
        left |= {b["window"]: (b["rows_used"], b["frames_used"]) for cursor in cursors for b in cursor["begun"]}
        for window in range(end):
            clips = [reader.read(unit)[row] for unit, row in order.rows(window)]
            num_rows, first_frame = left.get(window, (len(clips), 0))
            lengths = {clip: reader.lengths[clip] for clip in clips[:num_rows]}
            lengths |= dict.fromkeys(clips[num_rows : num_rows + 1], first_frame)
            expected.update((number, clip, frame) for clip, length in lengths.items() for frame in range(length))
    return expected


segments = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([0, 0, 0, 1, 2, 3]), st.integers(0, 6)), min_size=2, max_size=5
)


@costly(max_examples=40)
@given(segments=segments, num_corpora=st.integers(1, 2), is_packed=st.booleans(), num_units=st.integers(1, 30))
def test_every_frame_once_over_changing_ranks(tokenizer, segments, num_corpora, is_packed, num_units):
    """Each segment (ranks, workers, steps) is killed after its steps. Clips that workers have read ahead are lost."""
    readers = [MadeUpReader(number, num_units) for number in range(num_corpora)]
    state, seen = None, Counter()
    for dp_world_size, num_workers, steps in segments:
        loaders = make_loaders(readers, tokenizer, dp_world_size, num_workers, is_packed=is_packed)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
            for batch in itertools.islice(loader, steps):
                seen.update(frames_in(batch, tokenizer))
        state = world_state(loaders)
    assert seen == frames_of_windows(readers, state)


@costly(max_examples=25)
@given(
    dp_world_size=st.integers(1, 4),
    workers=st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([0, 0, 2])),
    kill_after=st.integers(0, 12),
    is_packed=st.booleans(),
)
def test_the_same_ranks_go_on_as_if_never_killed(tokenizer, dp_world_size, workers, kill_after, is_packed):
    """A run with the same ranks, but another number of loader workers, continues as if it had not been killed."""
    readers = [MadeUpReader(0, 20), MadeUpReader(1, 7)]
    whole = make_loaders(readers, tokenizer, dp_world_size, workers[0], is_packed=is_packed)
    streams = [iter(loader) for loader in whole]
    assert all(len(list(itertools.islice(stream, kill_after))) == kill_after for stream in streams)
    state = world_state(whole)
    expected = [[next(stream) for _ in range(5)] for stream in streams]
    resumed = make_loaders(readers, tokenizer, dp_world_size, workers[1], is_packed=is_packed)
    for loader, batches in zip(resumed, expected, strict=True):
        loader.load_state_dict(state)
        for (inputs, labels_BL), batch in zip(batches, loader, strict=False):
            assert labels_BL.equal(batch[1]) and inputs["input"].equal(batch[0]["input"])
            assert inputs["positions"].equal(batch[0]["positions"])


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40), window=st.integers(1, 100), seed=st.integers(0, 9))
def test_an_epoch_of_windows_is_a_permutation(sizes, window, seed):
    order = CorpusOrder(np.array(sizes), window, seed)
    rows = [[unit, row] for unit, size in enumerate(sizes) for row in range(size)]
    n = order.windows_per_epoch
    epochs = [np.concatenate([order.rows(epoch * n + number) for number in range(n)]).tolist() for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows
    if len(rows) > 8:
        assert epochs[0] != epochs[1] and epochs[0] != rows


def corpus(*sizes):
    return Stream("audio", SimpleNamespace(rows_per_unit=np.array(sizes), fingerprint="made up"))


def test_the_order_of_a_run_stays():
    """The order of clips equals a recorded order, so that runs of earlier versions can be resumed."""
    order = ShuffledOrder([corpus(*[3, 5] * 70), corpus(*[2] * 40)], [0.7, 0.3], 1, 2, shuffle_window=9, seed=5)
    refs = [tuple(ref) for ref in itertools.islice(order, 1000)]
    assert refs[:4] == [(0, 1, 99, 3, 0), (0, 1, 99, 0, 0), (0, 1, 100, 0, 0), (1, 1, 33, 0, 0)]
    assert refs[-1] == (0, 171, 109, 2, 0)


def test_windows_are_of_one_size():
    """Ranks read windows in turn, so equal windows keep their epochs aligned."""
    order = CorpusOrder(np.full(1000, 10), 100, 0)
    assert {len(order.rows(window)) for window in range(order.windows_per_epoch)} == {100}
    assert CorpusOrder(np.full(16, 32), 256, 0).windows_per_epoch == 16, "as many as a small corpus has units"


def test_fractions_are_met_at_once():
    order = ShuffledOrder([corpus(*[50] * n) for n in (100, 40, 10)], [5, 3, 2], 1, 3, shuffle_window=100, seed=0)
    drawn = Counter(ref.stream for ref in itertools.islice(order, 200))
    assert [drawn[number] for number in range(3)] == pytest.approx([100, 60, 40], abs=3)


def test_a_shorter_longest_clip_may_be_set_on_resuming(tokenizer):
    """With a new limit, a clip may have fewer frames than were used before the checkpoint."""
    (whole,) = make_loaders([MadeUpReader(0, 9)], tokenizer, 1, 0)
    batches = iter(whole)
    while not any(begun.frames_used for begun in whole.order.position.cursors[0].begun):
        next(batches)
    reader = MadeUpReader(0, 9)
    reader.lengths = np.ones_like(reader.lengths)
    (resumed,) = make_loaders([reader], tokenizer, 1, 0)
    resumed.load_state_dict(whole.state_dict())
    assert len(frames_in(next(iter(resumed)), tokenizer)) > 20


def test_a_position_in_other_data_is_refused(tokenizer):
    loader, other = (make_loaders([MadeUpReader(k, 9)], tokenizer, 1, 0)[0] for k in (0, 1))
    with pytest.raises(UserError, match="exclude_from_loading dataloader"):
        other.load_state_dict(loader.state_dict())
    (reseeded,) = make_loaders([MadeUpReader(0, 9)], tokenizer, 1, 0, seed=4)
    with pytest.raises(UserError, match="with seed = 3, but the current value is 4"):
        reseeded.load_state_dict(loader.state_dict())
