# Sourced by the other scripts: a Python environment with what this project needs.
#
#   . scripts/env.sh; ensure_env train eval
#
# An active virtual or conda environment is used; otherwise .venv is made in the repository.
# PROXYV_ENV=as-is takes the python on the path and installs nothing, for machines without a network.
# torch is pinned: on a machine without an NVIDIA GPU the CPU build is taken, so that no CUDA packages
# arrive. A stamp for each extra in the environment makes the second call cost nothing.

proxyv_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
proxyv_torch=2.13.0
proxyv_torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
mistake() { printf 'error: %s\n' "$*" >&2; exit 2; } # of who typed the command

# show_help "$@": where -h or --help is among the arguments, the comment that the script begins with.
show_help() {
    case " $* " in *" -h "* | *" --help "*) ;; *) return 0 ;; esac
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$proxyv_root/scripts/$(basename "$0")"
    exit 0
}

# Number of NVIDIA GPUs that this machine shows.
count_gpus() {
    local gpus
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
    echo "${gpus:-0}"
}

# True when PyTorch's CPU package index answers within seconds.
_torch_index_answers() {
    python - "$proxyv_torch_cpu_index" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(64)
PY
}

_install_torch() {
    python -c 'import torch' 2>/dev/null && return
    if [ "$(count_gpus)" -gt 0 ]; then
        say "installing torch $proxyv_torch with CUDA"
        python -m pip install -q "torch==$proxyv_torch"
    elif _torch_index_answers; then
        say "installing torch $proxyv_torch for the CPU"
        python -m pip install -q "torch==$proxyv_torch" --index-url "$proxyv_torch_cpu_index"
    else
        say "installing torch $proxyv_torch (PyTorch's CPU index does not answer: the default one)"
        python -m pip install -q "torch==$proxyv_torch"
    fi
}

# ensure_env EXTRA...: an environment in which proxyv[EXTRA,...] is installed, and active.
ensure_env() {
    local extras extra stamp want stands=yes
    extras=$(IFS=,; echo "$*")
    if [ "${PROXYV_ENV:-}" = as-is ]; then
        export PYTHONPATH=$proxyv_root${PYTHONPATH:+:$PYTHONPATH}
        return
    fi
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if [ ! -x "$proxyv_root/.venv/bin/python" ]; then
            say "making a virtual environment in .venv"
            python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
                fail "python3 is $(python3 --version 2>&1); Python 3.10 or newer is needed"
            python3 -m venv "$proxyv_root/.venv" || fail "python3 -m venv failed (on Debian: apt install python3-venv)"
        fi
        # shellcheck disable=SC1091
        . "$proxyv_root/.venv/bin/activate"
    fi
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    stamp=${VIRTUAL_ENV:-$CONDA_PREFIX}/.proxyv-
    want="$proxyv_root $(cksum <"$proxyv_root/pyproject.toml")"
    for extra in "$@"; do
        [ "$(cat "$stamp$extra" 2>/dev/null)" = "$want" ] || stands=
    done
    if [ -z "$stands" ]; then
        _install_torch || fail "torch $proxyv_torch could not be installed"
        say "installing proxyv[$extras]"
        python -m pip install -q -e "$proxyv_root[$extras]" || fail "installation failed"
        for extra in "$@"; do printf '%s' "$want" >"$stamp$extra"; done
    fi
}
