#!/usr/bin/env bash
# Everything that only a GPU can show, the most telling first, in one call of under ten minutes:
#
#     bash tests/gpu.sh          on a machine with CUDA
#     bash tests/gpu.sh --dry    the same commands on a CPU with tiny shapes, in under three minutes: do they work at all?
#
# Every part has a time limit of its own, and its log is printed as soon as it ends, so that a call that is cut off has
# still told what it found. A part that fails does not stop the next one; the last line names those that failed.
cd "$(dirname "$0")/.." || exit
root=$PWD
export PYTHONUNBUFFERED=1 PYTHONPATH=$root
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$work/inductor  # compile anew, as on a user's first run

device=cuda stories=20000 big="--n_layer=8 --n_embd=512 --block_size=512" large=65536 streams=512 steps=300
if [ "$1" = --dry ]; then
    device=cpu stories=2000 big="--n_layer=1 --n_embd=64 --block_size=64" large=512 streams=4 steps=4
fi
big="$big --device=$device --evals=1"
failures=""

part() {  # part NAME SECONDS COMMAND …: run it, and print the end of its log
    echo "=== [$SECONDS s] $1"
    timeout "$2" "${@:3}" >"$work/$1.log" 2>&1
    local code=$?
    tail -n "${lines:-14}" "$work/$1.log"
    echo "exit code $code [$SECONDS s]"
    [ $code = 0 ] || failures+=" $1"
}

python3 "$root/tests/gpu_parts.py" machine
cd "$work" || exit
python3 -m lab.world --n=$stories >/dev/null 2>&1
python3 "$root/prepare.py" --dataset=world 2>&1 | tail -n 2

lines=30 part tests 140 python3 -m pytest -q -x -p no:cacheprovider "$root/tests/test_device.py"
part mfu 110 python3 "$root/train.py" $big --compile=True --batch_tokens=$large --max_steps=$steps --out_dir=out/mfu
tail -n 3 out/mfu/log.jsonl
lines=45 part profile 80 python3 "$root/tests/gpu_parts.py" profile
part plain 60 python3 "$root/train.py" ${big/--block_size=512/} --max_steps=$((2 * steps)) --out_dir=out/plain
part six-gigabytes 40 python3 "$root/tests/gpu_parts.py" six-gigabytes $big --compile=False --batch_tokens=$large \
    --max_steps=4 --out_dir=out/six
part turing 50 python3 "$root/tests/gpu_parts.py" turing $big --compile=False --batch_tokens=$large --max_steps=10 \
    --out_dir=out/turing
part eval-float32 40 python3 "$root/eval.py" out/mfu --only=loss --device=$device
part eval-bfloat16 40 python3 "$root/eval.py" out/mfu --only=loss --device=$device --dtype=bfloat16
for n in 1 $streams; do
    for dtype in float32 bfloat16; do
        part "sample-$n-$dtype" 40 python3 "$root/tests/gpu_parts.py" sample out/mfu $device $n $dtype
    done
done
grep -H -E "^(tokens_per_second|peak_memory_mb|first_step_seconds|seconds|val_bpb)" "$work"/*.log | sed "s|$work/||"
[ -n "$OUT" ] && cp "$work"/*.log "$OUT"  # the whole logs, where somebody wants them
echo "done after $SECONDS s; failed:${failures:- nothing}"
[ -z "$failures" ]
