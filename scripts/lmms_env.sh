#!/usr/bin/env bash
# An environment for lmms-eval, in .venv-lmms (or the folder given), on top of the one that is active.
#
#   . .venv/bin/activate; bash scripts/lmms_env.sh [FOLDER]
#   .venv-lmms/bin/python -m lmms_eval --model proxyv --model_args pretrained=DIR --tasks docvqa_val
#
# lmms-eval asks for 155 packages, a torchvision that does not fit a CPU torch among them. Here torch,
# transformers and datasets stay those of the active environment; only what is missing is added.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
show_help "$@"
folder=${1:-.venv-lmms}
base=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python -c 'import torch, transformers, datasets, accelerate' ||
    { echo "error: activate an environment with proxyv[eval] first" >&2; exit 1; }
python -m venv "$folder"
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$base')" >"$own/base_environment.pth"
pip() { "$folder/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$@"; }
pip "lmms-eval==0.7.3" aiohttp aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl \
    chardet colorama DataProperty evaluate loguru lxml mbstrdecoder numexpr openpyxl et-xmlfile \
    pathvalidate portalocker pytablewriter python-dotenv pytz sacrebleu tabledata tabulate tcolorpy \
    tenacity typepy sqlitedict zstandard jsonlines
pip -e .
"$folder/bin/python" -c 'from lmms_eval.models import list_available_models as names; assert "proxyv" in names()'
echo "lmms-eval with the model proxyv: $folder/bin/python -m lmms_eval"
