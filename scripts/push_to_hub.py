"""Upload a converted model to the hub, with a card that says what it was trained on and how it scored.

    uv run python scripts/push_to_hub.py --model_name models/tiny --repo me/tiny \\
        --results results --dry_run outputs/tiny_on_the_hub

With --dry_run nothing is uploaded.
"""

from llama_mimi.common.command_line import run_command
from llama_mimi.study.publishing import publish

if __name__ == "__main__":
    run_command(publish, __doc__)
