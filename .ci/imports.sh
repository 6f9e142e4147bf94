#!/usr/bin/env bash
# The import matrix: the folder kernels/ must never be taken for PyPI's package `kernels`, which transformers and
# bitsandbytes import. {raw checkout, editable install, wheel} x {without, with PyPI's kernels}; then an install with
# no compiler. Needs a built wheel in dist/ and the environment of `make setup`; makes its own under .cache/matrix.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
ROOT=$PWD
WORK=$ROOT/.cache/matrix
PIP_INSTALL=(-m pip install -q --disable-pip-version-check -c .ci/constraints.txt)
rm -rf "$WORK"
mkdir -p "$WORK"

# A new environment that sees the packages of .venv through a .pth file. The editable install in .venv works by a .pth
# of its own, which is not read from there, so each case brings its own peft_engine.
SHARED=$("$ROOT"/.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
new_environment() {  # name
  "$ROOT"/.venv/bin/python -m venv --without-pip "$WORK/$1"
  echo "$SHARED" > "$("$WORK/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
}

CHECK='
import importlib.util, sys
import transformers, bitsandbytes, peft_engine.kernels.nf4, peft_engine
want_kernels, where = sys.argv[1] == "with", sys.argv[2]
spec = importlib.util.find_spec("kernels")
has_kernels = spec is not None and spec.origin is not None
assert has_kernels == want_kernels, f"PyPI kernels: wanted {want_kernels}, found {spec}"
assert where in peft_engine.__file__, peft_engine.__file__
from transformers import AutoModelForCausalLM
print("ok", peft_engine.__file__)
'

check() {  # environment, with|without, folder to start in, part of the path peft_engine must come from
  echo "==> imports: $1, $2 PyPI kernels, from $3"
  (cd "$3" && "$WORK/$1/bin/python" -c "$CHECK" "$2" "$4")
}

for case in raw editable wheel; do
  new_environment $case
  python=$WORK/$case/bin/python
  case $case in
    raw) ;;
    # Without a compiler: `make setup` has shown that an editable install compiles, and the libraries lie there.
    editable) CXX=/nonexistent/c++ "$python" "${PIP_INSTALL[@]}" --no-deps --no-build-isolation -e . ;;
    wheel) "$python" "${PIP_INSTALL[@]}" --no-deps dist/peft_engine-*.whl ;;
  esac
  for kernels in without with; do
    if [ $kernels = with ]; then "$python" "${PIP_INSTALL[@]}" kernels==0.17.2; fi
    case $case in
      raw) check $case $kernels "$ROOT" "$ROOT/peft_engine" ;;
      editable) check $case $kernels "$ROOT" "$ROOT/peft_engine"; check $case $kernels "$WORK" "$ROOT/peft_engine" ;;
      wheel) check $case $kernels "$WORK" "$WORK/wheel" ;;
    esac
  done
done

echo "==> install with no compiler"
name=no-compiler
new_environment "$name"
# A copy: the compiled library of the checkout must not be found.
mkdir "$WORK/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$WORK/source"
CC=/nonexistent/cc CXX=/nonexistent/c++ "$WORK/$name/bin/python" "${PIP_INSTALL[@]}" --no-deps --no-build-isolation "$WORK/source"
cd "$WORK"
"$WORK/$name/bin/python" - <<'PY'
import torch
from peft_engine import dispatch
from peft_engine.ops import lora_linear, nf4_quantize

why = dispatch.available_backends()["cpu"]
assert why is not None and "g++" in why, f"the missing compiler is not named: {why}"
weight, x = torch.randn(96, 64), torch.randn(3, 64)
q = nf4_quantize(weight)
y = lora_linear(x, q, torch.ones(4, 64), torch.ones(96, 4), 0.5)
expected = x @ q.dequantize().T + 0.5 * (x @ torch.ones(64, 4)) @ torch.ones(4, 96)
assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
print("ok: the reference runs;", why)
PY
"$WORK/$name/bin/python" - <<'PY'
import transformers

import peft_engine as pe

sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
pe.quantize_(model)
pe.attach(model, pe.LoraConfig(r=4, target_modules="all-linear"))
report = pe.optimize(model)
assert any("not compiled" in layer.reason for layer in report.layers), str(report)
print("ok: explain says why nothing is fused")
PY
# As on a machine that still has no compiler: nothing on the PATH.
PATH=/nonexistent "$WORK/$name/bin/python" -m peft_engine doctor --json > doctor.json
"$WORK/$name/bin/python" - <<'PY'
import json

said = json.load(open("doctor.json"))
assert said["backends"]["cpu"] and said["backends"]["reference"] is None, said["backends"]
assert any("compiler" in p["problem"] and "g++" in p["fix"] for p in said["problems"]), said["problems"]
print("ok: doctor names what is missing and the command that mends it")
PY
