"""What a score is: which tokens of a clip enter it, how they are joined, and what a tie counts.

Two presets for each benchmark. ``official`` is the benchmark's own rule. ``original`` is what the first release of
Llama-Mimi computes, its accidents included, so that its paper's numbers can be compared with: the same tokens, mean,
comparison and codes. The resampler is ours (the release uses that of `datasets`), and so are batches and float32 where
``--dtype float16`` is not given, so that scores agree to rounding, not to the last bit.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llama_mimi.common.errors import UserError
from llama_mimi.tokens.sequences import SequenceBuilder

Statistic = Literal["mean", "sum"]
Likelihood = Literal["softmax", "grammar"]
PresetName = Literal["official", "original"]


@dataclass(frozen=True)
class Scoring:
    """How the log-likelihoods of a clip's tokens become its score; higher is likelier.

    Args:
        levels: quantizer levels whose units are scored; None is all of them.
        end_token: ``</audio>`` is scored, where the clip has one.
        statistic: mean over the scored tokens, or their sum.
        window_seconds: the score is that of the least likely window of this length; None takes the whole clip.
        as_released: sequence, tokens and codes of the first release: BOS only if the tokenizer adds it, ``</audio>``
            also behind a clip that was cut, a partial last frame left to the codec, whose attention is "whole". With
            ``levels`` None every token after the first is scored, ``<audio>`` too; with ``(0,)`` every Q-th from
            position 2 on, which is level 0 and ``</audio>`` behind BOS, and level 1 without it.
        likelihood: "softmax" is over the model's whole vocabulary; "grammar" is over the tokens that can stand at a
            position, which are the codes of its level and, at level 0, ``</audio>``.
    """

    levels: tuple[int, ...] | None
    end_token: bool = True
    statistic: Statistic = "mean"
    window_seconds: float | None = None
    as_released: bool = False
    likelihood: Likelihood = "softmax"


@dataclass(frozen=True)
class Preset:
    """A scoring and what is made of the scores.

    Args:
        name: of the result file.
        scoring: of clips.
        tie: what a pair of equal scores counts.
        by_group: pairs of one group, such as the voices of one word, are averaged first.
    """

    name: str
    scoring: Scoring
    tie: float
    by_group: bool

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        return {**vars(self.scoring), "tie": self.tie, "by_group": self.by_group}


def preset(name: PresetName, levels: tuple[int, ...] | None) -> Preset:
    """A preset by its name; ``levels`` are those that the benchmark is scored on, by both."""
    return {
        "official": Preset("official", Scoring(levels), tie=0.5, by_group=True),
        "original": Preset("original", Scoring(levels, as_released=True), tie=0.0, by_group=False),
    }[name]


def with_options(
    base: Preset,
    *,
    levels: str | None = None,
    end_token: bool | None = None,
    statistic: Statistic | None = None,
    window_seconds: float | None = None,
    likelihood: Likelihood | None = None,
) -> Preset:
    """A preset with changed options. Its name lists them, so that a result is never taken for the standard one.

    Args:
        base: the preset.
        levels: "all", or levels divided by commas.
        end_token, statistic, window_seconds, likelihood: as `Scoring`; None keeps the preset's.

    Raises:
        UserError: an option that cannot be, or one to the preset "original", which is fixed.
    """
    if window_seconds is not None:
        if not 0 < window_seconds < math.inf:
            raise UserError(f"--window_seconds is {window_seconds}; it must be a positive number")
        if statistic == "sum" or end_token:
            raise UserError(
                "--window_seconds takes the mean over frames, without </audio>; leave out --statistic and --end_token"
            )
    given: dict[str, Any] = {
        "end_token": end_token,
        "statistic": statistic,
        "window_seconds": window_seconds,
        "likelihood": likelihood,
    }
    changes = {key: value for key, value in given.items() if value not in (None, getattr(base.scoring, key))}
    if levels is not None and (chosen := _levels(levels)) != base.scoring.levels:
        changes = {"levels": chosen} | changes
    if changes and base.scoring.as_released:
        raise UserError(
            f"--{next(iter(changes))} changes the scoring, but --preset {base.name} is fixed; use --preset official"
        )
    if window_seconds is not None:
        changes["end_token"] = False  # in no window
    names = [_label(*change) for change in changes.items() if window_seconds is None or change[0] != "end_token"]
    return replace(base, name="-".join([base.name, *names]), scoring=replace(base.scoring, **changes))


def check_model(scoring: Scoring, num_quantizers: int, *, has_release: bool) -> None:
    """Refuse what a model does not have.

    Raises:
        UserError: the highest level that it lacks, or the scoring of a release that its kind has not had.
    """
    if scoring.as_released and not has_release:
        raise UserError("no hierarchical model was released, so that none can be scored so; use --preset official")
    if scoring.levels is not None and max(scoring.levels) >= num_quantizers:
        raise UserError(
            f"--levels names level {max(scoring.levels)}, but the model has the levels 0 to {num_quantizers - 1}"
        )


def scored_sequence(
    sequences: SequenceBuilder, codes_TQ: torch.Tensor, *, is_cut: bool, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """A clip as ids (L,) and, for each of them, whether its log-likelihood enters the score (L,)."""
    Q = sequences.vocabulary.num_quantizers
    if scoring.as_released:
        ids_L = sequences.sequence(codes_TQ, is_cut=False)
        if not sequences.adds_bos:
            ids_L = ids_L[1:]
        is_scored_L = torch.zeros_like(ids_L, dtype=torch.bool)
        is_scored_L[(slice(1, None) if scoring.levels is None else slice(2, None, Q))] = True
        return ids_L, is_scored_L
    levels = range(Q) if scoring.levels is None else scoring.levels
    ids_L = sequences.sequence(codes_TQ, is_cut=is_cut)
    level_L = sequences.vocabulary.level(ids_L)
    is_scored_L = sequences.vocabulary.is_unit(ids_L) & torch.isin(level_L, torch.tensor(list(levels)))
    if scoring.end_token:
        is_scored_L |= ids_L == sequences.vocabulary.audio_end_id
    return ids_L, is_scored_L


def join(log_probs_N: torch.Tensor, num_frames: int, frame_rate_hz: float, scoring: Scoring) -> float:
    """The score of a clip in nats.

    Args:
        log_probs_N: log-likelihoods of its scored tokens, in order.
        num_frames: T of the clip.
        frame_rate_hz: of the codec.
        scoring: how they are joined.
    """
    if scoring.window_seconds is not None:
        frames_T = log_probs_N.view(num_frames, -1).mean(dim=1)
        window = min(max(round(scoring.window_seconds * frame_rate_hz), 1), num_frames)
        return float(frames_T.unfold(0, window, 1).mean(dim=1).min())
    return float(log_probs_N.mean() if scoring.statistic == "mean" else log_probs_N.sum())


def _levels(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    try:
        levels = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        levels = ()
    if not levels or levels[0] < 0:
        raise UserError(f"--levels is '{text}'; it is 'all' or levels divided by commas, such as 0 or 0,1")
    return levels


def _label(option: str, value: Any) -> str:
    match option, value:
        case "levels", None:
            return "all_levels"
        case "levels", _:
            return "levels_" + "_".join(map(str, value))
        case "end_token", _:
            return "with_end" if value else "without_end"
        case "window_seconds", _:
            return f"window_{value:g}s"
    return str(value)
