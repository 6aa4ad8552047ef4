"""The study of the architectures: its table, its picture, and how many steps cost the same."""

import compare_arms
from conftest import ROOT


def test_the_table_of_the_architectures(tmp_path, capsys):
    """Means, ranges and shares of made-up runs, as printed; and the picture is drawn."""

    def summary(seed: int, bits: float) -> dict:
        names = ("salmon/speaker_consistency", "sLM21/lexical_dev", "sLM21/syntactic_dev", "sStoryCloze/storycloze")
        return {
            "steps": 7,
            "flops_per_frame": 3.2e7,
            "generated_frames_per_s": 20.0,
            "bits": {"all": 4 * bits, **{f"level_{level}": bits for level in range(4)}},
            "scores": {name: {"accuracy": 0.5 + 0.1 * seed, "count": 100} for name in names},
            "ended": seed,
            "prompts": 4,
        }

    runs = {arm: [summary(seed, 10.0 + seed) for seed in range(3)] for arm in compare_arms.ARMS}
    compare_arms.print_table(runs)
    heads, _, row, *others = capsys.readouterr().out.splitlines()
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert cells["bits/s"] == "44.0 (40.0 to 48.0)" and cells["level 2"] == "11.0 (10.0 to 12.0)"
    assert cells["sWUGGY"] == "60.0 % (50 to 69)" and cells["ended by itself"] == "25 % of 12"
    assert cells["MFLOPs a frame"] == "32" and len(others) == len(compare_arms.ARMS) - 1
    compare_arms.draw(runs, tmp_path / "arms.png")
    assert (tmp_path / "arms.png").stat().st_size > 10_000


def test_the_same_flops(monkeypatch):
    """A frame of the hierarchical arm costs less, so that it takes more steps for the same."""
    monkeypatch.chdir(ROOT)
    layers, D, Q, K, V = 1_574_400, 192, 4, 256, 1538
    # A position of the flattened arm: layers, norm and the output, and attention over 256 positions.
    assert compare_arms.flops_per_frame("flattened") == Q * (6 * (layers + D + V * D) + 12 * 4 * D * 256)
    # A frame of the other: layers, norm and 257 entries, and attention over 64 positions; then Q positions of a layer
    # of width 96 behind a projection, attention over Q positions, and once the matrices of three levels.
    depth = 96 * (96 + 32 + 32 + 96) + 3 * 96 * 768 + 2 * 96
    backbone = 6 * (layers + D + (K + 1) * D) + 12 * 4 * D * 64
    levels = Q * (6 * (depth + 96 + D * 96) + 12 * 1 * 96 * Q) + 6 * 3 * (K + 1) * 96
    assert compare_arms.flops_per_frame("hierarchical") == backbone + levels
