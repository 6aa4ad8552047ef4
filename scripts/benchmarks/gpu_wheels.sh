#!/usr/bin/env bash
# Download the wheels that gpu_session.py needs on a GPU machine without a network, and check that they are complete.
#
#     scripts/benchmarks/gpu_wheels.sh [folder]     # in the repository; default: outputs/wheels
#
# The machine has Python 3.12 and the packages in `has`. This script installs these packages in a local environment,
# adds the wheels, and imports every module. It needs uv, Python 3.12 and 8 GB of disk space. It prints the size of the
# wheels and of the repository, and the command for the machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=$(realpath -m "${1:-outputs/wheels}")
has="torch==2.11.0 torchaudio==2.11.0 triton==3.6.0 transformers==5.17.0 tokenizers==0.23.2 huggingface_hub==1.33.0
    safetensors==0.8.0 numpy==2.5.2 pyarrow pandas scipy jinja2 tensorboard tqdm xxhash psutil pyyaml fsspec regex pip"
# Packages that the machine lacks. It has transformers, but not the version of pyproject.toml.
lacks="annotated-types cffi datasets dill docstring-parser multiprocess pycparser pydantic pydantic-core soundfile soxr
    torchdata torchtitan transformers typeguard typing-inspection tyro"

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
uv venv --quiet --python 3.12 "$environment/machine"
python=$environment/machine/bin/python
uv pip install --quiet --python "$python" $has
uv pip uninstall --quiet --python "$python" $lacks # some are dependencies of other packages

rm -rf "$wheels"
mapfile -t versions < <(uv pip freeze --quiet | grep -E "^($(echo $lacks | tr ' ' '|'))==")
"$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$wheels" "${versions[@]}"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" . # for the version of this package
"$python" -m pip install --quiet --no-index --no-deps --target "$environment/site" "$wheels"/*.whl
PYTHONPATH=$PWD/torchtitan:$PWD/scripts/benchmarks:$environment/site "$python" - << 'END'
import importlib
import pkgutil

import gpu_session  # first: TorchTitan chooses its device when it is imported
import llama_mimi

modules = [module.name for module in pkgutil.walk_packages(llama_mimi.__path__, "llama_mimi.")]
for module in modules:
    importlib.import_module(module)
print(f"{len(modules)} modules can be imported: {gpu_session.versions()}")
END

tree=$(git ls-files -z | du --bytes --total --files0-from=- | tail -1 | cut -f1)
size=$(du --bytes --summarize "$wheels" | cut -f1)
echo "wheels: $((size >> 20)) MiB; repository: $((tree >> 20)) MiB. Command for the machine, in the repository:"
# Without bytecode, the imports of each phase would take 20 s.
echo "python3 -m pip install -q --no-index --no-deps --target outputs/site ${1:-outputs/wheels}/*.whl &&" \
    'PYTHONDONTWRITEBYTECODE= PYTHONPATH=$PWD/torchtitan:$PWD/outputs/site' \
    'python3 scripts/benchmarks/gpu_session.py --output gpu_session.jsonl'
